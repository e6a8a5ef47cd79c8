"""One DeBERTa-v3-base attention module on a GPU, ours against everybody else's: ``python -m bench.layer_gpu``.

The workload that disentangled-flash publishes: hidden states (B, L, 768) with B = 16384 / L, bfloat16, no dropout, all
tokens valid; projections of query, key, value and of the relative positions included, the output's not. Masks and
relative positions that a variant wants are made beforehand, as its encoder makes them once for all layers.

    hf-eager               Hugging Face's module
    patched-NAME           the same after ``deberta_fast.patch``, for every backend without objection, without a mask
    patched-NAME-mask      for fused backends, with the (B, L) mask that the patched encoder hands down
    patched-mask           the default backend, with that mask
    plain-*                scaled_dot_product_attention between the same projections, no position terms, by backend
    disentangled-flash     with assume_unpadded=True and its heuristic; in the forward pass its inference module, which
                           projects the positions beforehand, otherwise its training module
    flashdeberta           without a mask, which it would sum up and wait for

The last two where they are installed.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import deberta_fast
from deberta_fast import backends
from deberta_fast.op.relative_position import slot_table

from . import models, timing
from .device import Call, Device, Table, by_length

PASSES = ("forward", "backward", "forward+backward")
FLOPS = {"forward": (4, 4), "backward": (10, 12), "forward+backward": (14, 16)}  # of L^2 D and of L R D
LENGTHS = (512, 2048, 8192, 128, 1024, 4096)  # most wanted first
SECONDS_A_VARIANT = 0.15
PLAIN = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LEGEND = (
    "One DeBERTa-v3-base attention module with the projections of query, key, value and relative positions, B = tokens "
    "/ length, no dropout, all tokens valid: what the variants are is said in bench/layer_gpu.py. ms: medians of "
    "interleaved calls with the second-level cache overwritten before, the host's time included as far as the GPU "
    "waits for it, which is how disentangled-flash publishes its figures. kernel ms: the same with the GPU kept busy "
    "until the call is queued. Forward without gradients; backward is output.backward(gradient, retain_graph=True), no "
    ".grad to add to. TFLOP/s as there: (4 L^2 + 4 L R) D a head forward, (10 L^2 + 12 L R) D backward, R the rows "
    "that the length reaches, over ms. x eager: times as fast as hf-eager. peak MiB: what torch allocates in the call "
    "above what is there before. difference: of the outputs from hf-eager's, relative, in norm."
)

Forward = Callable[[], torch.Tensor]


class Layer:
    """The module, its input and its gradient, at one length."""

    def __init__(self, length: int, batch: int, dtype: torch.dtype, device: str):
        self.length, self.batch = length, batch
        encoder = models.encoder_v3_base(1).to(device, dtype)
        self.config, self.attention = encoder.config, encoder.layer[0].attention.self
        normal = functools.partial(torch.randn, dtype=dtype, device=device)
        self.hidden, self.gradient = (normal(batch, length, self.config.hidden_size) for _ in range(2))
        self.table = encoder.get_rel_embedding().detach()
        for x in (self.hidden, self.table):
            x.requires_grad_()
        self.encoder = encoder

    def twin(self) -> nn.Module:
        return copy.deepcopy(self.attention)

    def loaded(self, module: nn.Module) -> nn.Module:
        """A peer's module with the same weights."""
        module.load_state_dict(self.attention.state_dict(), strict=True)
        return module.to(self.hidden.device, self.hidden.dtype).eval()

    def all_valid(self) -> torch.Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.hidden.device)

    def call(self, module: nn.Module, forward: Forward, passes: str) -> Call:
        def reset():
            module.zero_grad(set_to_none=True)
            self.hidden.grad = self.table.grad = None

        def without_gradients():
            with torch.no_grad():
                return forward()

        if passes == "forward":
            return Call(without_gradients)
        if passes == "forward+backward":
            return Call(lambda: forward().backward(self.gradient), reset)
        output = forward()
        return Call(lambda: output.backward(self.gradient, retain_graph=True), reset)


def variants(layer: Layer) -> dict[str, Callable[[str], tuple[nn.Module, Forward]]]:
    """By name, what makes a variant's module and its forward call for a pass; libraries are imported then."""
    found = {"hf-eager": functools.partial(hf_eager, layer)}
    for name in _able(layer):
        found[f"patched-{name}"] = functools.partial(patched, layer, name, False)
        if name in ("cuda", "triton"):
            found[f"patched-{name}-mask"] = functools.partial(patched, layer, name, True)
    found["patched-mask"] = functools.partial(patched, layer, None, True)
    for name, kernel in PLAIN.items():
        found[f"plain-{name}"] = functools.partial(plain, layer, kernel)
    found["disentangled-flash"] = functools.partial(disentangled_flash, layer)
    found["flashdeberta"] = functools.partial(flashdeberta, layer)
    return found


def _able(layer: Layer) -> list[str]:
    """Backends without objection to this module's call, by trying them on a few tokens."""
    able = []
    for name in backends.BACKENDS:
        module = deberta_fast.patch(layer.twin(), name)
        try:
            with torch.no_grad():
                module(layer.hidden[:1, :8], None, rel_embeddings=layer.table)
        except RuntimeError as error:
            if "cannot serve" not in str(error):
                able.append(name)  # says what is wrong where it is timed
        else:
            able.append(name)
    return [name for name in able if name != "reference"]


