"""Keras's names and layouts as PyTorch's."""

import torch

_LAST = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def from_keras(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Of one tensor; what is not Keras's passes unchanged.

    ``tf_deberta_model/deberta/encoder/layer_._0/output/dense/kernel:0`` becomes
    ``tf_deberta_model.deberta.encoder.layer.0.output.dense.weight``, transposed: Keras puts the output features last,
    PyTorch first, and of a convolution's kernel [width, in, out] PyTorch makes [out, in, width].
    """
    if "/" not in name:
        return name, tensor
    *scopes, last = name.removesuffix(":0").replace("_._", "/").split("/")
    if last == "kernel":
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    return ".".join([*scopes, _LAST.get(last, last)]), tensor
