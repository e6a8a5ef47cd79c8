"""What Hugging Face's Trainer does to models that are not Hugging Face's own."""

import sys
from types import FrameType


def folder_of_trainer(caller: FrameType) -> str | None:
    """The folder into which a Trainer saves, if it is the Trainer's ``_save`` that calls; otherwise None.

    Of a model that is no PreTrainedModel of transformers, it writes what ``state_dict()`` returns and nothing more. It
    asks the model for nothing else and calls nobody before the file is written, so only the caller tells where that is.
    """
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or caller.f_code.co_name != "_save":
        return None
    saving = caller.f_locals
    return saving.get("output_dir") if isinstance(saving.get("self"), trainer.Trainer) else None
