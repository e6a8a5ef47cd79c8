"""The settings of a pretraining run: a YAML file, and ``key=value`` changes to it.

Every section below is a section of the file. What is left out has its default; a name that does not exist is an error.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .masking import Masking
from .sharing import SHARINGS

OBJECTIVES = ("rtd", "mlm")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "constant")
STRATEGIES = ("ddp", "fsdp")
# Shares of the chosen tokens that become [MASK] and that stay, if the settings do not say
MASKS = {"rtd": {"mask": 1.0, "keep": 0.0}, "mlm": {"mask": 0.8, "keep": 0.1}}


@dataclasses.dataclass
class Replaced:
    """Replaced-token detection.

    Attributes:
        generator_layers: half of the discriminator's by default.
        sharing: of embeddings, "gdes", "es" or "nes"; see ``SharedEmbedding``.
        temperature: T of the softmax that replacements are drawn from.
        weight: lambda, the factor of the discriminator's loss. 50 is ELECTRA's (arXiv 2003.10555, section 3.1), 10 the
            default of Microsoft's code. With two optimizers, as here and there, it acts through the clipping of
            gradients and AdamW's eps only; with sharing "es" it weighs the gradients of the shared embeddings.
    """

    generator_layers: int | None = None
    sharing: str = "gdes"
    temperature: float = 1.0
    weight: float = 50.0


@dataclasses.dataclass
class Data:
    """Where text comes from, and how it becomes rows of tokens.

    Attributes:
        train: files or folders of .txt, .jsonl and .parquet; or ``dataset``, a name on the hub, with its
            ``dataset_config`` and ``split``, read as a stream.
        shards: a folder for the tokens. Texts are tokenised into it once, unless it is complete; without texts it must
            be. None tokenises on the fly.
        evaluation: files or folders of texts to evaluate on; none evaluates nothing.
        text_field: the field or column of JSON lines, Parquet and datasets.
        documents: what one document of a .txt file is, "blank-line" (blank lines between) or "line".
        length: most tokens of a row, special ones included.
        rows: "packed" fills rows with whole documents, no token of which sees another document; "chunks" joins all
            documents and cuts the result, as Microsoft's code does.
        processes: tokenise; 0 is this one alone.
        workers: mask and pack rows beside training; 0 is none. Results do not depend on either.
        shuffle_rows: rows of the buffer that shuffles a stream.
    """

    train: list[str] = dataclasses.field(default_factory=list)
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    shards: str | None = None
    evaluation: list[str] = dataclasses.field(default_factory=list)
    text_field: str = "text"
    documents: str = "blank-line"
    length: int = 512
    rows: str = "packed"
    processes: int = 0
    workers: int = 0
    shuffle_rows: int = 1024


@dataclasses.dataclass
class Training:
    """The optimization.

    Attributes:
        steps: of the optimizers.
        batch_tokens: tokens of a step, over all processes; whole rows of ``data.length``.
        micro_batch_tokens: tokens that one process runs at once; gradients of several such batches are accumulated.
            None means a process's whole share.
        learning_rate: peak of the language model's; discriminator_learning_rate: the same by default.
        warmup_steps: the rate rises linearly for so many steps.
        schedule: "linear" or "cosine" to 0 at the last step, or "constant", after the warm-up.
        weight_decay: AdamW's, of matrices only: not of biases and norms.
        betas, eps: AdamW's.
        clip: largest norm of each model's gradients.
        precision: "fp32"; "bf16" by autocast; "fp16" by autocast with scaled losses.
        strategy: of several processes, "ddp" or "fsdp".
        checkpointing: "none"; "layers" recomputes layers in backward; "keep_attention" all but their attention.
        compile: compile each layer by torch.compile.
        device: "cpu", "cuda", ...; a GPU by default if there is one.
        bad_step: "stop" or "skip", where a loss or a gradient is not finite, or a loss exceeds spike_factor times its
            running mean.
        spike_factor: None looks at finiteness only.
        peak_tflops: the device's, for MFU; known for some GPUs.
    """

    steps: int = 1000
    batch_tokens: int = 131072
    micro_batch_tokens: int | None = None
    learning_rate: float = 1e-4
    discriminator_learning_rate: float | None = None
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.01
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-6
    clip: float = 1.0
    precision: str = "fp32"
    strategy: str = "ddp"
    checkpointing: str = "none"
    compile: bool = False
    device: str | None = None
    bad_step: str = "stop"
    spike_factor: float | None = None
    peak_tflops: float | None = None


@dataclasses.dataclass
class Reporting:
    """What is written when.

    Attributes:
        log_every, evaluate_every, save_every: in steps; 0 is never, but a run ends with an evaluation and a checkpoint.
        keep: the last so many checkpoints are kept.
        tensorboard: also write events for TensorBoard; JSON lines are always written.
        progress: show a progress bar on a terminal.
    """

    log_every: int = 100
    evaluate_every: int = 0
    save_every: int = 1000
    keep: int = 3
    tensorboard: bool = False
    progress: bool = True


@dataclasses.dataclass
class Settings:
    """One run.

    Attributes:
        output: its folder: log.jsonl, losses.png, checkpoints/, settings.yaml.
        tokenizer: a folder, or a name on the hub.
        objective: "rtd" or "mlm".
        model: values of ``DebertaV2Config``, or with ``model_type: deberta`` of ``DebertaConfig``; of the discriminator
            if there is one. vocab_size is the tokenizer's by default.
        generator, discriminator: checkpoints to start from, folders or names on the hub, with ``::FILE`` where the
            weights have an unusual name. A file that holds both may be given twice.
        seed: of the weights, the order of rows, masks and dropout.
    """

    output: str = ""
    tokenizer: str = ""
    objective: str = "rtd"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    generator: str | None = None
    discriminator: str | None = None
    seed: int = 0
    rtd: Replaced = dataclasses.field(default_factory=Replaced)
    masking: Masking = dataclasses.field(default_factory=lambda: Masking(**MASKS["rtd"]))
    data: Data = dataclasses.field(default_factory=Data)
    training: Training = dataclasses.field(default_factory=Training)
    reporting: Reporting = dataclasses.field(default_factory=Reporting)

    def __post_init__(self):
        _check(self)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def rows_per_step(self) -> int:
        return self.training.batch_tokens // self.data.length


def read_settings(path: str | Path | None, changes: Sequence[str] = ()) -> Settings:
    """Reads a YAML file, and replaces what ``section.name=value`` says; values are YAML too.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a name does not exist, or a value is not as described.
        ImportError: PyYAML is absent.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("settings are YAML, which needs PyYAML: pip install pyyaml") from None
    values = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold sections and their values, got {type(values).__name__}")
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"a change must be section.name=value, got {change!r}")
        *sections, last = name.strip().split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"{change!r}: {section} is a value and no section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{change!r}: the value is no YAML") from None
    masking = values.get("masking") or {}
    if isinstance(masking, dict):
        values["masking"] = {**MASKS.get(values.get("objective", "rtd"), {}), **masking}
    return made(Settings, values, "")


