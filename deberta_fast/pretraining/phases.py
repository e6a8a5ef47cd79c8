"""Optimizer steps of a run: which losses, in which order, on which parameters.

    mlm         L_G
    rtd         L_G and its step first; then lambda L_D on the tokens drawn, with E_G after that step
    rtd, es     L_G + lambda L_D in one backward and one step

Two optimizers, each with its own clipping and loss scale, are Microsoft's default ("decoupled training"). With
embeddings that both losses train, one backward gives them the gradients of both (ELECTRA, arXiv 2003.10555).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..distributed.loss_weights import loss_weights
from .objectives import BothTokens, Detected, MaskedBatch, MaskedTokens, Predicted, ReplacedTokens
from .optimizers import adamw, scheduled
from .parallel import Place, precise, synchronised, wrapped
from .settings import Settings

# A loss is compared with its running mean over about so many steps, after as many.
RUNNING = 100


class BadStep(Exception):
    """A loss or a gradient with which no step should be made; str() says which."""


class Phase:
    """One module, its optimizer, schedule and loss scale."""

    def __init__(self, name: str, objective: nn.Module, rate: float, settings: Settings, place: Place):
        training = settings.training
        self.name, self.settings, self.place = name, settings, place
        self.module = wrapped(objective, place, training.strategy, training.precision, training.compile)
        self.optimizer = adamw(self.module, rate, training.weight_decay, training.betas, training.eps)
        self.scheduler = scheduled(self.optimizer, training.schedule, training.warmup_steps, training.steps)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=training.precision == "fp16")
        self.running, self.good_steps, self.norm, self.loss, self.rate = 0.0, 0, 0.0, 0.0, rate

    def backward(self, inputs: list[tuple], loss_of: Callable[[Any, int], torch.Tensor]) -> list:
        """Runs forward and backward of all micro-batches; returns the outputs.

        ``loss_of(output, index)`` is a micro-batch's part of the loss that all processes have the mean of.
        """
        training, outputs, total = self.settings.training, [], torch.zeros((), device=self.place.device)
        for index, arguments in enumerate(inputs):
            with synchronised(self.module, index == len(inputs) - 1):
                with precise(self.place, training.precision, training.strategy):
                    output = self.module(*arguments)
                loss = loss_of(output, index)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            outputs.append(output)
        self.loss = (self.place.summed(total) / self.place.ranks).item()
        return outputs

    def step(self) -> None:
        """Clips and makes the optimizer's step. Raises BadStep, on all processes alike, and then makes none."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.training.clip)
        self.norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        try:
            self._check()
            self.scaler.step(self.optimizer)
        finally:
            self.scaler.update()
            self.optimizer.zero_grad()
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.good_steps += 1
        share = 1 / min(self.good_steps, RUNNING)
        self.running += share * (self.loss - self.running)

    def _check(self) -> None:
        if not math.isfinite(self.loss):
            raise BadStep(f"the loss of the {self.name} is {self.loss}")
        # Scaled losses may overflow, which the scaler mends: it leaves the step out and halves the scale.
        if not math.isfinite(self.norm) and not self.scaler.is_enabled():
            raise BadStep(f"the norm of the {self.name}'s gradients is {self.norm}")
        factor = self.settings.training.spike_factor
        if factor is not None and self.good_steps >= RUNNING and self.loss > factor * self.running:
            raise BadStep(f"the loss of the {self.name} is {self.loss:.4g}, its running mean {self.running:.4g}")

    def drop(self) -> None:
        """Forgets gradients of a step that is not made."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(),
            "running": self.running, "good_steps": self.good_steps,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.running, self.good_steps = state["running"], state["good_steps"]


class Phases:
    """All phases of a run's step.

    Args:
        models: ``LanguageModel`` or ``ReplacedTokenModels``, on the device.
    """

    def __init__(self, models: nn.Module, settings: Settings, place: Place):
        training, rtd = settings.training, settings.rtd
        self.settings, self.place, self.joint = settings, place, False
        discriminator_rate = training.discriminator_learning_rate or training.learning_rate
        if settings.objective == "mlm":
            self.all = [
                Phase("language model", MaskedTokens(models.generator), training.learning_rate, settings, place)
            ]
        elif rtd.sharing == "es":
            self.joint = True
            both = BothTokens(models, rtd.temperature)
            self.all = [Phase("two models", both, training.learning_rate, settings, place)]
        else:
            generator = MaskedTokens(models.generator, rtd.temperature)
            self.all = [
                Phase("generator", generator, training.learning_rate, settings, place),
                Phase("discriminator", ReplacedTokens(models.discriminator), discriminator_rate, settings, place),
            ]

    def step(self, batches: list[MaskedBatch]) -> dict[str, torch.Tensor]:
        """Makes a step of a process's micro-batches; returns sums over them, which the log divides.

        Raises BadStep on all processes alike, after which phases before the bad one have made their step.
        """
        masked = [len(batch.places) for batch in batches]
        tokens = [len(batch.input_ids) for batch in batches]
        group = None if self.place.ranks == 1 else torch.distributed.group.WORLD
        of_masked, factor = self._weights(masked, group), self.settings.rtd.weight
        if self.settings.objective == "mlm":
            predicted = self._made(0, [(x,) for x in batches], lambda output, i: output.loss * of_masked[i])
            return self._sums(predicted, None, masked, tokens)
        of_tokens = self._weights(tokens, group)
        if self.joint:
            loss_of = lambda both, i: both[0].loss * of_masked[i] + factor * both[1].loss * of_tokens[i]
            both = self._made(0, [(x,) for x in batches], loss_of)
            predicted, detected = zip(*both)
        else:
            predicted = self._made(0, [(x,) for x in batches], lambda output, i: output.loss * of_masked[i])
            inputs = [(batch, output.drawn) for batch, output in zip(batches, predicted)]
            detected = self._made(1, inputs, lambda output, i: factor * output.loss * of_tokens[i])
        return self._sums(predicted, detected, masked, tokens)

    def forward(self, batch: MaskedBatch) -> tuple[Predicted, Detected | None]:
        """Runs the models without a step, for evaluation."""
        training = self.settings.training
        with precise(self.place, training.precision, training.strategy):
            if self.joint:
                return self.all[0].module(batch)
            predicted = self.all[0].module(batch)
            return predicted, self.all[1].module(batch, predicted.drawn) if len(self.all) > 1 else None

    def _weights(self, counts: list[int], group) -> list[torch.Tensor]:
        return [x.to(self.place.device) for x in loss_weights(counts, group)]

    def _made(self, index: int, inputs: list[tuple], loss_of) -> list:
        outputs = self.all[index].backward(inputs, loss_of)
        self.all[index].step()
        return outputs

    @staticmethod
    def _sums(predicted, detected, masked: list[int], tokens: list[int]) -> dict[str, torch.Tensor]:
        weighed = lambda outputs, counts: sum(x.loss.detach().double() * n for x, n in zip(outputs, counts))
        sums = {
            "mlm_loss": weighed(predicted, masked),
            "mlm_right": sum(x.right for x in predicted).double(),
            "masked": torch.tensor(float(sum(masked)), dtype=torch.float64),
            "tokens": torch.tensor(float(sum(tokens)), dtype=torch.float64),
        }
        if detected is not None:
            sums |= {
                "rtd_loss": weighed(detected, tokens),
                "rtd_right": sum(((x.logits > 0) == (x.labels > 0)).sum() for x in detected).double(),
                "replaced": sum(x.labels.sum() for x in detected).double(),
            }
        return sums
