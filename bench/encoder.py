"""Whole encoders, DeBERTa's, BERT's and ModernBERT's, on the CPU or a GPU: ``python -m bench.encoder``.

``variants.model`` describes the variants. Each length is measured with a batch of variable lengths, a full one and, in
the forward pass, one sequence. Compiled variants take minutes per row, so they run only if they are named:

    python -m bench.encoder --name encoder-compiled --lengths 512 128 --variants eager eager+compile native \\
        native-packed native+compile bert bert+compile modernbert modernbert+compile

Results go to bench/results/cpu/ or the GPU's folder, after every group of rows.
"""

import argparse
import functools
import itertools
import warnings
from collections.abc import Callable

import torch

from . import timing
from .device import Call, Device, Table, summary_of
from .variants import described, relative_difference
from .variants import model as variants
from .variants.model import VARIANTS, Batch, Case, Encoders

PASSES = ("forward", "forward+backward")
SHAPES = ("variable", "full", "one")  # a batch of variable lengths, a full one, one sequence
# Options that are not given, by kind of device. float32_lengths are those of float32 where --dtypes does not name it.
DEFAULTS = {
    "cuda": dict(
        lengths=(512, 8192, 4096, 2048, 128),  # The most wanted come first, because time may run out.
        float32_lengths=(512,),
        default_dtypes=("bfloat16", "float32"),
        tokens=16384,
        most_sequences=1 << 10,
        seconds=0.4,
        limit=180.0,
    ),
    "cpu": dict(
        lengths=(128, 512, 2048),
        float32_lengths=(128, 512, 2048),
        default_dtypes=("float32", "bfloat16"),
        tokens=2048,
        most_sequences=8,
        seconds=5.0,
        limit=2400.0,
    ),
}
FEWEST = 2  # calls per variant
# Allowed relative differences of the states. After 12 or 24 layers in bfloat16, rounding makes a difference of 0.01, a
# missing position term one of 0.04 to 0.06.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}
GRADIENTS_TOLERANCE = 5  # factor for gradients, where rounding makes 0.04, a missing term 0.9
DENSE = ("eager", "eager+compile", "onnxruntime")  # variants that hold all scores at once
LEGEND = (
    f"Base models with embeddings, {variants.VOCABULARY} words, random weights: token ids and mask in, last states "
    "out. variable: lengths spread evenly from {:.0f} to 100 % of the length, padded at the right; tokens, tokens/s: "
    "of the valid ones. ms: medians of interleaved calls, with the host's time, without the first calls (which "
    "compile). forward: torch.inference_mode. forward+backward: a training step without optimizer, from random "
    "gradients of the valid tokens to those of all weights. Dropout is off. x eager: times as fast as Hugging Face's "
    "DebertaV2Model. x bert, x modernbert, x onnxruntime: as the fastest BERT and ModernBERT and as onnxruntime in the "
    "same group; BERT has DeBERTa's width and depth. peak MiB: what a call needs above the weights, including their "
    "gradients. difference: relative, in norm, of the valid tokens' states from eager's, bert's or modernbert's, or "
    "those of the first variant of that model that ran. Variants that differ by "
    "more than {} are not timed, nor those whose gradients of {} differ by more than {} times that after a backward "
    "pass; int8 is not compared."
).format(
    100 * variants.SHORTEST,
    ", ".join(f"{value:g} ({name})" for name, value in TOLERANCE.items()),
    " and ".join(variants.GRADIENTS),
    GRADIENTS_TOLERANCE,
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    torch.set_num_threads(max(options.threads))
    notes = LEGEND + described(VARIANTS, options.variants) + timing.installed("onnxruntime", "flash-attn")
    shape = ("dtype", "threads", "batch", "length", "lengths")
    summaries = [
        summary_of(value, ratio, group=("model", "pass"), line=shape)
        for value, ratio in (("ms", "x eager"), ("tokens/s", "x bert"))
    ]
    summarise = lambda rows: "\n\n".join(summary(rows) for summary in summaries)
    table = Table(options.name, options.out, notes, summarise)
    encoders = None
    saying = "{0.passes} of {0.batch} x {0.length}, {0.dtype}"
    for case in timing.in_time(options.limit, _cases(options), saying.format):
        torch.set_num_threads(case.threads)
        dtype = getattr(torch, case.dtype)
        if encoders is None or (encoders.size, encoders.dtype) != (case.model, dtype):
            encoders = None  # frees the old ones before new ones are made
            encoders = Encoders(case.model, dtype, options.device)
        for row in measure(case, encoders, device, options):
            table.add(row)


def measure(case: Case, encoders: Encoders, device: Device, options: argparse.Namespace) -> list[dict]:
    """Measures a row for each variant."""
    torch.compiler.reset()  # Torch runs a function eagerly after a number of compilations, also for other shapes.
    batch = Batch(case.batch, case.length, case.variable, options.device)
    calls, references, differences, peaks = {}, {}, {}, {}

    def build(name: str) -> Call:
        if name in DENSE and not device.is_gpu:
            _refuse_what_does_not_fit(case)
        call = variants.build_call(encoders, name, case.passes, batch)
        differences[name] = difference(case, name, encoders, batch.packed(call()), references)
        calls[name] = call
        return Call(call)

    suitable = [name for name in options.variants if VARIANTS[name].suits(case, device.is_gpu)]
    builds = {name: functools.partial(build, name) for name in suitable}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exports, compilers and quantization warn
        taken = device.measure(builds, options.seconds, queued=False, fewest=FEWEST, warmup=0)
        seconds = {name: outcome.seconds for name, outcome in taken.items() if outcome.seconds}
        errors = {name: outcome.error for name, outcome in taken.items()}
        for name in seconds if device.is_gpu or options.memory else ():
            try:
                peaks[name] = _peak(case, name, calls[name], encoders, device)
            except Exception as error:
                errors[name] = device.failure(error).error
    neighbours = {
        "x eager": seconds.get("eager"),
        "x bert": _fastest("bert", seconds),
        "x modernbert": _fastest("modernbert", seconds),
        "x onnxruntime": seconds.get("onnxruntime"),
    }
    group = {"model": case.model, "pass": case.passes, "dtype": case.dtype}
    group |= {"threads": None if device.is_gpu else case.threads, "batch": case.batch, "length": case.length}
    group |= {"lengths": "variable" if case.variable else "full", "tokens": batch.tokens}
    rows = []
    for name in builds:
        row = group | {"variant": name}
        if mine := seconds.get(name):
            row |= {"ms": 1000 * mine, "tokens/s": batch.tokens / mine}
            row |= {head: other / mine for head, other in neighbours.items() if other}
        row["peak MiB"] = peaks[name] / timing.MIB if name in peaks else None
        row |= {"calls": taken[name].runs or None, "difference": differences.get(name)}
        rows.append(row | {"error": errors[name] and f"not run: {errors[name]}"})
    return rows


def _fastest(family: str, seconds: dict[str, float]) -> float | None:
    return min((mine for name, mine in seconds.items() if variants.family(name) == family), default=None)


def _peak(case: Case, name: str, call: Callable[[], object], encoders: Encoders, device: Device) -> int:
    if not device.is_gpu:
        return timing.peak_memory(variants.measured, case, name, device.name)[0]
    encoders.drop_gradients()
    return timing.peak_of_call(call, device.name)


def difference(case: Case, name: str, encoders: Encoders, states: torch.Tensor, references: dict) -> float | None:
    """Compares a variant with the first one of its kind, whose results ``references`` keeps.

    Args:
        states: (T, hidden_size), of the valid tokens.

    Raises:
        ArithmeticError: they differ by more than rounding.
    """
    if name == "int8":
        return None
    kind = variants.family(name)
    results = [states]
    if case.passes == "forward+backward" and kind == "deberta":
        results += encoders.gradients()
    if kind not in references:
        references[kind] = results
        return 0.0
    found = [relative_difference(got, want) for got, want in zip(results, references[kind], strict=True)]
    allowed = [TOLERANCE[case.dtype], *(GRADIENTS_TOLERANCE * TOLERANCE[case.dtype] for _ in results[1:])]
    if not all(x < most for x, most in zip(found, allowed)):
        raise ArithmeticError(f"differs by {', '.join(f'{x:.2g}' for x in found)} from what it should be")
    return found[0]


def _refuse_what_does_not_fit(case: Case) -> None:
    """Raises MemoryError, because Linux would kill the process."""
    needed, free = case.eager_bytes(), timing.free_memory()
    if needed > 0.8 * free:
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB for dense scores, {free / 2**30:.0f} are free")


def _cases(options: argparse.Namespace) -> list[Case]:
    """Lists the cases in the order in which they are measured."""
    found = []
    for model, dtype in itertools.product(options.models, options.dtypes or options.default_dtypes):
        lengths = options.float32_lengths if dtype == "float32" and not options.dtypes else options.lengths
        rest = options.passes, options.threads, lengths, options.shapes
        for passes, threads, length, shape in itertools.product(*rest):
            batch = 1 if shape == "one" else max(2, min(options.tokens // length, options.most_sequences))
            if shape != "one" or passes == "forward":
                found.append(Case(model, dtype, passes, threads, batch, length, shape == "variable"))
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    uncompiled = [name for name in VARIANTS if "compile" not in name]
    parser = timing.parser("encoder", __doc__)
    parser.add_argument("--models", choices=variants.SIZES, nargs="+", default=["v3-base"])
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L", help="in this order")
    parser.add_argument("--passes", choices=PASSES, nargs="+")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=SHAPES, help="of batches, in this order")
    parser.add_argument("--dtypes", choices=TOLERANCE, nargs="+", help="by default both; on a GPU, float32 at 512")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", metavar="NAME")
    parser.add_argument("--threads", type=timing.positive, nargs="+", default=[torch.get_num_threads()], metavar="N")
    parser.add_argument("--tokens", type=timing.positive, metavar="N", help="in a batch, padding included")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory on the CPU too, each in its own process"
    )
    parser.add_argument("--limit", type=float, metavar="S", help="no group of rows begins later than this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="encoder-models", help="name of the table")
    options = parser.parse_args(arguments)
    vars(options).update(default_dtypes=None, most_sequences=None, float32_lengths=options.lengths)
    whole = DEFAULTS[torch.device(options.device).type] | dict(passes=PASSES, variants=uncompiled)
    quick = dict(lengths=[128], float32_lengths=[128], passes=["forward"], default_dtypes=["float32"])
    quick["variants"] = [name for name in uncompiled if name != "onnxruntime"]  # its export takes a minute
    return timing.complete(options, whole | {"out": timing.results_folder()}, quick)


if __name__ == "__main__":
    main()
