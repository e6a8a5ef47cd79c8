"""Encoder layers of DeBERTa-v3-base, and only their attention module with its projections, from hidden states."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

import deberta_fast
from deberta_fast import backends

from .. import models
from ..device import Call
from . import PLAIN, Entry, Forward, call_of

Built = tuple[nn.Module, Forward]


class Layer:
    """An encoder, its first attention module, random hidden states for both, and a gradient of their output.

    All tokens are valid. Calls of the attention module do not include its mask and relative positions, because an
    encoder makes them once for all layers.
    """

    def __init__(self, encoder: DebertaV2Encoder, batch: int, length: int):
        self.encoder, self.batch, self.length = encoder, batch, length
        self.config, self.attention = encoder.config, encoder.layer[0].attention.self
        like = next(encoder.parameters())
        normal = functools.partial(torch.randn, batch, length, self.config.hidden_size)
        self.hidden, self.gradient = (normal(dtype=like.dtype, device=like.device) for _ in range(2))
        self.table = encoder.get_rel_embedding().detach()
        for x in (self.hidden, self.table):
            x.requires_grad_()

    def all_valid(self) -> torch.Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.hidden.device)

    def twin(self) -> nn.Module:
        """Copies the attention module, with shared parameters."""
        return models.sharing_parameters(self.attention)

    def loaded(self, module: nn.Module) -> nn.Module:
        """Loads the same weights into another library's module."""
        module.load_state_dict(self.attention.state_dict(), strict=True)
        return module.to(self.hidden.device, self.hidden.dtype).eval()

    def call(self, entry: Entry, passes: str) -> Call:
        module, forward = entry.build(self, passes)
        return call_of(forward, passes, self.gradient, [*module.parameters(), self.hidden, self.table])


def hf_eager(layer: Layer, passes: str) -> Built:
    module, mask = layer.twin(), layer.encoder.get_attention_mask(layer.all_valid())
    positions = layer.encoder.get_rel_pos(layer.hidden)
    return module, lambda: module(layer.hidden, mask, relative_pos=positions, rel_embeddings=layer.table)[0]


def patched(backend: str | None, masked: bool, layer: Layer, passes: str) -> Built:
    return _with_mask(deberta_fast.patch(layer.twin(), backend), masked, layer)


def native(layer: Layer, passes: str) -> Built:
    return _with_mask(models.native_encoder(layer.encoder).layer[0].attention.self, True, layer)


def _with_mask(module: nn.Module, masked: bool, layer: Layer) -> Built:
    """Calls a module with the (B, L) bool mask that our encoders pass to it, or without a mask."""
    mask = layer.all_valid() if masked else None
    return module, lambda: module(layer.hidden, mask, rel_embeddings=layer.table)[0]


def plain(layer: Layer, passes: str) -> Built:
    module = layer.twin()
    return module, lambda: models.plain_attention(module, layer.hidden)


def plain_by(kernel: SDPBackend, layer: Layer, passes: str) -> Built:
    module, forward = plain(layer, passes)
    return module, sdpa_kernel(kernel)(forward)


def disentangled_flash(layer: Layer, passes: str) -> Built:
    import disentangled_flash

    tuning = disentangled_flash.KernelTuningOptions(mode="heuristic")
    kind = "DisentangledFlashAttention" if passes == "forward" else "TritonTrainingDisentangledSelfAttention"
    module = layer.loaded(getattr(disentangled_flash, kind)(layer.config, tuning=tuning, assume_unpadded=True))
    mask = layer.all_valid()
    if passes == "forward":
        with torch.no_grad():
            module.prepare_for_inference(layer.table)
            plan = module.prepare_shape(layer.length, layer.hidden.device)
        return module, lambda: module.forward_prepared(layer.hidden, mask, plan)[0]
    return module, lambda: module(layer.hidden, mask, rel_embeddings=layer.table)[0]


def flashdeberta(layer: Layer, passes: str) -> Built:
    from flashdeberta import FlashDisentangledSelfAttention

    module = layer.loaded(FlashDisentangledSelfAttention(layer.config))
    return module, lambda: module(layer.hidden, None, rel_embeddings=layer.table)[0]


def _able(backend: str, layer: Layer) -> bool:
    """Says whether a backend can serve this module, by a call on a few tokens."""
    module = deberta_fast.patch(layer.twin(), backend)
    try:
        with torch.no_grad():
            module(layer.hidden[:1, :8], None, rel_embeddings=layer.table)
    except RuntimeError as error:
        return "cannot serve" not in str(error)  # the timing reports other errors
    return True


def _entries() -> Iterator[tuple[str, Entry]]:
    """Yields entries whose build(layer, passes) returns a module and its forward call.

    build raises ImportError where the library that it needs is not installed.
    """
    yield "hf-eager", Entry("Hugging Face's module with a (B, 1, L, L) mask and (1, L, L) relative positions", hf_eager)
    about = "the same after deberta_fast.patch"
    for name in backends.BACKENDS:
        able = functools.partial(_able, name)
        if name != "reference":
            without_mask = functools.partial(patched, name, False)
            yield f"patched-{name}", Entry(f"{about} by that backend, without a mask", without_mask, able)
        if name in ("cuda", "triton"):
            with_mask = functools.partial(patched, name, True)
            yield f"patched-{name}-mask", Entry(f"{about} by that backend, with a (B, L) mask", with_mask, able)
    default = functools.partial(patched, None, True)
    yield "patched-mask", Entry(f"{about} by the backend that it chooses, with a (B, L) mask", default)
    yield "native", Entry("this package's module on the same weights, with a (B, L) mask", native)
    about = "scaled_dot_product_attention between the same projections, no position terms or mask"
    yield "plain", Entry(about, plain)
    for name, kernel in PLAIN.items():
        yield f"plain-{name}", Entry(f"{about}, by that kernel", functools.partial(plain_by, kernel))
    about = (
        "that library with assume_unpadded=True and its heuristic, forward by its inference module, which projects the "
        "positions beforehand, otherwise by its training module"
    )
    yield "disentangled-flash", Entry(about, disentangled_flash)
    yield "flashdeberta", Entry("that library without a mask, because a mask makes it synchronise", flashdeberta)


ATTENTION = dict(_entries())


def _hf_encoder(make: Callable[[DebertaV2Encoder], DebertaV2Encoder], layer: Layer, passes: str) -> Built:
    encoder, mask = make(layer.encoder), layer.all_valid().long()
    return encoder, lambda: encoder(layer.hidden, mask).last_hidden_state


def _native_encoder(layer: Layer, passes: str) -> Built:
    encoder, mask = models.native_encoder(layer.encoder), layer.all_valid()
    return encoder, lambda: encoder(layer.hidden, mask, mask)[0][-1]


def _patched_encoder(encoder: DebertaV2Encoder) -> DebertaV2Encoder:
    return deberta_fast.patch(models.sharing_parameters(encoder))


# Encoder layers, which get a tokenizer's (B, L) mask. Hugging Face's encoder makes an L x L mask and relative positions
# for the plain ones too, which do not read them.
ENCODER = {
    "eager": Entry("Hugging Face's encoder", functools.partial(_hf_encoder, models.sharing_parameters)),
    "patched": Entry("the same after deberta_fast.patch", functools.partial(_hf_encoder, _patched_encoder)),
    "native": Entry("this package's encoder on the same weights", _native_encoder),
    "plain": Entry(
        "Hugging Face's with scaled_dot_product_attention for attention, no position terms or mask",
        functools.partial(_hf_encoder, models.plain_encoder),
    ),
}
