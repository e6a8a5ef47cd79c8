"""The kernels, one a file; ``tile`` is what they share."""
