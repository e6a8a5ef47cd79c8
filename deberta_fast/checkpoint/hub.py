"""Finds files of a checkpoint or a tokenizer in a folder, or on the Hugging Face hub (needs huggingface_hub)."""

import dataclasses
import os
from pathlib import Path, PurePath


@dataclasses.dataclass(eq=False, repr=False)
class Source:
    """The folder or model from which ``from_pretrained`` loads. The keywords are also keywords of ``from_pretrained``.

    Args:
        name_or_path: a folder, or if that does not exist, a model on the hub ("microsoft/deberta-v3-base").
        revision: branch, tag or commit on the hub.
        cache_dir: folder of downloads; None for that of huggingface_hub.
        token: for private models; None for the one that huggingface_hub has stored.
        local_files_only: uses only files that were downloaded before.
        force_download: downloads files again. It has no effect on a folder.
        subfolder: folder of the files below ``name_or_path``.

    Raises:
        TypeError: ``name_or_path`` or ``subfolder`` is neither text nor a path.
        ValueError: ``subfolder`` leads out of the folder or the model.
        FileNotFoundError: the folder or subfolder does not exist, and the name cannot be one on the hub.
        ImportError: the name may be one on the hub, and huggingface_hub is not installed.
    """

    OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")

    name_or_path: str | os.PathLike
    _: dataclasses.KW_ONLY
    revision: str | None = None
    cache_dir: str | os.PathLike | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str | os.PathLike | None = None

    def __post_init__(self):
        if not isinstance(self.name_or_path, str | os.PathLike):
            raise TypeError(f"expected a folder or a name on the hub, got {type(self.name_or_path).__name__}")
        if not isinstance(self.subfolder, str | os.PathLike | None):
            raise TypeError(f"expected subfolder to be text or a path, got {type(self.subfolder).__name__}")
        self.name = os.fspath(self.name_or_path)
        below = PurePath(self.subfolder or "")
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"expected subfolder to lie below {self.name}, got {os.fspath(self.subfolder)!r}")
        self.subfolder = below.as_posix() if below.parts else None
        self.folder = Path(self.name, below) if Path(self.name).is_dir() else None
        if self.folder is not None:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"there is no subfolder {self.subfolder!r} in {self.name}")
            return
        if Path(self.name).is_file():
            raise NotADirectoryError(f"{self.name} is a file; expected the folder that it lies in")
        try:
            from huggingface_hub.utils import HFValidationError, validate_repo_id
        except ImportError:
            raise ImportError(
                f"there is no folder {self.name!r}; to look it up on the hub, pip install huggingface_hub"
            ) from None
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            raise FileNotFoundError(f"there is no folder {self.name!r}, and it is no name of the hub's") from None

    def __str__(self) -> str:
        return os.fspath(PurePath(self.name, self.subfolder)) if self.subfolder else self.name

    def file(self, name: str) -> Path | None:
        """Returns the path of a file, after a download if necessary; None if there is no such file.

        Raises:
            FileNotFoundError: there is no such model on the hub, or no access to it.
            ConnectionError: the hub does not answer, and the file was not downloaded before.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from huggingface_hub import constants, errors, hf_hub_download

        try:
            options = {option: getattr(self, option) for option in self.OPTIONS}
            return Path(hf_hub_download(self.name, name, **options))
        except errors.LocalEntryNotFoundError as error:
            if self.local_files_only or constants.HF_HUB_OFFLINE:
                return None  # Offline, a file that was not downloaded counts as missing.
            raise ConnectionError(f"{self.name}: the hub does not answer, and {name} was never downloaded") from error
        except errors.EntryNotFoundError:
            return None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"there is no folder {self.name!r}, nor a model of that name and revision on the hub that you may read"
            ) from error
