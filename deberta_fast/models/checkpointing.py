"""Activation checkpointing: a layer keeps its input for backward, and computes the rest again."""

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts


def keep_attention() -> tuple:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint`` that keeps the outputs of attention.

    A layer then keeps its input, attention's output (B, H, L, D) and its log-sum-exp (B, H, L). Gradients are those
    without checkpointing; on a CPU up to rounding, because torch has to see every operation of the layer, and what this
    library fuses around attention runs operation by operation.

    Native models take ``gradient_checkpointing_enable(keep_attention=True)``; patched ones, or those of another tool,

        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_attention})
    """
    return create_selective_checkpoint_contexts([torch.ops.deberta_fast.attention_forward.default])


_KEEP_ATTENTION = keep_attention


class Checkpointing:
    """The methods of a model that set checkpointing, by the names that the Trainer and PEFT call."""

    supports_gradient_checkpointing = True
    _input_hook = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        *,
        keep_attention: bool = False,
    ) -> None:
        """Stores one tensor per layer for backward in training, and recomputes the rest.

        The embeddings are computed again too, unless checkpointing is reentrant.

        Args:
            activation_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; use_reentrant defaults to False.
            every_n_layers: checkpoint only the layers 0, n, 2n ...; the others store everything.
            offload: not supported.
            keep_attention: store attention's output too, so that it is not computed again: its time grows with the
                square of the length. See ``keep_attention``.

        Raises:
            ValueError: an argument is not as described, or keep_attention cannot go with the keywords.
        """
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1, got {every_n_layers}")
        if offload:
            raise ValueError("offload=True is not supported: what is kept stays on its device")
        keywords = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if keep_attention:
            if keywords["use_reentrant"] or "context_fn" in keywords:
                raise ValueError(f"keep_attention needs use_reentrant=False and no other context_fn, got {keywords}")
            keywords["context_fn"] = _KEEP_ATTENTION
        encoder = self.base_model.encoder
        encoder.checkpointing = keywords
        encoder.checkpoint_every = every_n_layers

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        *,
        keep_attention: bool = False,
    ) -> None:
        """``activation_checkpointing_enable`` by its older name."""
        self.activation_checkpointing_enable(
            gradient_checkpointing_kwargs, every_n_layers, offload, keep_attention=keep_attention
        )

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.encoder.checkpointing = None

    activation_checkpointing_disable = gradient_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.encoder.checkpointing is not None

    def enable_input_require_grads(self) -> None:
        """Makes the embeddings' output require gradients even if they are frozen: for reentrant checkpointing, LoRA."""
        self.disable_input_require_grads()
        self._input_hook = self.get_input_embeddings().register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None


def _require_gradient(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
    output.requires_grad_()
