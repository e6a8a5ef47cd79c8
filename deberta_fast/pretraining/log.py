"""What a run tells: JSON lines, events for TensorBoard, a progress bar, and a plot of the losses."""

import json
import os
import sys
import time
from pathlib import Path

from ..checkpoint.replace import replace_file

LOG, PLOT = "log.jsonl", "losses.png"


class Log:
    """Writes a run's figures, in the process of rank 0; those of other ranks write nothing.

    Args:
        output: the run's folder.
        step: the step that the run continues from. What a stopped run wrote about later ones is removed.
        steps: of the whole run, for the bar.
        active: whether this process writes.
    """

    def __init__(self, output: Path, step: int, steps: int, *, tensorboard: bool, progress: bool, active: bool):
        self.path, self._writer, self._bar, self._file, self._steps = output / LOG, None, None, None, steps
        self._active = active
        if not active:
            return
        kept = [line for line in read_log(self.path) if line["step"] <= step] if step else []
        replace_file(self.path, "".join(json.dumps(x) + "\n" for x in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        if tensorboard:
            self._writer = _tensorboard(output / "tensorboard", step)
        if progress and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step")

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def write(self, kind: str, step: int, figures: dict[str, float]) -> None:
        """Writes figures of "train" or "evaluation"."""
        if not self._active:
            return
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3), **figures}
        self._file.write(json.dumps({k: _json(v) for k, v in entry.items()}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()
        self.say(f"step {step}/{self._steps} {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def say(self, text: str) -> None:
        """Prints a line on standard error, beside the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        for part in (self._file, self._writer, self._bar):
            if part is not None:
                part.close()


def _json(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("reporting.tensorboard needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_log(path: Path) -> list[dict]:
    """Returns the entries of a log; none if there is no file. A last line that a kill has cut is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot(output: Path) -> Path | None:
    """Draws the losses of a run's log into losses.png; returns its path, None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = read_log(output / LOG)
    names = [x for x in ("mlm_loss", "rtd_loss") if any(x in entry for entry in entries)]
    if not names:
        return None
    titles = {"mlm_loss": "masked language model", "rtd_loss": "replaced-token detection"}
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        for kind, style in (("train", "-"), ("evaluation", "o-")):
            points = [(x["step"], x[name]) for x in entries if x["kind"] == kind and x.get(name) is not None]
            if points:
                axes.plot(*zip(*points), style, label=kind, markersize=4)
        axes.set(xlabel="step", ylabel="loss, nats a token", title=titles[name])
        axes.grid(alpha=0.3)
        axes.legend()
    path = output / PLOT
    beside = path.with_name("losses.unfinished.png")
    figure.savefig(beside, dpi=120)
    os.replace(beside, path)
    return path
