"""One DeBERTa-v3-base attention module on a GPU, ours against other libraries': ``python -m bench.layer_gpu``.

The workload is the one that disentangled-flash publishes: hidden states (B, L, 768) with B = 16384 / L, bfloat16, no
dropout, all tokens valid. It includes the projections of query, key, value and relative positions, not the output's.
Masks and relative positions are made beforehand, as an encoder makes them once for all layers. ``variants.layer``
describes the variants; other libraries take part where they are installed.
"""

import argparse
import functools
import time

import torch

from deberta_fast.op.relative_position import slot_table

from . import device as devices
from . import models, timing
from .device import Call, Device, Table, times_by_length
from .variants import Entry, described
from .variants.layer import ATTENTION, Layer

PASSES = ("forward", "backward", "forward+backward")
FLOPS = {"forward": (4, 4), "backward": (10, 12), "forward+backward": (14, 16)}  # of L^2 D and of L R D
LENGTHS = (512, 2048, 8192, 128, 1024, 4096)  # most wanted first
SECONDS_A_VARIANT = 0.15
VARIANTS = {name: entry for name, entry in ATTENTION.items() if name not in ("native", "plain")}
LEGEND = (
    "One DeBERTa-v3-base attention module with the projections of query, key, value and relative positions, B = tokens "
    "/ length, no dropout, all tokens valid. ms: medians of interleaved calls with the second-level cache overwritten "
    "before, including the host's time as far as the GPU waits for it, as disentangled-flash publishes its figures. "
    "kernel ms: the same with the GPU kept busy until the call is queued. Forward runs without gradients; backward is "
    "output.backward(gradient, retain_graph=True) with no .grad to add to. TFLOP/s as published there: (4 L^2 + 4 L R) "
    "D per head forward, (10 L^2 + 12 L R) D backward, R the rows that the length reaches, over ms. x eager: times as "
    "fast as hf-eager. peak MiB: what torch allocates in the call above what is in use before. difference: of the "
    "outputs from hf-eager's, relative, in norm."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    timing.provenance()
    start = time.perf_counter()
    chosen = {name: entry for name, entry in VARIANTS.items() if name.startswith(tuple(options.variants))}
    notes = f"{options.tokens} tokens, {options.dtype}. {LEGEND}{described(chosen)}{_peers()}"
    name = "layer" + ("" if options.dtype == "bfloat16" else f"-{options.dtype}")
    table = Table(name, options.out, notes, times_by_length("x eager"))
    encoder = models.encoder_v3_base(1).to(options.device, getattr(torch, options.dtype))
    for length in options.lengths:
        batch = max(1, options.tokens // length)
        layer = Layer(encoder, batch, length)
        found = {name: entry for name, entry in chosen.items() if entry.suits(layer)}
        differences = _differences(layer, found) if "forward" in options.passes else {}
        for passes in options.passes:
            if time.perf_counter() - start > options.seconds:
                print(f"out of time before length {length}, {passes}", flush=True)
                return
            build = {name: functools.partial(_build, layer, entry, passes) for name, entry in found.items()}
            taken = device.measure(build, SECONDS_A_VARIANT, queued=False)
            ran = {name: make for name, make in build.items() if taken[name].seconds}
            kernels = device.measure(ran, SECONDS_A_VARIANT)
            peaks = {name: device.peak(make) for name, make in ran.items()}
            eager = taken["hf-eager"].seconds if "hf-eager" in taken else None
            for name, outcome in taken.items():
                row = {"length": length, "batch": batch, "pass": passes, "variant": name} | outcome.columns()
                if seconds := outcome.seconds:
                    row["kernel ms"] = kernels[name].columns()["ms"]
                    row["TFLOP/s"] = _flops(layer, passes) / seconds / 1e12
                    row["x eager"] = eager and eager / seconds
                    row["peak MiB"] = peaks[name] / timing.MIB if isinstance(peaks[name], int) else None
                    row["calls"] = outcome.runs
                    row["difference"] = differences.get(name) if passes == "forward" else None
                table.add(row)


def _build(layer: Layer, entry: Entry, passes: str) -> Call:
    return layer.call(entry.build(layer, passes), passes)


def _differences(layer: Layer, found: dict[str, Entry]) -> dict[str, float]:
    """Relative differences from hf-eager's output of the variants that compute the same and do not fail."""
    outputs = {}
    for name, entry in found.items():
        if name.startswith("plain"):
            continue
        try:
            with torch.no_grad():
                outputs[name] = entry.build(layer, "forward")[1]().float()
        except Exception:
            continue  # the timing reports it
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


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.parser("layer_gpu", __doc__)
    parser.set_defaults(lengths=LENGTHS)
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=PASSES)
    parser.add_argument("--variants", nargs="+", default=[""], metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=200.0, help="no pass begins later than this")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
