"""Outputs of the models, read by attribute, by name, or by position among the values that are not None."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
from torch.utils import _pytree

States = tuple[torch.Tensor, ...] | None


class ModelOutput(OrderedDict):
    """A dictionary of the fields that are not None, in order; ``output[0]`` is the first of them.

    Subclasses are dataclasses. As in Hugging Face's, iteration yields names, and ``to_tuple()`` returns the values. The
    constructor also takes a dictionary or (name, value) pairs, by which accelerate and DataParallel rebuild outputs.
    Values can be replaced, but not removed.
    """

    def __init_subclass__(cls) -> None:
        # torch.compile, torch.export, FSDP and DataParallel look for tensors in what a model returns
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=lambda output: (
                [(_pytree.MappingKey(name), value) for name, value in output.items()],
                list(output),
            ),
        )

    def __post_init__(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        first = next(iter(fields))
        values = _named_values(fields[first])
        if values is not None:
            if given := [name for name in fields if name != first and fields[name] is not None]:
                raise TypeError(f"{type(self).__name__} takes values by name or all in one, got both: {given}")
            object.__setattr__(self, first, None)
            for name, value in values:
                if name not in fields:
                    raise TypeError(f"{type(self).__name__} has no {name!r}, but {', '.join(fields)}")
                object.__setattr__(self, name, value)
        for name in fields:
            value = getattr(self, name)
            if value is not None:
                super().__setitem__(name, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name, value) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        object.__setattr__(self, name, value)

    def _refuse_removal(self, *arguments, **keywords):
        raise TypeError(f"{type(self).__name__} keeps its values: they can be replaced, but not removed")

    __delitem__ = pop = popitem = clear = _refuse_removal

    def __reduce__(self):
        return _rebuild, (type(self), dict(self))

    def to_tuple(self) -> tuple:
        return tuple(self.values())


def _rebuild(kind: type, values: dict) -> ModelOutput:
    return kind(**values)


def _named_values(given) -> list[tuple] | None:
    """The (name, value) pairs of a dictionary, sequence or iterator; None for any other value."""
    if isinstance(given, Mapping):
        return list(given.items())
    if isinstance(given, list | tuple | Iterator):
        pairs = list(given)
        if pairs and all(isinstance(x, list | tuple) and len(x) == 2 and isinstance(x[0], str) for x in pairs):
            return pairs
        if isinstance(given, Iterator):
            raise TypeError(f"expected pairs of a name and a value, got {pairs!r:.200}")
    return None


@dataclasses.dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state (B, L, hidden_size); hidden_states: embeddings and each layer's; attentions (B, H, L, L)."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class _LossAndLogits(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


class MaskedLMOutput(_LossAndLogits):
    """loss, a scalar, if there are labels; logits (B, L, vocab_size); the others as ``BaseModelOutput``."""


class SequenceClassifierOutput(_LossAndLogits):
    """loss, a scalar, if there are labels; logits (B, num_labels); the others as ``BaseModelOutput``."""


class TokenClassifierOutput(_LossAndLogits):
    """loss, a scalar, if there are labels; logits (B, L, num_labels); the others as ``BaseModelOutput``."""


class MultipleChoiceModelOutput(_LossAndLogits):
    """loss, a scalar, if there are labels; logits (B, choices); the others as ``BaseModelOutput``."""


@dataclasses.dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """loss, a scalar, if there are positions; start_logits and end_logits (B, L); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None
