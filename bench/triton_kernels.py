"""Where the Triton backend spends its time on a GPU, and what other settings give: ``python -m bench.triton_kernels``.

    kernels   each kernel of forward and backward, all its launches of a call together
    bands     whole calls under other limits for the bands (``plan.BAND_BYTES``)
    settings  whole calls with other distances between the rows of a band's programs, other numbers of shares in the
              tables' gradients
    tiles     each kernel under other tiles, warps and stages, at the usual settings; the most telling ones first

16384 tokens, 12 heads of 64, v3's tables, bfloat16. Results go to bench/results/ and the GPU's name, after every row.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deberta_fast.op import backends
from deberta_fast.op.backends import triton as backend
from deberta_fast.op.backends.triton import configuration, plan
from deberta_fast.op.backends.triton.configuration import Tiles

from . import timing
from .device import Call, Device, Table
from .variants.operator import Workload, asked

PARTS = ("kernels", "bands", "settings", "tiles")
SECONDS = 0.05  # for each variant
BAND_MIB = (128, 24, 32, 40, 160, 64, 256)
STEPS = (1, 2, 4, 8)
SHARES = (1, 2, 4)
# Rows, columns, warps, stages: the default on sm_90, then other stages and warps, then other shapes. Those with 128
# rows or columns have all kernels compiled anew.
TILES = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2)],
    "backward_key": [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)],
    "backward_query": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
    "bands": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2)],
    "backward_tables": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)],
}
OF_TILES = {"bands": ("band_scores", "backward_rows"), "backward_tables": ("backward_by_distance",)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], metavar="L")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--most", type=int, default=6, metavar="N", help="tiles of a kernel, limits of the bands")
    parser.add_argument("--kernels", choices=TILES, nargs="+", default=list(TILES), help="whose tiles")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=timing.results_folder(), metavar="DIR", help="folder of results")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    device = Device(options.device)
    timing.provenance()
    for part in options.parts or PARTS:
        table = Table(f"triton-{part}", options.out, __doc__.split("\n\n")[1])
        for length in options.lengths:
            work = Work(options.device, length, max(1, options.tokens // length), options.heads)
            for row in globals()[part](work, device, options):
                table.add({"length": length, "batch": work.batch} | row)


class Work:
    """One call of the operator."""

    def __init__(self, device: str, length: int, batch: int, heads: int):
        self.batch = batch
        workload = Workload(length, batch, heads, torch.bfloat16, device, dropout_p=0.0, padding=0.0)
        for x in (*workload.qkv, *workload.tables):
            x.requires_grad_(False)  # the backend is called as autograd calls it
        self.inputs, self.gradient = asked(workload), workload.gradient
        self.output, self.lse = backends.forward(self.inputs, "triton")

    def forward(self) -> object:
        return backends.forward(self.inputs, "triton")

    def backward(self) -> object:
        return backends.backward(self.inputs, "triton", self.output, self.lse, self.gradient, None)

    def target(self) -> configuration.Target:
        query = self.inputs.query
        return configuration.target_of(query.device, plan.block_d_of(self.inputs), query.element_size())

    def launches(self) -> dict[str, list[plan.Launch]]:
        """By kernel and pass; run in order they make a call."""
        inputs, found = self.inputs, {}
        chosen = configuration.choose(self.target())
        precision = backend._precision(inputs)
        grads = [torch.empty_like(x) for x in inputs[:5]]
        passes = {
            "forward": plan.Plan(inputs, chosen, precision).forward(self.output, self.lse),
            "backward": plan.Plan(inputs, chosen, precision).backward(
                self.output, self.lse, self.gradient, torch.zeros_like(self.lse), grads
            ),
        }
        for name, launches in passes.items():
            for launch in launches:
                launch.run()
                found.setdefault(f"{name}: {launch.kernel.__name__}", []).append(launch)
        return found


def kernels(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    found = work.launches()
    build = {name: lambda launches=launches: Call(lambda: _run(launches)) for name, launches in found.items()}
    build |= {"forward": lambda: Call(work.forward), "backward": lambda: Call(work.backward)}
    for name, taken in device.measure(build, SECONDS).items():
        count = len(found.get(name, ())) or None
        yield {"kernel": name, "launches": count, **_ms(taken)}


def bands(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    trials = [("BAND_BYTES", mib << 20, f"bands {mib} MiB") for mib in BAND_MIB[: options.most]]
    yield from _whole_calls(work, device, trials)


def settings(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    trials = [("step_of", lambda length, step=step: step, f"step {step}") for step in STEPS]
    yield from _whole_calls(work, device, trials + [("SHARES", shares, f"shares {shares}") for shares in SHARES])


def _whole_calls(work: Work, device: Device, trials: list[tuple[str, object, str]]) -> Iterator[dict]:
    for attribute, value, label in trials:
        with _set(plan, attribute, value):
            build = {"forward": lambda: Call(work.forward), "backward": lambda: Call(work.backward)}
            for name, taken in device.measure(build, SECONDS).items():
                yield {"setting": label, "pass": name, **_ms(taken)}


def tiles(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    target = work.target()
    usual = configuration.choose(target)
    shapes = {kernel: TILES[kernel][: options.most] for kernel in options.kernels}
    for rank in range(max(map(len, shapes.values()))):
        for kernel, shape in ((kernel, mine[rank]) for kernel, mine in shapes.items() if rank < len(mine)):
            trial = usual._replace(**{kernel: Tiles(*shape)})
            trial = trial._replace(alignment=max(64, *(max(t.rows, t.columns) for t in trial[1:])))
            configuration.set_configuration(target, trial)
            for row in _one_kernel(work, device, kernel):
                yield {"kernel": kernel, "tiles": "x".join(map(str, shape)), "alignment": trial.alignment, **row}
    configuration.set_configuration(target, None)


def _one_kernel(work: Work, device: Device, kernel: str) -> Iterator[dict]:
    try:
        found = work.launches()
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}".splitlines()[0][:90]}
        return
    names = OF_TILES.get(kernel, (kernel,))
    build = {
        name: lambda launches=launches: Call(lambda: _run(launches))
        for name, launches in found.items()
        if name.endswith(names)
    }
    for name, taken in device.measure(build, SECONDS).items():
        yield {"pass": name, **_ms(taken)}


def _run(launches: list[plan.Launch]) -> None:
    for launch in launches:
        launch.run()


def _ms(taken) -> dict:
    return {"ms": taken.seconds and 1000 * taken.seconds, "error": taken.error}


@contextmanager
def _set(module: object, attribute: str, value: object) -> Iterator[None]:
    before: Callable = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, before)


if __name__ == "__main__":
    main()
