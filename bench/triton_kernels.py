"""Where the Triton backend spends its time on a GPU, and how other settings do: ``python -m bench.triton_kernels``.

    kernels   each kernel of forward and backward, summed over its launches in a call
    bands     whole calls with other limits of the workspace of the bands (``plan.limit_band_bytes``)
    settings  whole calls with other distances between the rows of a band's programs, and other numbers of shares in
              the tables' gradients
    tiles     each kernel with other tiles, warps and stages, at the usual settings; the most telling ones first

16384 tokens, 12 heads of 64, v3's tables, bfloat16. Results go to bench/results/<GPU>, after every row.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from deberta_fast.op import backends
from deberta_fast.op.backends import triton as backend
from deberta_fast.op.backends.triton import configuration, plan
from deberta_fast.op.backends.triton.configuration import Tiles
from deberta_fast.op.backends.triton.launch import specialisation

from . import device as devices
from . import timing
from .device import Call, Device, Table
from .variants.operator import Workload, asked

PARTS = ("kernels", "bands", "settings", "tiles")
SECONDS = 0.05  # for each variant
BAND_MIB = (32, 24, 40, 128, 160, 64, 256)
STEPS = (1, 2, 4, 8)
SHARES = (1, 2, 4)
# Rows, columns, warps, stages: the default on sm_90, then other stages and warps, then other shapes. Triton compiles
# all kernels anew for those with 128 rows or columns.
TILES = {
    "forward": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2)],
    "backward_key": [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)],
    "backward_query": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
    "bands": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2)],
    "backward_tables": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)],
}
OF_TILES = {"bands": ("band_scores", "backward_rows"), "backward_tables": ("backward_by_distance",)}


def main(arguments: list[str] | None = None) -> None:
    parser = devices.parser("triton_kernels", __doc__)
    parser.set_defaults(lengths=[512, 2048, 8192])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--heads", type=int, default=12, metavar="H")
    parser.add_argument("--most", type=int, default=6, metavar="N", help="tiles of a kernel, limits of the bands")
    parser.add_argument("--kernels", choices=TILES, nargs="+", default=list(TILES), help="whose tiles")
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
    """The inputs of one call of the operator, with the results of its forward pass."""

    def __init__(self, device: str, length: int, batch: int, heads: int):
        self.batch = batch
        workload = Workload(length, batch, heads, device=device)
        for x in (*workload.qkv, *workload.tables):
            x.requires_grad_(False)  # the backend is called as autograd calls it
        self.inputs, self.gradient = asked(workload), workload.gradient
        self.output, self.lse = backends.forward(self.inputs, "triton")

    def forward(self) -> object:
        return backends.forward(self.inputs, "triton")

    def backward(self) -> object:
        return backends.backward(self.inputs, "triton", self.output, self.lse, self.gradient, None)

    def target(self) -> configuration.Target:
        """Returns what the backend chooses its configuration by."""
        query = self.inputs.query
        return configuration.target_of(query.device, plan.block_d_of(self.inputs), query.element_size())

    def launches(self) -> dict[str, list[Callable[[], None]]]:
        """Returns the launches by pass and kernel; in order they make a call."""
        grads = [torch.empty_like(x) for x in self.inputs[:5]]
        settings = plan.settings(configuration.choose(self.target()), backend._precision(self.inputs))
        results = self.output, self.lse
        passes = {"forward": results, "backward": (*results, self.gradient, torch.zeros_like(self.lse), *grads)}
        found = {}
        for name, results in passes.items():
            given = plan.given_tensors(self.inputs, *results)
            planned = plan.plan_of(self.inputs, given, settings)
            tensors = planned.tensors(given)
            special = specialisation(tensors)
            for launch in planned.launches:
                launch.run(tensors, special)
                run = functools.partial(launch.run, tensors, special)
                found.setdefault(f"{name}: {launch.kernel.__name__}", []).append(run)
        return found


def kernels(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    found = work.launches()
    calls = {name: Call(lambda launches=launches: _run(launches)) for name, launches in found.items()}
    calls |= {"forward": Call(work.forward), "backward": Call(work.backward)}
    for name, columns in _measure(device, calls):
        yield {"kernel": name, "launches": len(found.get(name, ())) or None} | columns


def bands(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    for mib in BAND_MIB[: options.most]:
        plan.limit_band_bytes(mib << 20)
        yield from _whole_calls(work, device, f"bands {mib} MiB")
    plan.limit_band_bytes()


def settings(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    trials = [("step_of", lambda length, step=step: step, f"step {step}") for step in STEPS]
    for attribute, value, label in trials + [("SHARES", shares, f"shares {shares}") for shares in SHARES]:
        with _set(plan, attribute, value):
            yield from _whole_calls(work, device, label)


def _whole_calls(work: Work, device: Device, label: str) -> Iterator[dict]:
    for name, columns in _measure(device, {"forward": Call(work.forward), "backward": Call(work.backward)}):
        yield {"setting": label, "pass": name} | columns


def tiles(work: Work, device: Device, options: argparse.Namespace) -> Iterator[dict]:
    target = work.target()
    usual = configuration.choose(target)
    shapes = {kernel: TILES[kernel][: options.most] for kernel in options.kernels}
    for rank in range(max(map(len, shapes.values()))):
        for kernel, shape in ((kernel, mine[rank]) for kernel, mine in shapes.items() if rank < len(mine)):
            trial = usual._replace(**{kernel: Tiles(*shape)})
            trial = trial._replace(alignment=max(64, *(max(t.rows, t.columns) for t in trial[1:])))
            configuration.set_configuration(target, trial)
            for row in _one_kernel(work, device, OF_TILES.get(kernel, (kernel,))):
                yield {"kernel": kernel, "tiles": "x".join(map(str, shape)), "alignment": trial.alignment} | row
    configuration.set_configuration(target, None)


def _one_kernel(work: Work, device: Device, names: tuple[str, ...]) -> Iterator[dict]:
    try:
        found = {name: launches for name, launches in work.launches().items() if name.endswith(names)}
    except Exception as error:
        yield {"error": device.failure(error).error}
        return
    calls = {name: Call(lambda launches=launches: _run(launches)) for name, launches in found.items()}
    for name, columns in _measure(device, calls):
        yield {"pass": name} | columns


def _measure(device: Device, calls: dict[str, Call]) -> Iterator[tuple[str, dict]]:
    build = {name: lambda call=call: call for name, call in calls.items()}
    for name, taken in device.measure(build, SECONDS).items():
        yield name, taken.columns()


def _run(launches: list[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


@contextmanager
def _set(module: object, attribute: str, value: object) -> Iterator[None]:
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, before)


if __name__ == "__main__":
    main()
