"""Translates names and layouts of a file's tensors into those of this package's models, and back to Hugging Face's.

The package uses the names of Hugging Face's DeBERTa-v2 for v1 too, and one head for masked language models,
``lm_predictions.lm_head``.
"""

import re

import torch

from .error import CheckpointError

_HEAD = "lm_predictions.lm_head."
_WORDS = "deberta.embeddings.word_embeddings."
_POSITIONS = "deberta.embeddings.position_embeddings."
# Maps names of v1, and of v2 in TensorFlow, to the package's where they differ.
_ATTENTION = {
    "attention.self.q_bias": "attention.self.query_proj.bias",
    "attention.self.v_bias": "attention.self.value_proj.bias",
    "attention.self.pos_proj.": "attention.self.pos_key_proj.",
    "attention.self.pos_q_proj.": "attention.self.pos_query_proj.",
}
_LEGACY_HEAD = {"cls.predictions.transform.": _HEAD, "cls.predictions.": _HEAD}
_LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_KERAS = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}
_QUERY, _KEY, _VALUE = (f"attention.self.{x}_proj.weight" for x in ("query", "key", "value"))
_IN = "attention.self.in_proj.weight"
# DataParallel, torch.compile, FSDP and activation checkpointing add these to names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BODY = re.compile(r"((?:.*\.)?)embeddings\.(?:word_embeddings|position_embeddings|token_type_embeddings|LayerNorm)\.")
_PARTS = {"generator", "discriminator"}  # the two models of replaced token detection, which may share a file

_Found = dict[str, tuple[str, torch.Tensor]]  # the package's name -> the file's name and the tensor


