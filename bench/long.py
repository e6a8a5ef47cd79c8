"""Training steps on one long text on the CPU, time and peak memory by length: ``python -m bench.long``.

``variants.long`` describes the variants. Every measurement runs in a process of its own, whose malloc returns freed
blocks at once (MALLOC_MMAP_THRESHOLD_). So the peak of resident memory, which Linux keeps (VmHWM) and can reset
(clear_refs), is that of the step. Variants take turns while their steps take less than --seconds; times are medians.
Results go to bench/results/cpu/, after every measurement.

``--profile LENGTH`` instead shows where the time of a native step goes, at this length and at a quarter of it.
"""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from . import timing
from .variants.long import (
    SHORT,
    SIZES,
    VARIANTS,
    Measured,
    Step,
    columns,
    difference,
    least_bytes,
    original,
    predicted_bytes,
)

LENGTHS = (4096, 8192, 16384, 32768, 65536)
ITEMSIZE = 4  # float32
MOST_ROUNDS = 5
ALLOWED = 1e-3  # relative difference of losses and gradients in float32, over 64k tokens
MOST_RATIO, MOST_OF_LEAST = 2.1, 1.3  # targets
PARTS = {
    "attention, forward": ("deberta_fast::fused_forward",),
    "attention, backward": ("deberta_fast::fused_backward",),
    "products": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"),
}
REST = "everything else"


class Case(NamedTuple):
    variant: str
    size: str
    length: int
    dropout: float
    threads: int

    def predicted(self) -> int:
        return predicted_bytes(self.variant, self.size, self.length, ITEMSIZE)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    timing.provenance()  # before any file is written
    if options.profile:
        return profiled(options)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the processes that measure; glibc's default changes as it runs
    taken: dict[Case, list[Measured] | str] = {}
    for length in sorted(options.lengths):
        cases = [Case(name, options.size, length, options.dropout, options.threads) for name in options.variants]
        for case in rounds(cases, taken, options.seconds):
            taken[case] = _with_one_more(taken.get(case), case)
            rows = [row(case, taken) for case in taken]
            timing.save(options.name, rows, options.out, notes(options), summary(rows))
            tqdm.write("  ".join(timing.cell(value) for value in row(case, taken).values()))
    print(summary(rows))


def rounds(cases: list[Case], taken: dict[Case, list[Measured] | str], seconds: float) -> Iterator[Case]:
    """Yields the cases of a length in turn, while another round fits into ``seconds``; failed ones only once."""
    with tqdm(total=len(cases), unit="step", desc=f"{cases[0].length} tokens", leave=False) as progress:
        spent, number = 0.0, 0
        while number == 0 or (number < MOST_ROUNDS and spent * (number + 1) / number <= seconds):
            left = [case for case in cases if not isinstance(taken.get(case), str)]
            progress.total = progress.n + len(left)
            for case in left:
                progress.set_postfix_str(case.variant)
                yield case
                progress.update()
                if not isinstance(taken[case], str):
                    spent += taken[case][-1].seconds
            number += 1
            if spent == 0:
                return


def _with_one_more(before: list[Measured] | None, case: Case) -> list[Measured] | str:
    """Measures a case once more. Returns all its measurements, or why there is none."""
    needed, free = case.predicted() * VARIANTS[case.variant].processes, timing.free_memory()
    if needed > 0.8 * free:
        return f"not run: needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    try:
        return [*(before or ()), measured(case)]
    except Exception as error:
        words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return "not run: " + words[:90].replace("|", "/")


def measured(case: Case) -> Measured:
    """Measures one step in fresh processes; the largest figures of those that share the text."""
    count = VARIANTS[case.variant].processes
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(count, mp_context=get_context("spawn")) as processes,
    ):
        works = [processes.submit(step_of, case, rank, f"{folder}/meeting") for rank in range(count)]
        found = [work.result() for work in works]
    kept = [each.kept for each in found if each.kept is not None]
    return found[0]._replace(
        seconds=max(each.seconds for each in found),
        kept=max(kept) if kept else None,
        peak=max(each.peak for each in found),
    )


def step_of(case: Case, rank: int, meeting: str) -> Measured:
    """Measures one step in this process, one of those that meet by the file ``meeting``."""
    torch.set_num_threads(case.threads)
    with group_of(VARIANTS[case.variant].processes, rank, meeting):
        model = original(case.size, case.dropout, torch.float32, "cpu")
        return Step(case.variant, model, "cpu").measure(case.length)


@contextlib.contextmanager
def group_of(count: int, rank: int, meeting: str) -> Iterator[None]:
    if count == 1:
        yield
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(hours=1)
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()  # if this process fails, the others do not wait for it


def row(case: Case, taken: dict[Case, list[Measured] | str]) -> dict:
    head = {"length": case.length, "variant": case.variant, "predicted MiB": case.predicted() / timing.MIB}
    mine = taken[case]
    if isinstance(mine, str):
        return head | {"error": mine}
    first = next(x for other, x in taken.items() if other.length == case.length and not isinstance(x, str))
    least = least_bytes(case.size, case.length, ITEMSIZE) / VARIANTS[case.variant].processes
    found = columns(mine, case.length, least)
    if case.dropout == 0:
        found["difference"] = difference(mine[-1], first[0])
        if not found["difference"] < ALLOWED:
            found = {"error": f"differs by {found['difference']:.1e} in loss or gradients from what it should be"}
    return head | found


