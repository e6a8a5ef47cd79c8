"""What every reader of a checkpoint raises."""


class CheckpointError(ValueError):
    """A file of a checkpoint that cannot be used; the message names it and says what is wrong."""
