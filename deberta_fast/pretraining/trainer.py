"""Trains the models of a run, and continues a run that was stopped."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoints
from .batches import Share
from .build import LanguageModel, built, load_tokenizer
from .corpus import evaluation_batches, training_batches
from .evaluation import evaluate
from .flops import peak_tflops, step_flops
from .log import Log, plot
from .masking import Vocabulary
from .objectives import MaskedBatch
from .parallel import Place, started
from .phases import BadStep, Phases
from .settings import Settings, checked_to_start, read_settings, write_settings

# Settings that a run that continues must not change, because its steps would be others.
FIXED = ("objective", "model", "seed", "rtd", "masking", "data.length", "data.rows", "training.batch_tokens")


def pretrain(settings: Settings) -> Path:
    """Trains to the last step, from the run's last checkpoint if there is one, and returns the last checkpoint.

    SIGTERM ends the run behind the present step, with a checkpoint, as if it had been told to stop there.

    Raises:
        FileNotFoundError, TypeError, ValueError: the settings, the text, the tokenizer or a checkpoint do not fit. All
            of them are looked at before the first step.
        RuntimeError: a step was bad, and ``training.bad_step`` is "stop".
    """
    with started(checked_to_start(settings).training.device) as place:
        return Run(settings, place).train()


class Run:
    """One process of a run. ``train`` is the loop."""

    def __init__(self, settings: Settings, place: Place):
        self.settings, self.place, self.output = settings, place, Path(settings.output)
        training, data = settings.training, settings.data
        micro_rows = None if training.micro_batch_tokens is None else training.micro_batch_tokens // data.length
        self.share = Share(settings.rows_per_step, micro_rows, place.rank, place.ranks)
        self.tokenizer = load_tokenizer(settings)
        vocabulary = Vocabulary(self.tokenizer)
        self.last = self._last_checkpoint()
        self.models = built(settings, vocabulary.size)
        _set_checkpointing(self.models, training.checkpointing)
        self.text = training_batches(settings, self.tokenizer, vocabulary, self.share, place)
        self.held_out = evaluation_batches(settings, self.tokenizer, vocabulary, self.share, place)
        self.models.to(place.device).train()
        self.phases = Phases(self.models, settings, place)
        self.done, self.skipped, self.tokens = 0, 0, 0
        self._state_of_text = None
        if place.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            write_settings(settings, self.output / "settings.yaml")
        # Each rank draws other dropout masks.
        torch.manual_seed(_seed(settings.seed, place.rank))
        if self.last is not None:
            self._resume(self.last)

    def train(self) -> Path:
        """The loop over steps."""
        settings, reporting = self.settings, self.settings.reporting
        log = Log(
            self.output, self.done, settings.training.steps, tensorboard=reporting.tensorboard,
            progress=reporting.progress, active=self.place.rank == 0,
        )  # fmt: skip
        told, before = self._stop_signal()
        try:
            if self.last is not None:
                log.say(f"continuing from {self.last}")
            meter = Meter(self.place, settings)
            batches = self.text.batches(self.done, self._state_of_text)
            ended = False
            while self.done < settings.training.steps and not ended:
                step_batches = [next(batches).to(self.place.device) for _ in range(self.share.micro_batches)]
                self._step(step_batches, meter, log)
                self.done += 1
                log.step()
                ended = bool(self.place.summed(told.clone()).item())
                last = ended or self.done == settings.training.steps
                due = last or _due(self.done, reporting.save_every)
                if due or _due(self.done, reporting.log_every):
                    # Also before a checkpoint: a run that continues from it knows nothing of the steps before.
                    log.write("train", self.done, meter.figures(self))
                if last or _due(self.done, reporting.evaluate_every):
                    self._evaluate(log)
                    meter.pause()
                if due:
                    self._save()
                    meter.pause()
            if ended:
                log.say(f"stopped by a signal behind step {self.done}; the same command continues from {self.last}")
        finally:
            log.close()
            self.text.close()
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        if self.place.rank == 0:
            plot(self.output)
        return self.last

    def _step(self, batches: list[MaskedBatch], meter: "Meter", log: Log) -> None:
        try:
            meter.add(self.phases.step(batches), batches, self)
        except BadStep as bad:
            for phase in self.phases.all:
                phase.drop()
            self.skipped += 1
            if self.settings.training.bad_step == "stop":
                good = f"the last checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
                raise RuntimeError(f"step {self.done + 1}: {bad}; {good}") from None
            log.say(f"step {self.done + 1} is skipped: {bad}")

    def _evaluate(self, log: Log) -> None:
        if self.held_out is None:
            return
        modules = [phase.module for phase in self.phases.all]
        figures = evaluate(self.phases.forward, modules, self.held_out(), self.place)
        log.write("evaluation", self.done, figures)

    def _save(self) -> None:
        progress = {
            "step": self.done, "skipped": self.skipped, "tokens": self.tokens, "ranks": self.place.ranks,
            "random": torch.get_rng_state(), "phases": [phase.state_dict() for phase in self.phases.all],
            "text": self.text.state_dict(),
        }  # fmt: skip
        if self.place.device.type == "cuda":
            progress["random_cuda"] = torch.cuda.get_rng_state(self.place.device)
        optimizers = [phase.optimizer for phase in self.phases.all]
        self.last = checkpoints.save(
            self.output, self.done, self.settings, self.models, optimizers, progress, self.place,
            self.settings.reporting.keep,
        )  # fmt: skip

    def _resume(self, folder: Path) -> None:
        optimizers = [phase.optimizer for phase in self.phases.all]
        progress = checkpoints.load(folder, self.models, optimizers, self.place)
        if progress is None or progress["ranks"] != self.place.ranks:
            # Weights and rows continue. Dropout cannot: each rank had its own.
            first = torch.load(folder / "progress-0.pt", map_location="cpu", weights_only=True)
            torch.manual_seed(_seed(self.settings.seed, self.place.rank, first["step"]))
            progress = {**first, "random": None, "random_cuda": None, "text": None}
        self.done, self.skipped, self.tokens = progress["step"], progress["skipped"], progress["tokens"]
        for phase, state in zip(self.phases.all, progress["phases"]):
            phase.load_state_dict(state)
        self._state_of_text = progress["text"]
        if progress["random"] is not None:
            torch.set_rng_state(progress["random"])
        if progress.get("random_cuda") is not None and self.place.device.type == "cuda":
            torch.cuda.set_rng_state(progress["random_cuda"], self.place.device)

    def _last_checkpoint(self) -> Path | None:
        found = checkpoints.finished(self.output)
        if not found:
            return None
        before = read_settings(found[-1] / "settings.yaml").to_dict()
        now = self.settings.to_dict()
        for name in FIXED:
            values = []
            for settings in (before, now):
                for part in name.split("."):
                    settings = settings[part]
                values.append(settings)
            if values[0] != values[1]:
                raise ValueError(
                    f"{self.output} holds a run with {name}={values[0]!r}, and the settings say {values[1]!r}: "
                    "choose another output, or keep the value"
                )
        return found[-1]

    def _stop_signal(self) -> tuple[torch.Tensor, Any]:
        """Returns a number that SIGTERM makes 1, and the earlier handler; None outside of the main thread."""
        told = torch.zeros(1, device=self.place.device)
        try:
            return told, signal.signal(signal.SIGTERM, lambda *_: told.fill_(1.0))
        except ValueError:  # only the main thread may set handlers
            return told, None


class Meter:
    """Figures of the steps since the last entry of the log."""

    def __init__(self, place: Place, settings: Settings):
        self.place, self.settings = place, settings
        self.peak = settings.training.peak_tflops or peak_tflops(place.device)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.flops, self.seconds, self.since = 0.0, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Leaves out the time since the last step, which was not training."""
        self.since = time.perf_counter()

    def add(self, sums: dict[str, torch.Tensor], batches: list[MaskedBatch], run: Run) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.cpu()
        for batch in batches:
            lengths, masked = batch.cu_seqlens.cpu().long().diff(), len(batch.places)
            config = run.models.generator.config
            runs = config.num_hidden_layers + config.enhanced_mask_decoder
            self.flops += step_flops(config, runs, lengths, masked, False)
            if not isinstance(run.models, LanguageModel):
                config = run.models.discriminator.config
                self.flops += step_flops(config, config.num_hidden_layers, lengths, 0, True)
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def figures(self, run: Run) -> dict[str, float]:
        """Means over all processes, and speed; then starts anew."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[x] for x in names] + [torch.tensor(self.flops, dtype=torch.float64)])
        values = self.place.summed(values.to(self.place.device)).tolist()
        total = dict(zip(names, values))
        masked, tokens = max(1.0, total.get("masked", 0.0)), max(1.0, total.get("tokens", 0.0))
        run.tokens += int(total.get("tokens", 0))
        figures = {"mlm_loss": total.get("mlm_loss", np.nan) / masked}
        figures["mlm_accuracy"] = total.get("mlm_right", np.nan) / masked
        if "rtd_loss" in total:
            figures |= {
                "rtd_loss": total["rtd_loss"] / tokens, "rtd_accuracy": total["rtd_right"] / tokens,
                "original": 1 - total["replaced"] / tokens,
            }  # fmt: skip
        seconds = max(self.seconds, 1e-9)
        figures |= {"learning_rate": run.phases.all[0].rate}
        figures |= {f"gradient_norm_{i}": phase.norm for i, phase in enumerate(run.phases.all)}
        figures |= {"tokens": run.tokens, "tokens_per_second": total.get("tokens", 0.0) / seconds}
        figures["tflops"] = values[-1] / seconds / 1e12
        if self.peak:
            figures["mfu"] = figures["tflops"] / (self.peak * self.place.ranks)
        figures["skipped"] = run.skipped
        self._clear()
        return figures


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _set_checkpointing(models: torch.nn.Module, kind: str) -> None:
    if kind == "none":
        return
    for name in ("generator", "discriminator"):
        if (model := getattr(models, name, None)) is not None:
            model.gradient_checkpointing_enable(keep_attention=kind == "keep_attention")
