"""The attention operator on a GPU against its neighbours: ``python -m bench.attention_gpu``.

What the variants are is said in ``attention_variants``. Every length has as many sequences as make the same number of
tokens. Results go to bench/results/ and the GPU's name, after every row. ``--device cpu`` is there to try this out.
"""

import argparse
import functools
import time
from pathlib import Path

import torch

from . import timing
from .attention_variants import Workload, build_call, variants
from .device import Device, Table, by_length

PASSES = ("forward", "backward", "forward+backward")
FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}  # for each head's length^2 * size, plain attention's
LENGTHS = (512, 2048, 8192, 128, 1024, 4096, 16384, 256)  # most wanted first
SECONDS_A_VARIANT = 0.15
LEGEND = (
    "Medians of interleaved calls, kernels alone: the GPU is kept busy for a millisecond while the host queues a call, "
    "and its second-level cache is overwritten before. plain: torch's scaled_dot_product_attention, by backend, on the "
    "same query, key and value without position terms; plain-packed: torch's varlen_attn. x plain: times as long as "
    "the fastest plain one. hf-eager: Hugging Face's order of operations; flex: FlexAttention, whose score_mod reads "
    "both position terms from tables of every token and row, made in the timed call. mask, packed: how ours is told of "
    "padding. TFLOP/s count the products of plain attention over valid tokens (4, 10 and 14 length^2 size), for all "
    "variants alike. difference: of the output from the eager backend's, relative, in norm. Backward is "
    "output.backward(gradient, retain_graph=True) with no .grad to add to."
)
HOST_LEGEND = "Microseconds until the host may go on, of many calls in a row without waiting for the GPU. No flush."
MEMORY_LEGEND = (
    "Peak MiB that torch allocates in a call above what is there before it; and how much of it is left when outputs "
    "and gradients, which the call has to leave behind, are taken off. The variants are those of attention.md."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    run = host if options.host else memory if options.memory else times
    timing.provenance()
    run(options, device)


def times(options: argparse.Namespace, device: Device) -> None:
    start = time.perf_counter()
    table = Table(options.name, options.out, f"{_setting(options)} {LEGEND}", summarise)
    for length in options.lengths:
        spent = time.perf_counter() - start
        if spent > options.seconds:
            print(f"out of time before length {length}", flush=True)
            return
        workload = _workload(options, length)
        chosen = _chosen(options, workload, costly=spent < options.seconds / 2)
        exact = {name: workload.difference(variant) for name, variant in chosen.items()}
        for passes in options.passes:
            build = {name: functools.partial(build_call, variant, passes) for name, variant in chosen.items()}
            taken = device.measure(build, SECONDS_A_VARIANT)
            plain = min(
                (t.seconds for name, t in taken.items() if name.startswith("plain") and t.seconds), default=None
            )
            for name, outcome in taken.items():
                seconds = outcome.seconds
                table.add(
                    {
                        "length": length,
                        "batch": workload.batch,
                        "pass": passes,
                        "variant": name,
                        "ms": seconds and 1000 * seconds,
                        "TFLOP/s": seconds and FLOPS[passes] * workload.square_terms() / seconds / 1e12,
                        "x plain": seconds and plain and seconds / plain,
                        "calls": outcome.runs or None,
                        "difference": exact.get(name),
                        "error": outcome.error,
                    }
                )


def memory(options: argparse.Namespace, device: Device) -> None:
    start = time.perf_counter()
    table = Table(options.name, options.out, f"{_setting(options)} {MEMORY_LEGEND}", summarise_memory)
    for length in options.lengths:
        spent = time.perf_counter() - start
        if spent > options.seconds:
            print(f"out of time before length {length}", flush=True)
            return
        workload = _workload(options, length)
        chosen = _chosen(options, workload, costly=spent < options.seconds / 2)
        for passes in options.passes:
            for name, variant in chosen.items():
                build = {name: functools.partial(build_call, variant, passes)}
                peak = device.peaks(build)[name]
                failed = isinstance(peak, str)
                table.add(
                    {
                        "length": length,
                        "batch": workload.batch,
                        "pass": passes,
                        "variant": name,
                        "MiB": None if failed else peak / timing.MIB,
                        "beyond results MiB": None if failed else (peak - variant.results(passes)) / timing.MIB,
                        "error": peak if failed else None,
                    }
                )


def host(options: argparse.Namespace, device: Device) -> None:
    table = Table(options.name, options.out, f"{_setting(options)} {HOST_LEGEND}")
    for length in options.lengths:
        chosen = _chosen(options, _workload(options, length), costly=False)
        for passes in options.passes:
            for name, variant in chosen.items():
                row = {"length": length, "batch": 1, "pass": passes, "variant": name}
                outcome = device.measure({name: functools.partial(build_call, variant, passes)}, 0.0)[name]
                if outcome.error is None:
                    row["host us"] = 1e6 * device.host_seconds(build_call(variant, passes), repeats=options.repeats)
                table.add(row | {"error": outcome.error})


def summarise(rows: list[dict]) -> str:
    def cell(row):
        if "ms" not in row:
            return "failed"
        return f"{row['ms']:.3g}" + (f" ({row['x plain']:.2f}x)" if "x plain" in row else "")

    return by_length(rows, cell)


def summarise_memory(rows: list[dict]) -> str:
    return by_length(rows, lambda row: timing.cell(row["MiB"]) if "MiB" in row else "failed")


def _workload(options: argparse.Namespace, length: int) -> Workload:
    return Workload(
        length=length,
        batch=max(1, options.tokens // length),
        heads=options.heads,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        dropout_p=options.dropout,
        padding=options.padding,
    )


def _chosen(options: argparse.Namespace, workload: Workload, costly: bool) -> dict:
    found = variants(workload)
    if not costly:
        found.pop("flex", None)  # which torch compiles for every length and pass
    chosen = {name: v for name, v in found.items() if name.startswith(tuple(options.variants))}
    if not chosen:
        raise SystemExit(f"no variant begins with {' or '.join(options.variants)}: there are {', '.join(found)}")
    return chosen


def _setting(options: argparse.Namespace) -> str:
    tokens = "one sequence" if options.host else f"{options.tokens} tokens"
    parts = [f"{tokens}, {options.heads} heads of 64, tables of 512 rows, {options.dtype}"]
    if options.dropout:
        parts.append(f"dropout {options.dropout:g}")
    if options.padding:
        parts.append(f"{options.padding:.0%} of the tokens padding at the right, neighbours unequally")
    return ", ".join(parts) + "."


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_gpu", description=__doc__.split("\n\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="peak memory in place of time")
    kind.add_argument("--host", action="store_true", help="the host's time for a call on one sequence")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="L", help="in this order")
    parser.add_argument("--passes", choices=PASSES, nargs="+")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="NAME", help="only those whose name begins so")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--padding", type=float, default=0.0, metavar="F", help="share of the tokens that are padding")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="calls in a row, with --host")
    parser.add_argument("--seconds", type=float, default=200.0, help="no length is begun later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    options = parser.parse_args(arguments)
    if options.lengths is None:
        options.lengths = (128,) if options.host else (512, 2048, 8192, 16384) if options.memory else LENGTHS
    if options.passes is None:
        options.passes = tuple(x for x in PASSES if x != "backward" or not (options.host or options.memory))
    if options.host:
        options.tokens = 1
    options.out = options.out or timing.results_folder()
    what = "host" if options.host else "memory" if options.memory else "attention"
    what += "-dropout" * bool(options.dropout) + "-padding" * bool(options.padding)
    options.name = what + ("" if options.dtype == "bfloat16" else f"-{options.dtype}")
    return options


if __name__ == "__main__":
    main()
