"""Training steps on one long text on a GPU, time and peak memory by length: ``python -m bench.long_gpu``.

``variants.long`` describes the variants; those that need several processes are left out. Memory is what torch allocates
(torch.cuda.max_memory_allocated). Results go to bench/results/<GPU>/, after every row.
"""

import argparse

import torch

from . import device as devices
from . import timing
from .device import Device, Table
from .long import summary
from .variants.long import SIZES, VARIANTS, Measured, Step, columns, difference, least_bytes, original, predicted_bytes

LENGTHS = (4096, 8192, 16384, 32768, 65536)
STEPS = 3
# Allowed relative differences of losses and norms of gradients, by dtype
ALLOWED = {"bfloat16": 0.05, "float16": 0.05, "float32": 1e-3}
ALONE = [name for name, variant in VARIANTS.items() if variant.processes == 1]
LEGEND = (
    "DeBERTa v3, a label for each token; one text, dropout off; forward and backward without optimizer. s: the "
    f"median of {STEPS} steps after one that compiles. kept MiB, peak MiB: what torch has allocated after forward and "
    "at most, above the model and its gradients. predicted MiB: that peak, by counting the tensors that must be there "
    "(bench/variants/long.py). least: the input of each layer and the last output, which checkpointing needs. "
    "difference: of the loss and the norms of gradients from those of the length's first row, relative."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device, dtype = Device(options.device), getattr(torch, options.dtype)
    about = "".join(f" {name}: {VARIANTS[name].about}." for name in options.variants)
    table = Table("long", options.out, f"{options.size}, {options.dtype}. {LEGEND}{about}", summary)
    model = original(options.size, 0.0, dtype, options.device)
    cases = ((length, name) for length in options.lengths for name in options.variants)
    first: dict[int, Measured] = {}
    for length, name in timing.in_time(options.seconds, cases, "{0[1]}, {0[0]} tokens".format):
        needed = predicted_bytes(name, options.size, length, dtype.itemsize)
        row = {"length": length, "variant": name, "predicted MiB": needed / timing.MIB}
        try:
            _refuse_what_does_not_fit(needed, device)
            found = measured(Step(name, model, options.device), length, device)
            row["difference"] = difference(found[-1], first.setdefault(length, found[-1]))
            if not row["difference"] < ALLOWED[options.dtype]:
                raise ArithmeticError(f"differs by {row['difference']:.2g} from what it should be")
            table.add(row | columns(found, length, least_bytes(options.size, length, dtype.itemsize)))
        except Exception as error:
            table.add(row | {"error": f"not run: {device.failure(error).error}"})


def measured(step: Step, length: int, device: Device) -> list[Measured]:
    found = [step.measure(length) for _ in range(min(1 + STEPS, device.most))]
    return found[1:] or found


def _refuse_what_does_not_fit(needed: int, device: Device) -> None:
    """Raises MemoryError: a call that runs out of memory would leave a fragmented cache to the next one."""
    free = torch.cuda.mem_get_info(device.name)[0] if device.is_gpu else timing.free_memory()
    if needed > 0.8 * free:
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = devices.parser("long_gpu", __doc__)
    parser.set_defaults(lengths=LENGTHS)
    parser.add_argument("--variants", choices=ALONE, nargs="+", default=ALONE, metavar="NAME", help=", ".join(ALONE))
    parser.add_argument("--size", choices=SIZES, default="v3-base", help="of the model")
    parser.add_argument("--dtype", choices=ALLOWED, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=200.0, help="no row begins later than this")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