def write_settings(settings: Settings, path: Path) -> None:
    import yaml

    from ..checkpoint.replace import replace_file

    replace_file(path, yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True).encode())


def made(kind: type, values: dict, where: str):
    """Makes a dataclass of a dictionary; ``where`` is its path in the file, for errors."""
    if not isinstance(values, dict):
        raise TypeError(f"{where or 'the settings'} must be a section with values, got {values!r}")
    hints, given = typing.get_type_hints(kind), {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            raise ValueError(f"there is no setting {path}{f'; did you mean {near[0]}?' if near else ''}")
        hint = hints[name]
        given[name] = made(hint, value or {}, path) if dataclasses.is_dataclass(hint) else _converted(path, value, hint)
    return kind(**given)


def _converted(path: str, value: Any, hint: Any) -> Any:
    """Checks a value's type. YAML reads 1e-4 as text, and integers where floats are meant."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option)
        if origin is list and isinstance(value, list | str):
            (item,) = typing.get_args(option)
            items = [value] if isinstance(value, str) else value
            return [_converted(f"{path}[{i}]", x, item) for i, x in enumerate(items)]
        if origin is dict and isinstance(value, dict):
            return value
        if option is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    raise TypeError(f"{path} must be {expected}, got {value!r}")


def _check(settings: Settings) -> None:
    for name, value, allowed in (
        ("objective", settings.objective, OBJECTIVES),
        ("rtd.sharing", settings.rtd.sharing, SHARINGS),
        ("data.rows", settings.data.rows, ("packed", "chunks")),
        ("data.documents", settings.data.documents, ("blank-line", "line")),
        ("training.schedule", settings.training.schedule, SCHEDULES),
        ("training.precision", settings.training.precision, PRECISIONS),
        ("training.strategy", settings.training.strategy, STRATEGIES),
        ("training.checkpointing", settings.training.checkpointing, ("none", "layers", "keep_attention")),
        ("training.bad_step", settings.training.bad_step, ("stop", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    training, data, reporting = settings.training, settings.data, settings.reporting
    for name, number, least in (
        ("training.steps", training.steps, 1),
        ("training.warmup_steps", training.warmup_steps, 0),
        ("data.length", data.length, 8),
        ("data.processes", data.processes, 0),
        ("data.workers", data.workers, 0),
        ("data.shuffle_rows", data.shuffle_rows, 1),
        ("reporting.log_every", reporting.log_every, 1),
        ("reporting.evaluate_every", reporting.evaluate_every, 0),
        ("reporting.save_every", reporting.save_every, 0),
        ("reporting.keep", reporting.keep, 1),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    for name, amount in (
        ("training.learning_rate", training.learning_rate),
        ("training.clip", training.clip),
        ("training.eps", training.eps),
        ("rtd.temperature", settings.rtd.temperature),
        ("rtd.weight", settings.rtd.weight),
    ):
        if not 0 < amount < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {amount}")
    if len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas):
        raise ValueError(f"training.betas must be two numbers from 0 to below 1, got {training.betas}")
    if training.precision == "fp16" and training.strategy == "fsdp":
        raise ValueError("training.strategy=fsdp takes precision fp32 or bf16: scaled losses are for ddp, got fp16")
    if training.batch_tokens < data.length:
        raise ValueError(f"training.batch_tokens must be a row at least, {data.length}, got {training.batch_tokens}")
    if training.micro_batch_tokens is not None and training.micro_batch_tokens < data.length:
        raise ValueError(
            f"training.micro_batch_tokens must be a row at least, {data.length}, got {training.micro_batch_tokens}"
        )
    if settings.objective == "rtd" and (settings.masking.mask, settings.masking.keep) != (1.0, 0.0):
        raise ValueError(
            "with objective rtd every chosen token becomes [MASK]: masking.mask must be 1 and masking.keep 0, got "
            f"{settings.masking.mask} and {settings.masking.keep}"
        )


def checked_to_start(settings: Settings) -> Settings:
    """Checks what a run needs besides valid values: where to write, and what to read."""
    for name in ("output", "tokenizer"):
        if not getattr(settings, name):
            raise ValueError(f"{name} must be given: a folder")
    data = settings.data
    if sum((bool(data.train), bool(data.dataset))) > 1:
        raise ValueError("data.train and data.dataset exclude each other, got both")
    if not (data.train or data.dataset or data.shards):
        raise ValueError("data.train, data.dataset or data.shards must say where the text is, got none")
    if not (settings.model or settings.discriminator or settings.generator):
        raise ValueError("model must hold the configuration's values, or a checkpoint must be given to start from")
    if settings.objective == "mlm" and settings.discriminator:
        raise ValueError("objective mlm trains a generator alone, got a discriminator")
    if settings.objective == "rtd" and settings.discriminator and not settings.generator:
        raise ValueError("a discriminator alone cannot be continued: give its generator too, got none")
    return settings
