"""``check``: reports versions, correctness and speed of the backends on this machine, and which one is the default.

A bug report should contain this report.
"""

import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .op import backends, selection
from .op.backends import cpu, cuda, extension, triton
from .op.problems import COMMON, Kind, call_of, problems

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VERSIONS = ("deberta_fast", "torch", "Triton", "Python")
SDPA = "SDPA"  # torch's attention without position terms, with which the times are compared


class Row(NamedTuple):
    """One backend in one dtype.

    Attributes:
        name: the backend; on a CPU with its instruction set.
        problems, share, where, failure, reasons: the fields of ``proof.Verdict``.
        milliseconds: by shape and pass ("short forward").
        times_sdpa: the same as multiples of the times of SDPA.
    """

    dtype: str
    name: str
    fused: bool
    passed: bool = False
    problems: int = 0
    share: float = 0.0
    where: str = ""
    failure: str | None = None
    reasons: tuple[str, ...] = ()
    milliseconds: dict[str, float] = {}
    times_sdpa: dict[str, float] = {}


class Report(NamedTuple):
    """The findings of ``check``, which print as a table.

    Attributes:
        machine: versions, device, kernels.
        asked: number of problems per backend.
        shapes: batch and length of "short" and "long".
        rows: one for each dtype and backend, and one for SDPA.
        taken: by dtype, the backend that ``backend=None`` selects, and why.
        passed: whether a fused backend passed in every dtype.
    """

    machine: dict[str, str]
    device: str
    head_size: int
    asked: int
    shapes: dict[str, tuple[int, int]]
    rows: list[Row]
    taken: dict[str, str]
    passed: bool

    def as_dict(self) -> dict:
        """Returns the report as a dict that JSON can hold."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def check(
    device: torch.device | str | None = None,
    *,
    head_size: int = 64,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    quick: bool = False,
) -> Report:
    """Compares every backend with the reference on a device, and times it. On an accelerator, the result also decides
    anew which backend ``backend=None`` selects.

    Args:
        device: by default the accelerator if there is one, else the CPU. On a CPU every instruction set is compared.
        head_size, dtypes: those of the calls: dense and packed, with key masks, with dropout, with one and with both
            position terms.
        quick: makes only dense calls with masks, and measures no times.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: torch cannot use the device.
    """
    if head_size < 1:
        raise ValueError(f"head_size must be at least 1, got {head_size}")
    if wrong := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"dtypes must be among {', '.join(map(str, DTYPES))}, got {wrong[0]}")
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    place = usable_device(device)
    return selection.in_a_thread(lambda: _check(place, head_size, dtypes, COMMON[1:2] if quick else COMMON, not quick))


def usable_device(device: torch.device | str) -> torch.device:
    """Returns the device with its index. Raises RuntimeError if torch cannot use it."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without this kind of device
        raise RuntimeError(f"torch cannot use device {str(device)!r}: {str(error).strip()}") from None


def _check(device, head_size: int, dtypes, kinds: tuple[Kind, ...], timed: bool) -> Report:
    from .op import speed

    rows, taken = [], {}
    selection.forget(device)
    for dtype in dtypes:
        place = selection.Place(device, dtype, head_size)
        verdicts = _verdicts(place, kinds)
        times = _times(place, [label for label, verdict in verdicts.items() if verdict.passed]) if timed else {}
        for label, verdict in verdicts.items():
            own = times.get(label, {})
            multiples = {key: own[key] / times[SDPA][key] for key in own}
            judged: Any = (label != "eager", verdict.passed, *verdict, own, multiples)
            rows.append(Row(_name(dtype), label, *judged))
        if times:
            rows.append(Row(_name(dtype), SDPA, False, milliseconds=times[SDPA]))
        taken[_name(dtype)] = _taken(place, kinds)
    passed = all(any(row.fused and row.passed for row in rows if row.dtype == _name(dtype)) for dtype in dtypes)
    asked = sum(len(problems(kind)) for kind in kinds)
    return Report(_machine(device), str(device), head_size, asked, speed.SHAPES, rows, taken, passed)


def _verdicts(place: selection.Place, kinds: tuple[Kind, ...]) -> dict:
    """Returns verdicts by backend. On a CPU, the cpu backend has one for each instruction set."""
    from .op import proof

    asked = [problem for kind in kinds for problem in problems(kind)]
    prove = lambda *names: proof.prove(names, asked, *place[1:], place.device)
    if not selection.is_checked(place.device):
        found = {}
        for instructions in cpu.instruction_sets(place.dtype):
            with cpu.using(instructions):
                found[f"cpu ({instructions})"] = prove("cpu")["cpu"]
        return (found or prove("cpu")) | prove(*selection.FUSED, "eager")
    found = {name: proof.Verdict() for name in selection.FUSED}
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The report says the same.
            decision = selection.decide(place, kind)
        if decision.trouble:
            raise RuntimeError(f"no check on {place}: {decision.trouble}")
        found = {name: v if v.failure else v.and_then(decision.verdicts.get(name, v)) for name, v in found.items()}
    return found | prove("eager")


