"""One DeBERTa-v3-base attention module on a GPU, ours against other libraries': ``python -m bench.layer_gpu``.

The workload is the one that disentangled-flash publishes: hidden states (B, L, 768) with B = 16384 / L, bfloat16, no
dropout, all tokens valid. It includes the projections of query, key, value and relative positions, not the output's.
Masks and relative positions are made beforehand, as an encoder makes them once for all layers. ``variants.layer``
describes the variants; other libraries take part where they are installed.
"""

import argparse
import functools
import itertools

import torch

from deberta_fast.op.relative_position import slot_table

from . import device as devices
from . import models, timing
from .device import Device, Table, summary_of
from .variants import Entry, described, relative_difference
from .variants.layer import ATTENTION, Layer

FLOPS = {"forward": (4, 4), "backward": (10, 12), "forward+backward": (14, 16)}  # divided by L^2 D, and by L R D
PASSES = tuple(FLOPS)
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
    chosen = {name: entry for name, entry in VARIANTS.items() if name.startswith(tuple(options.variants))}
    notes = f"{options.tokens} tokens, {options.dtype}. {LEGEND}{described(chosen)}"
    notes += timing.installed("disentangled-flash", "flashdeberta")
    name = "layer" + ("" if options.dtype == "bfloat16" else f"-{options.dtype}")
    table = Table(name, options.out, notes, summary_of("ms", "x eager"))
    encoder = models.encoder_v3_base(1).to(options.device, getattr(torch, options.dtype))
    cases = itertools.product(options.lengths, options.passes)
    for length, passes in timing.in_time(options.seconds, cases, "length {0[0]}, {0[1]}".format):
        if passes == options.passes[0]:
            layer = Layer(encoder, max(1, options.tokens // length), length)
            found = {name: entry for name, entry in chosen.items() if entry.suits(layer)}
        differences = _differences(layer, found) if passes == "forward" else {}
        build = {name: functools.partial(layer.call, entry, passes) for name, entry in found.items()}
        taken = device.measure(build, SECONDS_A_VARIANT, queued=False)
        ran = {name: make for name, make in build.items() if taken[name].seconds}
        kernels = device.measure(ran, SECONDS_A_VARIANT)
        peaks = {name: device.peak(make) for name, make in ran.items()}
        eager = taken["hf-eager"].seconds if "hf-eager" in taken else None
        for name, outcome in taken.items():
            row = {"length": length, "batch": layer.batch, "pass": passes, "variant": name} | outcome.columns()
            if seconds := outcome.seconds:
                row["kernel ms"] = kernels[name].columns()["ms"]
                row["TFLOP/s"] = _flops(layer, passes) / seconds / 1e12
                row["x eager"] = eager and eager / seconds
                row["peak MiB"] = peaks[name] / timing.MIB if isinstance(peaks[name], int) else None
                row |= {"calls": outcome.runs, "difference": differences.get(name)}
            table.add(row)


def _differences(layer: Layer, found: dict[str, Entry]) -> dict[str, float]:
    """Returns relative differences from hf-eager's output, without variants that fail or have no position terms."""
    outputs = {}
    for name, entry in found.items():
        if name.startswith("plain"):
            continue
        try:
            with torch.no_grad():
                outputs[name] = entry.build(layer, "forward")[1]()
        except Exception:
            continue  # the timing reports it
    want = outputs.get("hf-eager")
    return {} if want is None else {name: relative_difference(x, want) for name, x in outputs.items()}


def _flops(layer: Layer, passes: str) -> float:
    start, stop = slot_table(256, 512).window(layer.length, layer.length)
    of_square, of_rows = FLOPS[passes]
    size = layer.config.hidden_size
    return layer.batch * size * (of_square * layer.length**2 + of_rows * layer.length * (stop - start))


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
