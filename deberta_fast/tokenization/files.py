"""Reads and writes the files of a tokenizer."""

import inspect
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

from ..checkpoint.hub import Source
from ..checkpoint.json_object import read_object
from ..checkpoint.replace import replace_file
from .special_tokens import NAMES, AddedToken, as_added_token

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER = "tokenizer.json"
# transformers 5 writes these into tokenizer_config.json for its own loading. They are not settings of a tokenizer.
FOREIGN_SETTINGS = ("tokenizer_class", "backend", "is_local", "local_files_only", "transformers_version")


def save(folder: str | os.PathLike, prefix: str | None, name: str, content: bytes | dict) -> str:
    """Writes a file, a dict as JSON, and returns its path. Raises NotADirectoryError if there is no such folder."""
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"expected a folder to save in, got {os.fspath(folder)}")
    path = Path(folder, f"{prefix}-{name}" if prefix else name)
    if isinstance(content, dict):
        content = (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    replace_file(path, content)
    return str(path)


def existing(path: str | os.PathLike) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    return os.fspath(path)


def missing(source: Source, *names: str) -> FileNotFoundError:
    return FileNotFoundError(f"there is no {' and no '.join(names)} in {source}")


class Files:
    """``from_pretrained`` and ``save_pretrained``.

    A subclass has what ``TokenizerBase`` has, ``vocab_files_names`` (names of files by argument of ``__init__``),
    ``_find_files(source)`` (arguments for the files that exist) and ``save_vocabulary``.
    """

    vocab_files_names: dict[str, str]
    is_fast: bool
    can_save_slow_tokenizer = True  # whether ``save_vocabulary`` can write the slow tokenizer's vocabulary

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        use_fast: bool | None = None,
        trust_remote_code: bool | None = None,
        **overrides,
    ):
        """Loads the tokenizer of a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a model on the hub (needs huggingface_hub).
            use_fast: has no effect; a warning follows if the class contradicts it.
            trust_remote_code: has no effect, since no code is loaded.
            overrides: arguments of ``__init__``, which take precedence over those in tokenizer_config.json; and
                revision, cache_dir, token, local_files_only, force_download and subfolder as in ``hub.Source``.

        Raises:
            FileNotFoundError: there is no such folder or model, or it lacks a file that is needed.
            TypeError: an override is no argument of ``__init__``.
            ValueError: a file is damaged.
        """
        options = {name: overrides.pop(name) for name in Source.OPTIONS if name in overrides}
        source = Source(pretrained_model_name_or_path, **options)
        if use_fast is not None and bool(use_fast) != cls.is_fast:
            other = cls.__name__.removesuffix("Fast") + ("" if cls.is_fast else "Fast")
            warnings.warn(f"use_fast={use_fast} does nothing for a {cls.__name__}: see {other}", stacklevel=2)
        known = cls._arguments()
        unknown = [name for name in overrides if name not in known]
        if unknown:
            raise TypeError(f"{cls.__name__} has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        path = source.file(CONFIG)
        config = {} if path is None else read_object(path)
        try:
            return cls._from_files(source, config, overrides, known)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # Such an error names the file already, or is about the caller's arguments.
            named = any(name in str(error) for name in (str(source), *overrides))
            if named or (overrides and isinstance(error, TypeError)):
                raise
            reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{path or source} cannot be used: {reason}") from error

    @classmethod
    def _from_files(cls, source: Source, config: dict, overrides: dict, known: set[str]):
        saved_by = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        if saved_by.startswith("Deberta") and saved_by != cls.__name__.removesuffix("Fast"):
            saved_by = config["tokenizer_class"]
            raise ValueError(f"{source} holds a {saved_by}, according to its {CONFIG}; {cls.__name__} cannot read it")
        # Paths in a config exist only on the machine that wrote it.
        paths = (*cls.vocab_files_names, "tokenizer_file")
        saved = {name: value for name, value in config.items() if name not in paths}
        settings = {name: value for name, value in saved.items() if name in known}
        if "max_len" in config:  # the older name of model_max_length
            settings.setdefault("model_max_length", config["max_len"])
        settings.update(cls._saved_tokens(source, config, overrides))
        settings.update(cls._find_files(source))
        settings.update(overrides, name_or_path=source.name)
        # Special tokens get the flags of the added tokens with the same text.
        by_content = {token.content: token for token in settings.get("added_tokens_decoder", {}).values()}
        for name in NAMES:
            if (content := content_of(settings.get(name))) in by_content:
                settings[name] = by_content[content]
        tokenizer = cls(**settings)
        # Settings of other libraries stay in the file when it is saved again.
        others = {name: value for name, value in saved.items() if name not in (*known, *FOREIGN_SETTINGS)}
        tokenizer.init_kwargs = {**others, **tokenizer.init_kwargs}
        return tokenizer

    @classmethod
    def _arguments(cls) -> set[str]:
        """Returns the names of the arguments of ``__init__``."""
        inits = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
        parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
        return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.POSITIONAL_ONLY)} - {"self"}

    @classmethod
    def _saved_tokens(cls, source: Source, config: dict, overrides: dict) -> dict:
        """Reads the special and added tokens of the files, as arguments of ``__init__``."""
        if "added_tokens_decoder" in config:
            saved = config["added_tokens_decoder"]
            return {"added_tokens_decoder": {int(index): as_added_token(token) for index, token in saved.items()}}
        # transformers before 4.34 and transformers 5 write the tokens into other files.
        settings, decoder = {}, {}
        for name, value in _read_if_any(source, SPECIAL_TOKENS).items():
            if overrides.get(name):
                continue
            if name == "additional_special_tokens":
                more = [as_added_token(token, special=True) for token in (config.get(name) or [])]
                settings[name] = more + [_special(token) for token in value]
            elif name in NAMES:
                settings[name] = _special(value) if isinstance(value, dict) else value
        special = {content_of({**config, **settings, **overrides}.get(name)) for name in NAMES}
        special |= {str(token) for token in settings.get("additional_special_tokens", ())}
        for content, index in _read_if_any(source, ADDED_TOKENS).items():
            decoder[index] = AddedToken(content, special=content in special)
        return {**settings, "added_tokens_decoder": decoder | cls._tokens_of_backend_file(source)}

    @classmethod
    def _tokens_of_backend_file(cls, source: Source) -> dict[int, AddedToken]:
        """Reads the added tokens of tokenizer.json, for slow tokenizers; fast ones load that file as a whole."""
        content = {} if cls.is_fast else _read_if_any(source, TOKENIZER)
        return {token["id"]: as_added_token(token) for token in content.get("added_tokens", ())}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        *,
        push_to_hub: bool = False,
    ) -> tuple[str, ...]:
        """Writes all files of the tokenizer; ``from_pretrained`` and transformers read them.

        Args:
            save_directory: the folder, which is made if it does not exist. A file raises NotADirectoryError.
            legacy_format: for a fast tokenizer, True: omit tokenizer.json; False: omit the slow tokenizer's vocabulary.
                ValueError if the tokenizer cannot do this.
            filename_prefix: the names of the files begin with it and "-".
            push_to_hub: True raises ValueError; huggingface_hub uploads folders.

        Returns:
            The paths of the files.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported: save, and call huggingface_hub.upload_folder")
        folder = Path(save_directory)
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
        tokens = {
            name: [_flags(token) for token in value] if isinstance(value, list) else _flags(value)
            for name, value in self.special_tokens_map_extended.items()
        }
        config = save(folder, filename_prefix, CONFIG, self._config())
        special_tokens = save(folder, filename_prefix, SPECIAL_TOKENS, tokens)
        return (config, special_tokens, *self._save_backend(folder, legacy_format, filename_prefix))

    def _save_backend(self, folder: Path, legacy_format: bool | None, filename_prefix: str | None) -> tuple[str, ...]:
        """Writes the files of the slow tokenizer: vocabulary and added tokens."""
        if legacy_format is False:
            raise ValueError("legacy_format=False is for fast tokenizers: a slow one has no tokenizer.json")
        paths = self.save_vocabulary(folder, filename_prefix)
        added = {token: index for token, index in self.added_tokens_encoder.items() if index >= self.vocab_size}
        return (*paths, save(folder, filename_prefix, ADDED_TOKENS, added)) if added else paths

    def _config(self) -> dict:
        name = type(self).__name__
        return {
            **dict.fromkeys(NAMES),  # A token that is not set is saved as null, so that it gets no default when loaded.
            **{name: getattr(self, name, value) for name, value in self.init_kwargs.items()},
            **self.special_tokens_map,
            "model_max_length": self.model_max_length,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "extra_special_tokens": {},
            "added_tokens_decoder": {str(index): asdict(token) for index, token in self.added_tokens_decoder.items()},
            "tokenizer_class": name.removesuffix("Fast") if self.can_save_slow_tokenizer else name,
        }


def _read_if_any(source: Source, name: str) -> dict:
    """Returns the object in a JSON file; an empty one if there is no such file."""
    path = source.file(name)
    return {} if path is None else read_object(path)


def content_of(token: dict | AddedToken | str | None) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def _special(token: dict | str) -> AddedToken:
    return as_added_token({**token, "special": True} if isinstance(token, dict) else token, special=True)


def _flags(token: AddedToken) -> dict:
    return {name: value for name, value in asdict(token).items() if name != "special"}
