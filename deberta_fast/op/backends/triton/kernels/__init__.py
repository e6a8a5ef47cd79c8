"""Triton kernels, one per file; ``tile`` holds what they share."""