def hf_eager(layer: Layer, passes: str) -> tuple[nn.Module, Forward]:
    module, mask = layer.twin(), layer.encoder.get_attention_mask(layer.all_valid())
    positions = layer.encoder.get_rel_pos(layer.hidden)
    return module, lambda: module(layer.hidden, mask, relative_pos=positions, rel_embeddings=layer.table)[0]


def patched(layer: Layer, backend: str | None, masked: bool, passes: str) -> tuple[nn.Module, Forward]:
    module = deberta_fast.patch(layer.twin(), backend)
    mask = layer.all_valid() if masked else None
    return module, lambda: module(layer.hidden, mask, rel_embeddings=layer.table)[0]


def plain(layer: Layer, kernel: SDPBackend, passes: str) -> tuple[nn.Module, Forward]:
    module = layer.twin()

    def forward():
        query, key, value = (
            project(layer.hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
            for project in (module.query_proj, module.key_proj, module.value_proj)
        )
        with sdpa_kernel(kernel):
            return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    return module, forward


def disentangled_flash(layer: Layer, passes: str) -> tuple[nn.Module, Forward]:
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


def flashdeberta(layer: Layer, passes: str) -> tuple[nn.Module, Forward]:
    from flashdeberta import FlashDisentangledSelfAttention

    module = layer.loaded(FlashDisentangledSelfAttention(layer.config))
    return module, lambda: module(layer.hidden, None, rel_embeddings=layer.table)[0]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    timing.provenance()
    start = time.perf_counter()
    notes = f"{options.tokens} tokens, {options.dtype}. {LEGEND}{_peers()}"
    table = Table("layer" + ("" if options.dtype == "bfloat16" else f"-{options.dtype}"), options.out, notes, summarise)
    for length in options.lengths:
        batch = max(1, options.tokens // length)
        layer = Layer(length, batch, getattr(torch, options.dtype), options.device)
        found = {n: make for n, make in variants(layer).items() if n.startswith(tuple(options.variants))}
        differences = _differences(found) if "forward" in options.passes else {}
        for passes in options.passes:
            if time.perf_counter() - start > options.seconds:
                print(f"out of time before length {length}, {passes}", flush=True)
                return
            build = {name: functools.partial(_build, layer, make, passes) for name, make in found.items()}
            taken = device.measure(build, SECONDS_A_VARIANT, queued=False)
            kernels = device.measure({n: b for n, b in build.items() if taken[n].seconds}, SECONDS_A_VARIANT)
            peaks = device.peaks({n: b for n, b in build.items() if taken[n].seconds})
            eager = taken["hf-eager"].seconds if "hf-eager" in taken else None
            for name, outcome in taken.items():
                seconds, kernel, peak = outcome.seconds, kernels.get(name), peaks.get(name)
                table.add(
                    {
                        "length": length,
                        "batch": batch,
                        "pass": passes,
                        "variant": name,
                        "ms": seconds and 1000 * seconds,
                        "kernel ms": kernel and kernel.seconds and 1000 * kernel.seconds,
                        "TFLOP/s": seconds and _flops(layer, passes) / seconds / 1e12,
                        "x eager": seconds and eager and eager / seconds,
                        "peak MiB": peak / timing.MIB if isinstance(peak, int) else None,
                        "calls": outcome.runs or None,
                        "difference": differences.get(name) if passes == "forward" else None,
                        "error": outcome.error,
                    }
                )


def _build(layer: Layer, make: Callable[[str], tuple[nn.Module, Forward]], passes: str) -> Call:
    module, forward = make(passes)
    return layer.call(module, forward, passes)


def _differences(found: dict[str, Callable]) -> dict[str, float]:
    """Relative differences of the outputs from hf-eager's, of what computes the same and does not fail."""
    outputs = {}
    for name, make in found.items():
        if name.startswith("plain"):
            continue
        try:
            with torch.no_grad():
                outputs[name] = make("forward")[1]().float()
        except Exception:
            continue  # said where it is timed
    want = outputs.get("hf-eager")
    return {} if want is None else {n: float((x - want).norm() / want.norm()) for n, x in outputs.items()}


def _flops(layer: Layer, passes: str) -> float:
    start, stop = slot_table(256, 512).window(layer.length, layer.length)
    of_square, of_rows = FLOPS[passes]
    size = layer.config.hidden_size
    return layer.batch * size * (of_square * layer.length**2 + of_rows * layer.length * (stop - start))


def _peers() -> str:
    versions = {name: timing.version(name) for name in ("disentangled-flash", "flashdeberta")}
    return "".join(f" {name}: {version or 'not installed'}." for name, version in versions.items())


def summarise(rows: list[dict]) -> str:
    def cell(row):
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row['x eager']:.2f}x)" if "x eager" in row else "")

    return by_length(rows, cell)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.layer_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L", help="in this order")
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=PASSES)
    parser.add_argument("--variants", nargs="+", default=[""], metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--seconds", type=float, default=200.0, help="no pass is begun later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    options = parser.parse_args(arguments)
    options.out = options.out or timing.results_folder()
    return options


if __name__ == "__main__":
    main()
