"""Files of a checkpoint or a tokenizer: in a folder, or of a model on the Hugging Face hub (needs huggingface_hub)."""

import os
from pathlib import Path, PurePath


class Source:
    """Where ``from_pretrained`` looks; the keywords are its keywords too.

    Args:
        name_or_path: a folder; where there is none of that name, a model on the hub ("microsoft/deberta-v3-base").
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; None for huggingface_hub's own place.
        token: for private models; None for the one that huggingface_hub has stored.
        local_files_only: take what was downloaded before, and nothing else.
        force_download: download again what was downloaded before. It means nothing for a folder.
        subfolder: the files lie in this folder below ``name_or_path``.

    Raises:
        TypeError: ``name_or_path`` or ``subfolder`` is neither text nor a path.
        ValueError: ``subfolder`` leads out of the folder or the model.
        FileNotFoundError: there is no such folder or subfolder, and it cannot be a name on the hub.
        ImportError: it may be one, and huggingface_hub is not installed.
    """

    OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | os.PathLike | None = None,
    ):
        if not isinstance(name_or_path, str | os.PathLike):
            raise TypeError(f"expected a folder or a name on the hub, got {type(name_or_path).__name__}")
        if not isinstance(subfolder, str | os.PathLike | None):
            raise TypeError(f"expected subfolder to be text or a path, got {type(subfolder).__name__}")
        self.name = os.fspath(name_or_path)
        self.subfolder = PurePath(subfolder or "")
        if self.subfolder.is_absolute() or ".." in self.subfolder.parts:
            raise ValueError(f"expected subfolder to lie below {self.name}, got {os.fspath(subfolder)!r}")
        self.folder = Path(name_or_path, self.subfolder) if Path(name_or_path).is_dir() else None
        self._download = dict(
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=self.subfolder.as_posix() if self.subfolder.parts else None,
        )
        if self.folder is not None:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"there is no subfolder {os.fspath(subfolder)!r} in {self.name}")
            return
        if Path(name_or_path).is_file():
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
        return os.fspath(PurePath(self.name, self.subfolder)) if self.subfolder.parts else self.name

    def file(self, name: str) -> Path | None:
        """The path of one file, downloaded where need be; None where there is none of that name.

        Raises:
            FileNotFoundError: there is no such model on the hub, or no access to it.
            ConnectionError: the hub does not answer, and the file was not downloaded before.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from huggingface_hub import constants, errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.name, name, **self._download))
        except errors.LocalEntryNotFoundError as error:
            if self._download["local_files_only"] or constants.HF_HUB_OFFLINE:
                return None  # not among what was downloaded: as if it did not exist
            raise ConnectionError(f"{self.name}: the hub does not answer, and {name} was never downloaded") from error
        except errors.EntryNotFoundError:
            return None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"there is no folder {self.name!r}, nor a model of that name and revision on the hub that you may read"
            ) from error
