"""The base class of all models: loading and saving, and embeddings."""

import copy
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import FrameType

import torch
from torch import nn

from ..checkpoint import LoadingInfo, check_layers, fill, read_tensors, to_hf, to_native, without_memory, write_tensors
from ..checkpoint.hub import Source
from ..checkpoint.replace import unmixed
from ..op import backends
from .arguments import Device, byte_count, chosen_dtype, placement, spread, weight_files
from .attention import AttentionCache
from .checkpointing import Checkpointing
from .config import DebertaConfig
from .heads import LMHead
from .packing import Unpadding
from .weight_cache import WeightCache
from .wrappers import passes_by_wrapper


class PreTrainedModel(Checkpointing, nn.Module):
    """Base of the models: a module with a configuration, which loads and saves checkpoints."""

    config_class = DebertaConfig
    base_model_prefix = "deberta"
    main_input_name = "input_ids"
    # Read by the Trainer: losses are means, so gradient accumulation divides them; checkpoints omit nothing.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_save = None
    # Read by accelerate: a layer stays on one device.
    _no_split_modules = ["DebertaLayer"]
    # The half of a replaced-token-detection checkpoint to load
    checkpoint_part = "discriminator"

    def __init__(self, config: DebertaConfig):
        self._check_config(config)
        super().__init__()
        self.config = config

    def forward_packed(
        self,
        input_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        **inputs,
    ):
        """Calls the model with packed sequences: input_ids (T,), and any other arguments of ``forward``.

        Raises:
            RuntimeError: DistributedDataParallel holds the model, and this call would bypass it.
            TypeError, ValueError: see ``forward``.
        """
        if passes_by_wrapper(self):
            raise RuntimeError(
                "forward_packed leaves out the DistributedDataParallel that holds the model, and its processes would "
                "train with different gradients: call the wrapper instead, ddp(**inputs), with the same arguments"
            )
        if cu_seqlens is None:
            raise TypeError("cu_seqlens must be an int32 tensor (n + 1,), got None")
        return self(input_ids=input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **inputs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike | None,
        *,
        config: DebertaConfig | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype | str | None = None,
        device: Device | None = None,
        weights: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Device | dict | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        attn_implementation: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        weights_only: bool | None = None,
        trust_remote_code: bool | None = None,
        **changes,
    ):
        """Loads a checkpoint: Hugging Face's (safetensors, .bin, sharded or not, tf_model.h5) or Microsoft's.

        Args:
            name_or_path: a folder, or a name on the hub. None if config and state_dict are given.
            config: replaces the checkpoint's config.json.
            state_dict: replaces the checkpoint's tensors; names may be those of any checkpoint.
            dtype, torch_dtype: dtype of the parameters, or its name; "auto" for the checkpoint's, which may be
                half-precision. float32 by default.
            device: device of the parameters, the CPU by default.
            weights: name of the file to read, instead of the usual names.
            ignore_mismatched_sizes: initialise parameters whose shape in the checkpoint is different.
            output_loading_info: also return a ``LoadingInfo``.
            device_map: a device; "auto" for an accelerator if torch finds one, for the CPU otherwise; or a dictionary
                from parts of the model to devices, over which accelerate spreads them.
            variant: read files with this in their names: "fp16" for model.fp16.safetensors.
            use_safetensors: True reads only safetensors, False never; by default they come first.
            attn_implementation: the attention's backend, see ``set_backend``.
            low_cpu_mem_usage, weights_only, trust_remote_code: accepted and ignored. Parameters are never allocated
                twice, only tensors are unpickled, and there is no remote code.
            changes: values of the configuration to replace (``num_labels=3``), and revision, cache_dir, token,
                local_files_only, force_download and subfolder, see ``hub.Source``.

        Returns:
            The model, in evaluation mode. A warning names missing and unexpected parameters.

        Raises:
            FileNotFoundError: the checkpoint, or one of its files, does not exist.
            ValueError: a file is damaged or refused, a tensor has another shape, nothing in it fits the model, or
                arguments contradict one another.
            TypeError: ``changes`` names an unknown value, or config is another library's.
        """
        options = {name: changes.pop(name) for name in Source.OPTIONS if name in changes}
        source = None if name_or_path is None else Source(name_or_path, **options)
        if source is None and (config is None or state_dict is None):
            raise ValueError("without a folder or a name on the hub, config and state_dict must be given")
        cls._check_changes(changes)
        cls._check_backend(attn_implementation)
        files = weight_files(weights, variant, use_safetensors)
        device, device_map = placement(device, device_map)
        if config is not None:
            cls._check_config(config)
            config = type(config).from_dict(config.to_dict(), **changes) if changes else config

        def read():
            return (
                cls.config_class.from_pretrained(source, **changes) if config is None else config,
                *((state_dict, "state_dict") if state_dict is not None else read_tensors(source, weights=files)),
            )

        config, state_dict, file = read() if source is None else unmixed(source, read)
        origin = f"{name_or_path}: {file}"
        if "num_hidden_layers" not in changes:
            check_layers(state_dict, config.num_hidden_layers, origin)
        with without_memory():
            model = cls(copy.deepcopy(config))
        model.config.name_or_path = "" if source is None else source.name
        info: LoadingInfo = fill(
            model,
            state_dict,
            origin,
            version=config.generation,
            heads=config.num_attention_heads,
            part=cls.checkpoint_part,
            initialise=model._initialise,
            dtype=chosen_dtype(dtype, torch_dtype),
            device=device,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        model.eval().set_backend(attn_implementation)
        model = model if device_map is None else spread(model, device_map)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(
        cls,
        config: DebertaConfig,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
    ):
        """Makes a model with random weights. The arguments are those of ``from_pretrained``."""
        cls._check_backend(attn_implementation)
        model = cls(config).to(chosen_dtype(dtype, torch_dtype))
        model.set_backend(attn_implementation)
        return model

    @classmethod
    def _check_config(cls, config) -> None:
        kind = cls.config_class
        if isinstance(config, kind):
            return
        if isinstance(config, DebertaConfig):
            raise TypeError(f"{cls.__name__} takes a {kind.__name__}, got {type(config).__name__}")
        hint = ""
        if getattr(config, "model_type", None) == kind.model_type:
            hint = f"; deberta_fast.{kind.__name__}.from_dict(config.to_dict()) makes the one of the other"
        theirs = f"{type(config).__module__.partition('.')[0]}.{type(config).__name__}"
        raise TypeError(f"{cls.__name__} takes a deberta_fast.{kind.__name__}, got {theirs}{hint}")

    @classmethod
    def _check_changes(cls, changes: dict) -> None:
        known = {name for name in dir(cls.config_class) if not name.startswith("_")}
        unknown = sorted(set(changes) - known - {"num_labels"})
        if unknown:
            parameters = inspect.signature(cls.from_pretrained).parameters.values()
            options = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY] + list(Source.OPTIONS)
            raise TypeError(
                f"{cls.config_class.__name__} has no {', '.join(unknown)}; from_pretrained takes its values, and "
                f"{', '.join(options)}"
            )

    @staticmethod
    def _check_backend(attn_implementation: str | None) -> None:
        try:
            backends.check_name(attn_implementation)
        except ValueError as error:
            raise ValueError(f"attn_implementation names a backend: {error}") from None

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        safe_serialization: bool = True,
        save_function: Callable | None = None,
        push_to_hub: bool = False,
    ) -> None:
        """Writes config.json and safetensors under the names that Hugging Face loads.

        Args:
            folder: created if necessary. An earlier checkpoint in it is replaced.
            state_dict: replaces the model's state_dict, with the same names (as gathered from a sharded model).
            max_shard_size: bytes, or text such as "500MB"; larger models are split into several files.
            is_main_process: False writes nothing.
            safe_serialization: must be True.
            save_function: ignored; safetensors are written atomically.
            push_to_hub: must be False.

        Raises:
            ValueError: an argument is not as described.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: only safetensors are written, got False")
        if push_to_hub:
            self.push_to_hub()
        if not is_main_process:
            return
        config = self._config_to_save()
        tensors = self._hf_tensors(self.state_dict() if state_dict is None else state_dict)
        write_tensors(tensors, folder, max_shard_bytes=byte_count(max_shard_size), config=config.to_json_string())

    def push_to_hub(self, *arguments, **keywords) -> None:
        """Raises ValueError: huggingface_hub uploads checkpoints."""
        raise ValueError(
            "push_to_hub is not supported: huggingface_hub.upload_folder(repo_id=..., folder_path=...) uploads what "
            "save_pretrained has written"
        )

    def add_adapter(self, *arguments, **keywords) -> None:
        """Raises TypeError: peft adds adapters."""
        raise TypeError("adapters come from peft: peft.get_peft_model(model, config) adds them to a native model too")

    def _config_to_save(self) -> DebertaConfig:
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        return config

    def _hf_tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.config
        return to_hf(state, version=config.generation, heads=config.num_attention_heads, legacy=config.legacy)

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """Returns torch's state_dict. A Hugging Face Trainer that saves gets the names of ``save_pretrained``, and a
        config.json beside them, so that both libraries load its checkpoints.
        """
        state = super().state_dict(*args, **kwargs)
        folder = _trainer_folder(sys._getframe(1))
        if folder is None:
            return state
        self._config_to_save().save_pretrained(folder)
        return self._hf_tensors(state)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Loads like torch's; names may be those of any checkpoint, including Hugging Face's from the Trainer."""
        expected = set(self.state_dict())
        if not expected.issuperset(state_dict):
            native, ignored = to_native(
                dict(state_dict),
                version=self.config.generation,
                heads=self.config.num_attention_heads,
                expected=expected,
                part=self.checkpoint_part,
            )
            # Tensors of other heads are unexpected here, as in torch
            state_dict = {name: state_dict[name] for name in ignored} | native
        return super().load_state_dict(state_dict, strict, assign)

    def init_weights(self) -> None:
        """Initialises every parameter: normal with initializer_range, biases zero, LayerNorms one and zero."""
        for module in self.modules():
            self._initialise(module)

    def _initialise(self, module: nn.Module) -> None:
        with torch.no_grad():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
                module.weight.normal_(0.0, self.config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
                if getattr(module, "padding_idx", None) is not None:
                    module.weight[module.padding_idx].zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LMHead):
                module.bias.zero_()

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def name_or_path(self) -> str:
        """The folder or hub name that the model was loaded from, or ""."""
        return self.config.name_or_path

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and buffers."""
        return sum(x.nbytes for x in (*self.parameters(), *(self.buffers() if return_buffers else ())))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        embeddings = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if id(p) not in embeddings)

    def set_backend(self, backend: str | None) -> None:
        """Sets the attention's backend, a name of ``backends.BACKENDS``; None chooses the best for each call.

        Raises:
            ValueError: no backend has that name.
        """
        backends.check_name(backend)
        for layer in self.base_model.encoder.layer:
            layer.attention.self.backend = backend

    def set_unpad(self, unpad: bool | str, padding_rows: str = "hf") -> None:
        """Sets whether padding is removed between the embeddings and the last layer's output.

        Args:
            unpad: "auto", the default, removes padding where a (B, L) mask holds enough to pay: layers then see
                (T, hidden_size). True removes it wherever there is any, with one warning where it stays (masks of
                pairs, output_attentions, captured programs). False never does. Compiled and exported programs keep it.
                On a GPU this costs one synchronisation per call.
            padding_rows: the output for rows of padding. "hf", the default, gives Hugging Face's values, which losses,
                pooling over all positions and heads behind left padding read; one row per sequence then stands for all
                its padding, with one draw of dropout. "zeros" gives zeros: the loss of question answering then leaves
                padding out, and classifiers read the first token after left padding.

        Raises:
            ValueError: an argument has another value.
        """
        encoder = self.base_model.encoder
        encoder.unpadding = Unpadding(unpad, padding_rows)
        for layer in encoder.layer:
            layer.attention.self.padding_rows = padding_rows

    def set_constant_weights(self, constant: bool) -> None:
        """Promises that no weight will be written through ``.data``, which torch cannot see.

        In inference, values that depend only on weights are then cached on every device without comparing the weights,
        and the projections of queries, keys and values are cached as one matrix. Writes that torch sees, steps of
        optimizers, casts, moves and training still count. Without the promise, only projected position tables are
        cached, on a CPU, and every call compares the weights with a copy.
        """
        encoder = self.base_model.encoder
        encoder.cache = WeightCache(constant)
        for layer in encoder.layer:
            layer.attention.self.cache = AttentionCache(constant)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.base_model.embeddings.word_embeddings = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    def tie_weights(self) -> None:
        """Does nothing, except for a language model."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the word embeddings and the language model's output.

        Args:
            new_num_tokens: rows; None keeps their number.
            pad_to_multiple_of: rounds the rows up.
            mean_resizing: new rows are the mean of the old ones; False draws them as ``init_weights`` does.

        Returns:
            The word embeddings. New biases are zero.
        """
        old = self.get_input_embeddings()
        rows = old.num_embeddings if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        for name, value in (("new_num_tokens", rows), ("pad_to_multiple_of", multiple)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value}")
        rows = -(-rows // multiple) * multiple
        if rows <= (self.config.pad_token_id or 0):
            raise ValueError(f"new_num_tokens={rows} leaves no row for pad_token_id={self.config.pad_token_id}")
        if rows != old.num_embeddings:
            new = nn.Embedding(rows, old.embedding_dim, old.padding_idx, device="meta")
            new.weight = resized(old.weight, rows, self._new_rows(old.weight, rows, mean_resizing))
            self.set_input_embeddings(new)
        self._resize_output(rows, mean_resizing)
        for config in {id(m.config): m.config for m in (self, self.base_model)}.values():
            config.vocab_size = rows
        return self.get_input_embeddings()

    def _resize_output(self, rows: int, mean: bool) -> None:
        """Resizes the output of a language model."""

    def _new_rows(self, old: torch.Tensor, rows: int, mean: bool) -> torch.Tensor:
        if mean:
            return old.mean(0)
        return old.new_empty((max(rows - old.shape[0], 0), *old.shape[1:])).normal_(0.0, self.config.initializer_range)


def resized(old: nn.Parameter, rows: int, new_row: torch.Tensor | float) -> nn.Parameter:
    weight = old.new_empty((rows, *old.shape[1:]))
    with torch.no_grad():
        weight[: old.shape[0]] = old[:rows]
        weight[old.shape[0] :] = new_row
    return nn.Parameter(weight, requires_grad=old.requires_grad)


def _trainer_folder(caller: FrameType) -> str | None:
    """The folder into which a Trainer saves if its ``_save`` is the caller, or None.

    A Trainer stores only ``state_dict()`` of a model that is no transformers.PreTrainedModel, and does not tell it the
    folder.
    """
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or caller.f_code.co_name != "_save":
        return None
    saving = caller.f_locals
    return saving.get("output_dir") if isinstance(saving.get("self"), trainer.Trainer) else None