def summary(rows: list[dict]) -> str:
    """Tables of time and memory, a line for each length, and how memory grows over the two longest lengths."""
    parts = []
    for column in ("s/1000 tokens", "peak MiB", "kept/least"):
        cell = lambda row, column=column: timing.cell(row[column]) if row.get(column) is not None else "not run"
        table = timing.pivot(rows, ("length",), lambda row: row["variant"], cell)
        parts += [f"## {column}", table]
    return "\n\n".join([*parts, *growth(rows)])


def growth(rows: list[dict]) -> list[str]:
    lengths = sorted({row["length"] for row in rows})
    peaks = {(row["variant"], row["length"]): row["peak MiB"] for row in rows if "peak MiB" in row}
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        short, long = (peaks.get((name, length)) for length in (lengths[-2:] if len(lengths) > 1 else (0, 0)))
        if short and long:
            lines.append({"variant": name, "peak ratio": long / short, "tokens ratio": lengths[-1] / lengths[-2]})
    return [f"## Peak memory, {lengths[-1]} to {lengths[-2]} tokens", timing.markdown(lines)] if lines else []


def notes(options: argparse.Namespace) -> str:
    size = SIZES[options.size]
    peak = predicted_bytes("checkpointed", options.size, 1, ITEMSIZE) / least_bytes(options.size, 1, ITEMSIZE)
    about = "".join(f" {name}: {VARIANTS[name].about}." for name in options.variants)
    threads = f"{options.threads} {'thread' if options.threads == 1 else 'threads'} a process"
    return (
        f"DeBERTa v3 of {size.num_hidden_layers} layers, {size.hidden_size} wide, {size.num_attention_heads} heads, "
        f"feed-forward {size.intermediate_size}, 256 buckets, a label for each token; one text, float32, dropout "
        f"{options.dropout:g}, {threads}; forward and backward without optimizer. s: the median of as many steps. kept "
        "MiB: resident memory after forward above that of the model, its gradients and a short step; peak MiB: the "
        "peak of forward and backward. predicted MiB: that peak, by counting the tensors that must be there "
        "(bench/variants/long.py); what does not fit by this count is not run. least: the input of each layer and the "
        f"last output, which checkpointing needs. Target of kept/least, checkpointed: at most {MOST_OF_LEAST}; "
        "predicted 1.0, and what the kernels keep as scratch, at most 64 MiB a process. peak/least: "
        f"predicted {peak:.1f}, because one layer at a time is computed again, and its feed-forward alone takes "
        f"{3 * size.intermediate_size / size.hidden_size:g} hidden states. Target of memory when the length doubles: "
        f"at most {MOST_RATIO} times; predicted 2.0. difference: of the loss and the norms of the gradients of word "
        f"embeddings and positions from those of the length's first row, relative.{about}"
    )


def profiled(options: argparse.Namespace) -> None:
    """Profiles a native step, and saves the time of its parts at both lengths."""
    torch.set_num_threads(options.threads)
    step = Step("native", original(options.size, options.dropout, torch.float32, "cpu"), "cpu")
    step.loss(SHORT).backward()
    rows: list[dict] = []
    for length in tqdm((options.profile // 4, options.profile), unit="step", leave=False):
        rows += parts_of(step, length)
        timing.save("long-profile", rows, options.out, PROFILE)
    print(timing.markdown(rows))


PROFILE = (
    "A native training step as in the table long; torch.profiler, processor time of each operator without those that "
    "it calls. products: those of linear layers. Predicted: only attention's time per token grows with the length."
)


def parts_of(step: Step, length: int) -> list[dict]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        step.loss(length).backward()
    part = {name: part for part, names in PARTS.items() for name in names}
    spent = dict.fromkeys((*PARTS, REST), 0.0)
    for event in found.key_averages():
        spent[part.get(event.key, REST)] += event.self_cpu_time_total / 1e6
    whole = sum(spent.values())
    return [
        {"length": length, "part": name, "s": seconds, "share": seconds / whole, "us/token": 1e6 * seconds / length}
        for name, seconds in spent.items()
    ]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = timing.parser("long", __doc__)
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L", help="tokens of the text")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--size", choices=SIZES, default="2-layers", help="of the model")
    parser.add_argument("--name", default="long", help="of the results")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P")
    parser.add_argument("--threads", type=timing.positive, default=1, metavar="N", help="of each process")
    parser.add_argument("--profile", type=timing.positive, metavar="L", help="profile a native step instead")
    whole = dict(lengths=LENGTHS, variants=list(VARIANTS), seconds=120.0)
    quick = dict(lengths=[1024, 2048], variants=["hf", "patched", "native", "checkpointed"])
    return timing.complete(parser.parse_args(arguments), whole, quick)


if __name__ == "__main__":
    main()
