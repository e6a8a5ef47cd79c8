"""Configurations: the numbers and switches of a ``config.json``, under Hugging Face's names."""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from ..checkpoint.hub import Source
from ..checkpoint.json_object import read_object
from ..checkpoint.replace import CONFIG, config_file, replace_file
from ..op.relative_position import slot_table, table_rows
from .activation import activation

_TERMS = ("c2p", "p2c", "p2p", "none", "")
# Beyond all models: values that take time or memory by themselves, before any weights are read.
_AT_MOST = {"num_hidden_layers": 10_000, "num_labels": 2**22, "z_steps": 1000}
_INTEGERS_BELOW = 2**31
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
_RANGES = {
    "must be at least 1": (
        lambda x: x >= 1,
        "vocab_size hidden_size num_attention_heads intermediate_size max_position_embeddings num_labels "
        "pooler_hidden_size embedding_size attention_head_size",
    ),
    "must be positive": (lambda x: x > 0, "layer_norm_eps"),
    "must be in [0, 1)": (
        lambda x: 0 <= x < 1,
        "hidden_dropout_prob attention_probs_dropout_prob pooler_dropout cls_dropout",
    ),
    "must not be negative": (lambda x: x >= 0, "initializer_range num_hidden_layers type_vocab_size z_steps"),
}