def to_native(
    tensors: dict[str, torch.Tensor], *, version: int, heads: int, expected: set[str], part: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Returns a file's tensors under the model's names, and the file's names of tensors that the model ignores.

    The file's names may be Hugging Face's, Microsoft's or Keras's. The model ignores heads of other models, the other
    part, and position embeddings that it does not add. Unknown tensors are returned. The result may share memory with
    ``tensors``.

    Args:
        version: 1 or 2 (v3 counts as 2).
        expected: the model's own names; those of a bare model do not begin with "deberta.".
        part: "discriminator" or "generator": the model to take from a file of pretraining that holds both.

    Raises:
        CheckpointError: the tensors do not determine the model's weights.
    """
    bare = not any(x.startswith("deberta.") for x in expected)
    wanted = {"deberta." + x for x in expected} if bare else expected
    found, other, ignored = _found(tensors, wanted, part)
    ignored += _add_differences(found, other, wanted)
    if version == 1:
        ignored += _drop_zero_biases(found)
    _split_projections(found, version, heads)
    _resolve_decoder(found, wanted)
    native = {}
    for name, (origin, tensor) in found.items():
        if name not in wanted and _is_of_other_models(name, wanted):
            ignored.append(origin)
        else:
            native[name.removeprefix("deberta.") if bare else name] = tensor
    return native, ignored


def _found(tensors: dict[str, torch.Tensor], wanted: set[str], part: str) -> tuple[_Found, _Found, list[str]]:
    """Returns the tensors of ``part``, those of the other part, and the file's names of the latter and of duplicates.

    The tensors are by the package's names.
    """
    translated = [_from_keras(name, tensor) for name, tensor in tensors.items()]
    names, of_other = _without_prefixes([name for name, _ in translated], part)
    found: tuple[_Found, _Found] = {}, {}
    ignored = [origin for origin, is_other in zip(tensors, of_other) if is_other]
    for origin, name, (_, tensor), is_other in zip(tensors, names, translated, of_other):
        name = _replaced(name, _ATTENTION | _LEGACY_HEAD | _LAYER_NORM)
        first, _ = found[is_other].setdefault(name, (origin, tensor))
        if first == origin or is_other:
            continue
        if name in wanted and not torch.equal(tensor, found[False][name][1]):
            raise CheckpointError(f"{first} and {origin} both stand for {name}, and differ")
        ignored.append(origin)
    return *found, ignored


def _without_prefixes(names: list[str], part: str) -> tuple[list[str], list[bool]]:
    """Returns each name without prefixes, the body's under ``deberta.``, and whether it belongs to the other part.

    The names of its embeddings reveal the body's prefix: deberta, bert, model.deberta or none. Raises CheckpointError
    if the file holds only the other part, or several models that are not a pair.
    """
    if part not in _PARTS:
        raise ValueError(f"part must be 'discriminator' or 'generator', got {part!r}")
    names = [".".join(x for x in name.split(".") if x not in _WRAPPERS) for name in names]
    bodies = sorted({found[1] for x in names if (found := _BODY.match(x))}) or ["deberta."]
    (other,) = _PARTS - {part}
    others = [x for x in bodies if other in x.split(".")]
    own = [x for x in bodies if part in x.split(".")] if others else bodies
    if not own:
        raise CheckpointError(f"the file holds a {other} ({others[0]}*), and the {part} was asked for")
    if len(own) > 1 or len(others) > 1:
        raise CheckpointError(f"the file holds several models: {', '.join(x + '*' for x in bodies)}")
    of_other = [bool(others) and x.startswith(_around(others[0])) for x in names]
    return [_strip(x, others[0] if is_other else own[0]) for x, is_other in zip(names, of_other)], of_other


def _strip(name: str, body: str) -> str:
    if name.startswith(body if body else ("embeddings.", "encoder.")):
        return "deberta." + name.removeprefix(body)
    return name.removeprefix(_around(body))


def _around(body: str) -> str:
    """Returns the prefix of the heads beside the body: "model." for "model.deberta."."""
    *outer, last = body.removesuffix(".").split(".")
    return "".join(x + "." for x in ([*outer, last] if last in _PARTS else outer))


def _from_keras(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Returns PyTorch's name and layout of a Keras tensor; other tensors stay unchanged.

    ``tf_deberta_model/deberta/encoder/layer_._0/output/dense/kernel:0`` becomes
    ``tf_deberta_model.deberta.encoder.layer.0.output.dense.weight`` and is transposed. A kernel [in, out] becomes
    [out, in], and that of a convolution, [width, in, out], becomes [out, in, width].
    """
    if "/" not in name:
        return name, tensor
    *scopes, last = name.removesuffix(":0").replace("_._", "/").split("/")
    if last == "kernel":
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    return ".".join([*scopes, _KERAS.get(last, last)]), tensor


def _replaced(name: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


def _add_differences(found: _Found, other: _Found, wanted: set[str]) -> list[str]:
    """Adds differences of embeddings to the generator's: E_D = E_G + E_delta.

    A discriminator trained beside a generator may save only the difference. Returns the names of differences that are
    not needed, because the file holds the sum too or the model has no such embeddings.
    """
    left_over = []
    for table in (_WORDS, _POSITIONS):
        origin, difference = found.pop(table + "_weight", (None, None))
        if origin is None:
            continue
        if table + "weight" in found or table + "weight" not in wanted:
            left_over.append(origin)
            continue
        generator_name, generator = other.get(table + "weight", (None, None))
        if generator is None:
            raise CheckpointError(
                f"{origin} is what the discriminator's embeddings add to its generator's, which are not in the file. "
                "Join the two: the generator's tensors, often in pytorch_model.generator.bin, under names that begin "
                "with 'generator.', and the discriminator's with 'discriminator.'"
            )
        if generator.shape != difference.shape:
            raise CheckpointError(
                f"{origin} {tuple(difference.shape)} is to be added to {generator_name} {tuple(generator.shape)}"
            )
        found[table + "weight"] = origin, generator + difference
    return left_over


def _drop_zero_biases(found: _Found) -> list[str]:
    """Removes the zero biases that Microsoft's code saves for v1's keys, which have no biases. Returns their names."""
    zero = [
        name
        for name, (_, tensor) in found.items()
        if name.endswith(("attention.self.key_proj.bias", "attention.self.pos_key_proj.bias")) and not tensor.any()
    ]
    return [found.pop(name)[0] for name in zero]


def _split_projections(found: _Found, version: int, heads: int) -> None:
    """Splits v1's in_proj [3 * H, H], whose rows are ordered by head, then by query, key and value."""
    for name in [x for x in found if x.endswith(_IN)]:
        origin, tensor = found.pop(name)
        if version != 1:
            raise CheckpointError(f"{origin} belongs to DeBERTa v1; the configuration says v2 or v3")
        if tensor.dim() != 2 or tensor.shape[0] % (3 * heads):
            raise CheckpointError(f"{origin} {tuple(tensor.shape)} must hold 3 projections for each of {heads} heads")
        parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
        for ending, projection in zip((_QUERY, _KEY, _VALUE), parts):
            found[name.removesuffix(_IN) + ending] = origin, projection.flatten(0, 1)


def _resolve_decoder(found: _Found, wanted: set[str]) -> None:
    """Resolves the decoder of Hugging Face's head: a matrix that may be the word embeddings, and a copy of the bias."""
    weight, bias = _HEAD + "decoder.weight", _HEAD + "decoder.bias"
    if bias in found:  # If both exist and differ, Hugging Face's models add this one.
        found[_HEAD + "bias"] = found.pop(bias)
    if weight not in found or weight in wanted:
        return
    origin, decoder = found[weight]
    # If the two are tied, the file may hold only the decoder.
    words_origin, words = found.setdefault(_WORDS + "weight", (origin, decoder))
    has_head = _HEAD + "bias" in wanted
    if has_head or words_origin == origin:
        del found[weight]
    if has_head and not torch.equal(decoder, words):
        raise CheckpointError(
            f"{origin} differs from {words_origin}, and the configuration ties them; "
            "if both were trained, set tie_word_embeddings to False"
        )


def _is_of_other_models(name: str, wanted: set[str]) -> bool:
    """Whether a tensor belongs to a head that this model lacks, or to position embeddings that it does not add."""
    root = name.split(".", 1)[0] + "."
    if root in ("lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs."):
        return not any(x.startswith(root) for x in wanted)
    return name in (_POSITIONS + "weight", "deberta.embeddings.position_ids")


def to_hf(tensors: dict[str, torch.Tensor], *, version: int, heads: int, legacy: bool) -> dict[str, torch.Tensor]:
    """Returns all tensors of a model under the names and in the layouts that Hugging Face's models load.

    With ``legacy``, the head for masked language models is ``cls.predictions`` instead of ``lm_predictions.lm_head``.

    Raises:
        ValueError: the decoder is not tied, which the head of ``legacy=False`` does not allow; or in v1, one of the
            three projections is missing.
    """
    if not legacy and _HEAD + "decoder.weight" in tensors:
        raise ValueError(
            "a decoder that is not tied to the word embeddings can be saved with legacy=True only: "
            "Hugging Face's other head has none"
        )
    names = {_HEAD + x: "cls.predictions." + x for x in ("bias", "decoder.weight")} if legacy else {}
    names |= {_HEAD: "cls.predictions.transform."} if legacy else {}
    names |= {ours: theirs for theirs, ours in _ATTENTION.items()} if version == 1 else {}
    renamed = {}
    for name, tensor in tensors.items():
        if version == 1 and name.endswith((_QUERY, _KEY, _VALUE)):
            layer = name[: name.index("attention.self.")]
            if layer + _IN not in renamed:
                renamed[layer + _IN] = _joined(tensors, layer, heads)
        else:
            renamed[_replaced(name, names)] = tensor
    if legacy and _HEAD + "decoder.weight" in tensors:
        # transformers 5 has two biases in this case, and adds this one.
        renamed["cls.predictions.decoder.bias"] = tensors[_HEAD + "bias"].clone()
    return renamed


def _joined(tensors: dict[str, torch.Tensor], layer: str, heads: int) -> torch.Tensor:
    """Inverts ``_split_projections`` for one layer."""
    parts = [tensors.get(layer + x) for x in (_QUERY, _KEY, _VALUE)]
    if any(x is None for x in parts):
        raise ValueError(f"{layer}attention.self needs query_proj, key_proj and value_proj, which v1 saves as one")
    return torch.stack([x.unflatten(0, (heads, -1)) for x in parts], 1).flatten(0, 2)
