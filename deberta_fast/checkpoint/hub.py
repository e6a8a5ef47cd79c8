"""Files of a checkpoint or a tokenizer: in a folder, or of a model on the Hugging Face hub (needs huggingface_hub)."""

import os
from pathlib import Path


class Source:
    """Where ``from_pretrained`` looks; the keywords are its keywords too.

    Args:
        name_or_path: a folder; where there is none of that name, a model on the hub ("microsoft/deberta-v3-base").
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; None for huggingface_hub's own place.
        token: for private models; None for the one that huggingface_hub has stored.
        local_files_only: take what was downloaded before, and nothing else.

    Raises:
        TypeError: ``name_or_path`` is neither text nor a path.
        FileNotFoundError: there is no such folder, and it cannot be a name on the hub.
        ImportError: it may be one, and huggingface_hub is not installed.
    """

    OPTIONS = ("revision", "cache_dir", "token", "local_files_only")

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ):
        if not isinstance(name_or_path, str | os.PathLike):
            raise TypeError(f"expected a folder or a name on the hub, got {type(name_or_path).__name__}")
        self.name = os.fspath(name_or_path)
        self.folder = Path(name_or_path) if Path(name_or_path).is_dir() else None
        self._download = dict(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        if self.folder is not None:
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
        return self.name

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