@dataclasses.dataclass(init=False, repr=False, eq=False)
class DebertaConfig:
    """DeBERTa v1. Names and defaults are Hugging Face's. Unknown values are kept as attributes and saved again.

    Attributes:
        relative_attention, max_relative_positions, pos_att_type: the position terms of attention. A
            max_relative_positions below 1 means max_position_embeddings. pos_att_type is a list, or text such as
            "c2p|p2c".
        talking_head: linear maps over the heads of scores and probabilities; attention is then computed densely.
        position_biased_input: absolute positions are added to the embeddings.
        embedding_size: width of the embeddings, hidden_size by default; if they differ, a projection follows.
        pooler_hidden_size, pooler_dropout, pooler_hidden_act, cls_dropout: settings of the sequence classifiers.
            cls_dropout is hidden_dropout_prob by default.
        tie_word_embeddings: the language model's output uses the word embeddings.
        legacy: the name under which ``save_pretrained`` writes the language model's head: ``cls.predictions`` (True)
            or ``lm_predictions.lm_head``, which always uses the word embeddings. Both load and compute the same.
        enhanced_mask_decoder: the language model also predicts from absolute positions, as in Microsoft's code but not
            in Hugging Face's (He et al., arXiv 2006.03654, section 3.2), unless position_biased_input has added them.
        z_steps: how often the last layer runs, if more than once; its first input remains the keys and values.
        far_negative: "hf" or "ms", the table's row for keys far behind their query (``relative_position``).
        num_labels, id2label, label2id, problem_type: settings of the classifiers. Setting num_labels renames the
            labels.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range, or contradicts another.
    """

    model_type = "deberta"
    generation = 1

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-7
    relative_attention: bool = False
    max_relative_positions: int = -1
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    position_biased_input: bool = True
    pos_att_type: str | list | tuple | None = None
    talking_head: bool = False
    embedding_size: int | None = None
    pooler_dropout: float | int = 0.0
    pooler_hidden_act: str = "gelu"
    pooler_hidden_size: int | None = None
    cls_dropout: float | int | None = None
    legacy: bool = True
    tie_word_embeddings: bool = True
    enhanced_mask_decoder: bool = False
    z_steps: int = 0
    far_negative: str = "hf"
    id2label: dict | None = None
    label2id: dict | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    def __init__(self, **values: Any) -> None:
        num_labels = values.pop("num_labels", None)
        origins = [values.pop(name, None) for name in ("name_or_path", "_name_or_path")]
        self.name_or_path = next(filter(None, origins), "")
        for field in dataclasses.fields(self):
            setattr(self, field.name, values.pop(field.name, field.default))
        if self.pooler_hidden_size is None:
            self.pooler_hidden_size = self.hidden_size
        for name, value in values.items():
            if hasattr(type(self), name):
                raise ValueError(f"{name} is no value of a configuration: {type(self).__name__} defines it")
            setattr(self, name, value)
        if isinstance(self.pos_att_type, str):
            self.pos_att_type = [term.strip() for term in self.pos_att_type.lower().split("|")]
        elif isinstance(self.pos_att_type, tuple):
            self.pos_att_type = list(self.pos_att_type)
        self._check_types()
        if self.id2label is None and self.label2id is not None:
            self.id2label = {key: label for label, key in self.label2id.items()}
        if self.id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = {int(key): label for key, label in self.id2label.items()}
            if num_labels is not None and num_labels != self.num_labels:
                raise ValueError(f"num_labels is {num_labels}, and id2label names {self.num_labels} labels")
            if self.label2id is None:
                self.label2id = {label: key for key, label in self.id2label.items()}
        self._check()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type) or (  # type: ignore[arg-type]
                isinstance(value, bool) and field.type is not bool
            ):
                expected = getattr(field.type, "__name__", field.type)
                raise TypeError(f"{field.name} must be of type {expected}, got {value!r}")
            _check_number(field.name, value)

    def _check(self) -> None:
        for expected, (is_valid, names) in _RANGES.items():
            for name in names.split():
                if (value := getattr(self, name, None)) is not None and not is_valid(value):
                    raise ValueError(f"{name} {expected}, got {value}")
        if self.enhanced_mask_decoder and self.num_hidden_layers < 1:
            raise ValueError("enhanced_mask_decoder needs a layer to run again, got num_hidden_layers=0")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size, {self.vocab_size}, got {self.pad_token_id}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, {heads}, got {self.hidden_size}")
        for term in self.pos_att_type or ():
            if term not in _TERMS:
                raise ValueError(f"pos_att_type may hold c2p and p2c, got {term!r}")
        for name in ("hidden_act", "pooler_hidden_act"):
            activation(getattr(self, name))
        if self.problem_type not in _PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {_PROBLEM_TYPES}, got {self.problem_type!r}")
        slot_table(**self.table)  # raises ValueError if the values define no table
        if self.generation == 1:
            for name in ("position_buckets", "conv_kernel_size"):
                if getattr(self, name, 0) > 0:
                    raise ValueError(f"DeBERTa v1 has no {name}, got {getattr(self, name)}: see DebertaV2Config")
            if getattr(self, "share_att_key", False) or getattr(self, "norm_rel_ebd", "none") != "none":
                raise ValueError("DeBERTa v1 has neither share_att_key nor norm_rel_ebd: see DebertaV2Config")
            head_size = self.hidden_size // self.num_attention_heads
            if getattr(self, "attention_head_size", head_size) != head_size:
                raise ValueError(f"DeBERTa v1's heads are hidden_size / num_attention_heads = {head_size} wide")
        elif getattr(self, "talking_head", False):
            raise ValueError("talking_head belongs to DeBERTa v1: see DebertaConfig")

    @property
    def name_or_path(self) -> str:
        """Where the configuration was loaded from, "" if it was made. It is not saved."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, place: str | os.PathLike) -> None:
        self._name_or_path = str(place)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)  # type: ignore[arg-type]  # __post_init__ fills it

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        _check_number("num_labels", number)
        self.id2label = {index: f"LABEL_{index}" for index in range(number)}
        self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def position_terms(self) -> tuple[str, ...]:
        """The position terms of attention: a subset of c2p and p2c."""
        return tuple(x for x in ("c2p", "p2c") if self.relative_attention and x in (self.pos_att_type or ()))

    @property
    def scale_terms(self) -> int:
        """n in the scale 1 / sqrt(D n). Named terms count, even where relative_attention is off."""
        named = self.pos_att_type or ()
        return 1 + (len(named) if self.generation == 1 else ("c2p" in named) + ("p2c" in named))

    @property
    def table(self) -> dict:
        """Keywords of ``disentangled_attention`` that assign rows of the position table to distances."""
        longest = self.max_relative_positions
        return dict(
            position_buckets=getattr(self, "position_buckets", -1) if self.generation > 1 else -1,
            max_relative_positions=longest if longest >= 1 else self.max_position_embeddings,
            far_negative=self.far_negative,
        )

    @property
    def table_rows(self) -> int:
        return table_rows(self.table["position_buckets"], self.table["max_relative_positions"])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DebertaConfig":
        """Returns itself, because there is no other part. Trainer and PEFT call it."""
        return self

    def update(self, values: dict) -> None:
        """Sets values by name, all or none. Raises the errors of the constructor."""
        changes = {"name_or_path": self.name_or_path, **values}
        if changes.pop("model_type", self.model_type) != self.model_type:
            raise ValueError(f"model_type must stay {self.model_type!r}, got {values['model_type']!r}")
        vars(self).update(vars(self.from_dict(self.to_dict(), **changes)))

    def to_diff_dict(self) -> dict:
        """The values of ``to_dict`` that differ from their defaults, and model_type."""
        defaults = {**type(self)().to_dict(), "model_type": None}
        return {name: x for name, x in self.to_dict().items() if name not in defaults or defaults[name] != x}

    def to_dict(self) -> dict:
        """All values, except default Nones, which Hugging Face's code would take for set values."""
        values = {name: copy.deepcopy(value) for name, value in vars(self).items() if not name.startswith("_")}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: x for name, x in values.items() if x is not None or defaults.get(name, 0) is not None}
        return {**values, "model_type": self.model_type}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict, **changes) -> "DebertaConfig":
        """Makes a configuration from the values of a config.json, Hugging Face's or Microsoft's.

        Raises:
            TypeError, ValueError: see the class; or the values describe another kind of model.
        """
        values = dict(values)
        kind = values.pop("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"model_type is {kind!r}, and {cls.__name__} describes a {cls.model_type!r}")
        # Names of Microsoft's files
        pooling = values.pop("pooling", None)
        for name, value in (pooling if isinstance(pooling, dict) else {}).items():
            values.setdefault(f"pooler_{name}", value)
        if "padding_idx" in values:
            values.setdefault("pad_token_id", values.pop("padding_idx"))
        if "num_labels" in changes or "id2label" in changes:
            values = {k: v for k, v in values.items() if k not in ("num_labels", "id2label", "label2id")}
        return cls(**{**values, **changes})

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike | Source, **changes) -> "DebertaConfig":
        """Reads the config.json in a folder or on the hub; ``changes`` replace values, or are options of ``Source``.

        Raises:
            FileNotFoundError: there is no config.json.
            TypeError, ValueError: see ``from_dict``; or the file is no JSON object.
        """
        options = {name: changes.pop(name) for name in Source.OPTIONS if name in changes}
        source = name_or_path if isinstance(name_or_path, Source) else Source(name_or_path, **options)
        return read_config(source, cls, **changes)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> "DebertaConfig":
        return cls.from_dict(read_object(path))

    def to_json_file(self, path: str | os.PathLike) -> None:
        """Writes the file atomically; a link is replaced, not followed."""
        replace_file(Path(path), self.to_json_string().encode())

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / CONFIG)

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}".rstrip()


