"""Steps of pretraining with Hugging Face's modules alone: padded batches, eager attention, torch's AdamW.

bench.pretraining compares with it, and tests take it as right, so it shares no code with deberta_fast.pretraining. The
maths are those of DeBERTaV3 (He et al., arXiv 2111.09543). A generator with the enhanced mask decoder makes its step
first. The discriminator follows on the tokens that the generator drew. Its embeddings are E_D = stop_gradient(E_G) +
E_delta. Generators with a convolution are not covered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")


class Text(NamedTuple):
    """One sequence: its tokens and those that the generator sees, int64 (L,); which ones are masked, bool (L,)."""

    input_ids: torch.Tensor
    hidden_ids: torch.Tensor
    masked: torch.Tensor


class Padded(NamedTuple):
    """Sequences in rows, padded at the right with 0: int64 (B, L), and bool (B, L) of tokens and of masked tokens."""

    input_ids: torch.Tensor
    hidden_ids: torch.Tensor
    masked: torch.Tensor
    attention_mask: torch.Tensor


def padded(texts: list[Text]) -> Padded:
    parts = [*zip(*texts), [torch.ones_like(text.masked) for text in texts]]
    return Padded(*(nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts))


class Generator(nn.Module):
    """A masked language model. Without positions in the model's input, its last layer runs twice with them."""

    def __init__(self, config: Any):
        super().__init__()
        self.model, self.generation = AutoModel.from_config(config), 1 if config.model_type == "deberta" else 2
        biased, width = config.position_biased_input, config.hidden_size
        self.positions = None if biased else nn.Embedding(config.max_position_embeddings, width)
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, batch: Padded) -> torch.Tensor:
        """Returns scores of the M masked tokens, (M, vocab_size), row by row."""
        if self.positions is None:
            states = self.model(batch.hidden_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
        else:
            states = self.decoded(batch)
        states = self.LayerNorm(F.gelu(self.dense(states[batch.masked])))
        return F.linear(states, self.model.embeddings.word_embeddings.weight, self.bias)

    def decoded(self, batch: Padded) -> torch.Tensor:
        """The enhanced mask decoder (arXiv 2006.03654, section 3.2): (B, L, hidden_size)."""
        encoder = self.model.encoder
        states = self.model.embeddings(input_ids=batch.hidden_ids, mask=batch.attention_mask)
        mask = encoder.get_attention_mask(batch.attention_mask.long())
        relative = dict(relative_pos=encoder.get_rel_pos(states), rel_embeddings=encoder.get_rel_embedding())
        *layers, last = encoder.layer
        for layer in layers:
            states = layer(states, mask, **relative)[0]
        queries = states + self.positions.weight[: states.shape[1]]
        for _ in range(2):
            if self.generation == 1:
                queries = first_version(last, states, queries, mask, relative)
            else:
                queries = last(states, mask, query_states=queries, **relative)[0]
        return queries


def first_version(
    layer: nn.Module, states: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor, relative: dict
) -> torch.Tensor:
    """Runs v1's layer with queries of their own. Its own query_states fails: it transposes three dimensions by t().

    in_proj projects query, key and value at once, head by head. The layer runs on the queries, and a hook puts the
    projected states where it takes keys and values.
    """
    attention = layer.attention.self
    rows = torch.arange(attention.in_proj.out_features, device=states.device)
    is_query = rows % (3 * attention.attention_head_size) < attention.attention_head_size

    def with_states(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.where(is_query, output, F.linear(states, module.weight))

    hook = attention.in_proj.register_forward_hook(with_states)
    try:
        return layer(queries, mask, **relative)[0]
    finally:
        hook.remove()


class Discriminator(nn.Module):
    """Tells replaced tokens. The model's own embeddings are E_delta."""

    def __init__(self, config: Any):
        super().__init__()
        self.model, width = AutoModel.from_config(config), config.hidden_size
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.classifier = nn.Linear(width, 1)
        with torch.no_grad():
            for name in EMBEDDINGS:
                if name in dict(self.model.named_parameters()):
                    self.model.get_parameter(name).zero_()

    def forward(self, replaced: torch.Tensor, attention_mask: torch.Tensor, generator: Generator) -> torch.Tensor:
        """Int64 and bool (B, L) to logits (B, L)."""
        own, theirs = (dict(x.model.named_parameters()) for x in (self, generator))
        sums = {name: theirs[name].detach() + own[name] for name in EMBEDDINGS if name in own}
        given = dict(input_ids=replaced, attention_mask=attention_mask.long())
        states = torch.func.functional_call(self.model, sums, (), given).last_hidden_state
        states = self.LayerNorm(states[:, :1] + states)
        return self.classifier(F.gelu(self.dense(states))).squeeze(-1)


class Optimizer:
    """AdamW of one model, with clipping and a learning rate that rises linearly and falls linearly to 0."""

    def __init__(self, module: nn.Module, rate: float, training: Any, fused: bool):
        self.parameters, self.rate, self.training, self.done = list(module.parameters()), rate, training, 0
        groups = [
            {"params": [x for x in self.parameters if x.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [x for x in self.parameters if x.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=rate, betas=tuple(training.betas), eps=training.eps, fused=fused)

    def step(self, loss: torch.Tensor) -> None:
        training, done = self.training, self.done
        warmup, steps = training.warmup_steps, training.steps
        for group in self.adamw.param_groups:
            rising = done < warmup
            group["lr"] = self.rate * ((done + 1) / warmup if rising else (steps - done) / (steps - warmup))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, training.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        self.done += 1


class Losses(NamedTuple):
    """Those of a step before it, and the tokens drawn, int64 (M,); None without a discriminator."""

    language: torch.Tensor
    replaced: torch.Tensor | None
    drawn: torch.Tensor | None


class Reference:
    """The models and their optimizers.

    Args:
        discriminator: None trains the generator alone.
        settings: ``deberta_fast.pretraining.settings.Settings``; only numbers of its ``rtd`` and ``training`` are read.
        draw: (M, V) logits and a temperature to M tokens.
        fused: let AdamW use torch's fused kernels.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator | None,
        settings: Any,
        draw: Callable[[torch.Tensor, float], torch.Tensor],
        fused: bool = False,
    ):
        self.generator, self.discriminator, self.draw, self.rtd = generator, discriminator, draw, settings.rtd
        training = settings.training
        self.autocast = torch.bfloat16 if training.precision == "bf16" else None
        rate = training.learning_rate
        self.optimizers = [Optimizer(generator, rate, training, fused)]
        if discriminator is not None:
            rate = training.discriminator_learning_rate or rate
            self.optimizers.append(Optimizer(discriminator, rate, training, fused))

    def step(self, batch: Padded) -> Losses:
        kind = batch.input_ids.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            logits = _wide(self.generator(batch))
            language = F.cross_entropy(logits, batch.input_ids[batch.masked])
        self.optimizers[0].step(language)
        if self.discriminator is None:
            return Losses(language.detach(), None, None)
        drawn = self.draw(logits.detach(), self.rtd.temperature)
        inputs = batch.input_ids.clone()
        inputs[batch.masked] = drawn
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            answers = _wide(self.discriminator(inputs, batch.attention_mask, self.generator))[batch.attention_mask]
            labels = (inputs != batch.input_ids)[batch.attention_mask].to(answers)
            replaced = F.binary_cross_entropy_with_logits(answers, labels)
        self.optimizers[1].step(self.rtd.weight * replaced)
        return Losses(language.detach(), replaced.detach(), drawn)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def load(reference: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies one of deberta_fast's models. ``tensors`` have the names that ``deberta_fast.checkpoint.to_hf`` gives."""
    renamed, has_positions = {}, getattr(reference, "positions", None) is not None
    for name, tensor in tensors.items():
        name = name.removeprefix("mask_predictions.").removeprefix("lm_predictions.lm_head.")
        name = name.replace("_embeddings._weight", "_embeddings.weight")
        if has_positions and name == "deberta.embeddings.position_embeddings.weight":
            name = "positions.weight"
        renamed["model." + name.removeprefix("deberta.") if name.startswith("deberta.") else name] = tensor
    reference.load_state_dict(renamed)
