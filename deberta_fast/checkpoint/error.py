"""The error of all readers of checkpoints."""


class CheckpointError(ValueError):
    """A file of a checkpoint that cannot be used; the message names it and says what is wrong."""