@dataclasses.dataclass(init=False, repr=False, eq=False)
class DebertaV2Config(DebertaConfig):
    """DeBERTa v2 and v3.

    Attributes:
        position_buckets: rows of the position table on either side; below 1, one row per distance.
        share_att_key: the table is projected with the weights of keys and queries.
        norm_rel_ebd: "layer_norm" normalises the table, "none" does not.
        conv_kernel_size, conv_groups, conv_act: the convolution parallel to the first layer (nGiE); 0 means none.
        attention_head_size: hidden_size / num_attention_heads by default.
        The others: see ``DebertaConfig``.

    Raises:
        TypeError, ValueError: see ``DebertaConfig``.
    """

    model_type = "deberta-v2"
    generation = 2

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    position_buckets: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    attention_head_size: int | None = None

    @property
    def normalises_table(self) -> bool:
        return "layer_norm" in (x.strip() for x in self.norm_rel_ebd.lower().split("|"))

    def _check(self) -> None:
        super()._check()
        for part in self.norm_rel_ebd.lower().split("|"):
            if part.strip() not in ("layer_norm", "none", ""):
                raise ValueError(f'norm_rel_ebd must be "layer_norm" or "none", got {self.norm_rel_ebd!r}')
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, got {self.conv_kernel_size}")
        if self.conv_kernel_size > 0 and (self.conv_groups < 1 or self.hidden_size % self.conv_groups):
            raise ValueError(f"conv_groups must divide hidden_size, {self.hidden_size}, got {self.conv_groups}")
        activation(self.conv_act)


def _check_number(name: str, value) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and abs(value) >= _INTEGERS_BELOW:
        digits = f"{value}" if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
        raise ValueError(f"{name} must be below 2**31, got {digits}")
    if isinstance(value, int) and value > _AT_MOST.get(name, value):
        raise ValueError(f"{name} must be at most {_AT_MOST[name]}, got {value}")


def read_config(source: Source, kind: type[DebertaConfig] | None = None, **changes) -> DebertaConfig:
    """Reads the config.json of a folder or of a model on the hub.

    Args:
        kind: the class of the configuration; None chooses it by the file's model_type.
        changes: replace values of the file.

    Raises:
        FileNotFoundError: there is no config.json.
        TypeError, ValueError: the file, or a value, is not as ``from_dict`` needs it; the message names the file.
    """
    path = config_file(source)
    if path is None:
        raise FileNotFoundError(f"there is no {CONFIG} in {source}")
    values = read_object(path)
    if kind is None:
        kinds, name = {x.model_type: x for x in (DebertaConfig, DebertaV2Config)}, values.get("model_type")
        if name not in kinds:
            raise ValueError(f"{path}: model_type must be one of {', '.join(kinds)}, got {name!r}")
        kind = kinds[name]
    try:
        return kind.from_dict(values, **{"name_or_path": source.name, **changes})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