def _times(place: selection.Place, passed: list[str]) -> dict[str, dict[str, float]]:
    """Returns milliseconds of SDPA and of the backends that passed.

    On a CPU only the instruction set in use is timed.
    """
    from .op import speed

    timed = {name: name for name in backends.BACKENDS} | {f"cpu ({cpu.instruction_set(place.dtype)})": "cpu"}
    names = {label: timed[label] for label in passed if label in timed}
    found: dict[str, dict[str, float]] = {label: {} for label in (*names, SDPA)}
    for shape in speed.SHAPES:
        call = speed.timed_call(shape, Kind(), place.dtype, place.head_size, place.device)
        runs, sdpa = speed.passes(names.values(), call), _sdpa(call)
        for which in runs:
            mine = {label: runs[which][name] for label, name in names.items()} | {SDPA: sdpa[which]}
            for label, milliseconds in speed.milliseconds(mine, place.device).items():
                found[label][f"{shape} {which}"] = milliseconds
    return found


def _sdpa(call) -> dict:
    heads = [x.detach().requires_grad_() for x in call[:3]]
    attention = torch.nn.functional.scaled_dot_product_attention
    output = attention(*heads)

    def forward():
        with torch.no_grad():
            attention(*heads)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(output, heads, output, retain_graph=True)}


def _taken(place: selection.Place, kinds: tuple[Kind, ...]) -> str:
    if not selection.is_checked(place.device):
        name = backends.choose(None, call_of(problems(kinds[0])[0], place.dtype, place.head_size))
        return f"{name}, the first without an objection: no check decides on a CPU"
    if (given := selection.policy()) is not True:
        return f"what set_backend_check({given!r}) asked for, {given or 'eager'}"
    firsts = {kind: (*selection.decide(place, kind).order, "eager")[0] for kind in kinds}
    names = list(dict.fromkeys(firsts.values()))
    if names == ["eager"]:
        return "eager: no fused backend passed"
    rest = [f"{name} for {'; '.join(str(k) for k in kinds if firsts[k] == name)}" for name in names[1:]]
    return ", ".join([names[0], *rest]) + ": the fastest that passed"


def _machine(device: torch.device) -> dict[str, str]:
    """Returns versions, device and kernels for a bug report."""
    from . import __version__

    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else runtime
    architectures = cuda.architectures()
    return {
        "deberta_fast": __version__,
        "torch": f"{torch.__version__} ({runtime or 'no GPU runtime'})",
        "Triton": "not installed" if triton.INSTALLED is None else ".".join(map(str, triton.INSTALLED)),
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "device": _device(device),
        "CPU kernels": extension.NOT_LOADED or ", ".join(cpu.instruction_sets()),
        "CUDA kernels": ", ".join(architectures) if architectures else cuda.MISSING or "none",
    }


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{device}: {processor()}, {torch.get_num_threads()} threads"
    words = [selection.name_of(device)]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        words.append(f"capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        words += [f"driver {version}"] if (version := _driver()) else []
    return ", ".join(words)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return None


def processor() -> str:
    """Returns the CPU's name, on Linux with family and model, because several processors are called "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in known:
        return platform.processor() or platform.machine() or sys.platform
    return f"{known['model name']} (family {known.get('cpu family')}, model {known.get('model')})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lines(report: Report):
    """Yields the lines of the table."""
    machine = dict(report.machine)
    yield ", ".join(f"{name} {machine.pop(name)}" for name in VERSIONS)
    for name, words in machine.items():
        yield f"{name:<13}{words}"
    shapes = [f"{batch} x {length}" for batch, length in report.shapes.values()]
    columns = [f"{which} {shape}" for which in ("forward", "backward") for shape in shapes]
    keys = [f"{shape} {which}" for which in ("forward", "backward") for shape in report.shapes]
    timed = any(row.milliseconds for row in report.rows)
    yield ""
    yield f"head size {report.head_size}; errors as a share of what is allowed" + (
        f"; milliseconds, and multiples of torch's {SDPA} without positions" if timed else ""
    )
    heading = f"{'':<20}{'solved':<9}{'error':<7}" + "".join(f"{column:>18}" for column in columns if timed)
    for dtype, taken in report.taken.items():
        yield f"{dtype:<20}{heading[20:]}".rstrip()
        for row in report.rows:
            if row.dtype == dtype:
                yield from _row(row, report.asked, keys)
        yield f"  backend=None takes {taken}"
    yield "a fused backend passed in every dtype" if report.passed else "NO FUSED BACKEND PASSED in some dtype"


def _row(row: Row, asked: int, keys: list[str]):
    if row.reasons:
        yield f"  {row.name:<18}not asked: {'; '.join(row.reasons)}"
        return
    if row.failure is not None:
        yield f"  {row.name:<18}FAILED after {row.problems} of {asked}: {row.failure}"
        return
    figures = ""
    for key in keys if row.milliseconds else ():
        multiple = f"{row.times_sdpa[key]:.2f} x" if row.times_sdpa else ""
        figures += f"{row.milliseconds[key]:>10.3g}{multiple:>8}"
    solved = f"{row.problems} of {asked}" if row.name != SDPA else ""
    yield f"  {row.name:<18}{solved:<9}{row.share if row.name != SDPA else '':<7.2}{figures}".rstrip()
