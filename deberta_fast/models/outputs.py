"""What the models return: by attribute, by name, or by position, where what is None does not count."""

import dataclasses
from collections import OrderedDict

import torch
from torch.utils import _pytree

States = tuple[torch.Tensor, ...] | None


class ModelOutput(OrderedDict):
    """A dictionary of the fields that are not None, in order; ``output[0]`` is the first of them.

    Subclasses are dataclasses. As in Hugging Face's, iteration goes over names, ``to_tuple()`` gives the values.
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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name, value) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        object.__setattr__(self, name, value)

    def __reduce__(self):
        return _rebuild, (type(self), dict(self))

    def to_tuple(self) -> tuple:
        return tuple(self.values())


def _rebuild(kind: type, values: dict) -> ModelOutput:
    return kind(**values)


@dataclasses.dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state (B, L, hidden_size); hidden_states, the embeddings and one a layer; attentions (B, H, L, L)."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class MaskedLMOutput(ModelOutput):
    """loss, a scalar, if there are labels; logits (B, L, vocab_size); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class SequenceClassifierOutput(ModelOutput):
    """loss, a scalar, if there are labels; logits (B, num_labels); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class TokenClassifierOutput(ModelOutput):
    """loss, a scalar, if there are labels; logits (B, L, num_labels); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """loss, a scalar, if there are positions; start_logits and end_logits (B, L); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None


@dataclasses.dataclass
class MultipleChoiceModelOutput(ModelOutput):
    """loss, a scalar, if there are labels; logits (B, choices); the others as ``BaseModelOutput``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: States = None
    attentions: States = None
