"""Whole encoders: token ids and a mask in, the last layer's states out.

The DeBERTas are one model on one set of weights, except int8's; so are the BERTs, and the ModernBERTs.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, ModernBertConfig, ModernBertModel

import deberta_fast
from deberta_fast.models import onednn_linear

from .. import models
from . import Entry, Forward

VOCABULARY = 4096
BERT_POSITIONS = 8192
SHORTEST = 0.1  # shortest length of a variable batch, divided by the longest
GRADIENTS = ("embeddings.word_embeddings.weight", "encoder.rel_embeddings.weight")  # gradients that are compared
SCORES_HELD = {"forward": (6, 0), "forward+backward": (4, 2.5)}  # matrices that eager holds: at once, and per layer


class Size(NamedTuple):
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int


# DeBERTa's and BERT's size, and ModernBERT's of the same width. tiny serves to try this out.
SIZES = {
    "tiny": (Size(2, 64, 2, 96), Size(4, 64, 2, 48)),
    "v3-base": (Size(12, 768, 12, 3072), Size(22, 768, 12, 1152)),
    "v3-large": (Size(24, 1024, 16, 4096), Size(28, 1024, 16, 2624)),
}


class Case(NamedTuple):
    """The columns that all rows of a group share."""

    model: str
    dtype: str
    passes: str
    threads: int
    batch: int
    length: int
    variable: bool

    def eager_bytes(self) -> int:
        """Estimates the bytes of Hugging Face's dense scores, from measurements at length 4096 on the CPU."""
        size = SIZES[self.model][0]
        at_once, by_layer = SCORES_HELD[self.passes]
        scores = self.batch * size.num_attention_heads * self.length**2 * getattr(torch, self.dtype).itemsize
        return int((at_once + by_layer * size.num_hidden_layers) * scores)


class Batch:
    """Random token ids, padded at the right. Variable lengths are spread evenly from SHORTEST to 1 times the longest.

    Attributes:
        input_ids, attention_mask: int64 (B, L); 0 for padding.
        packed_ids, positions: int64 (T,), the valid tokens and their positions in their sequences.
        cu_seqlens: int32 (B + 1,)
    """

    def __init__(self, batch: int, length: int, variable: bool, device: str):
        generator = torch.Generator().manual_seed(batch * length)
        lengths = torch.full((batch,), length)
        if variable:
            even = torch.linspace(SHORTEST, 1, batch) * length
            lengths = even.round().long().clamp(min=1)[torch.randperm(batch, generator=generator)]
        ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
        valid = torch.arange(length) < lengths[:, None]
        self.attention_mask = valid.long().to(device)
        self.input_ids = (ids * valid).to(device)
        self.packed_ids = ids[valid].to(device)
        self.positions = torch.arange(length).expand(batch, length)[valid].to(device)
        self.cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        self.longest = int(lengths.max())
        self.tokens = int(lengths.sum())
        self._generator, self._gradients = generator, {}

    def packed(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the valid tokens' states (T, hidden_size) of (B, L, hidden_size), or of states already packed."""
        return states if states.dim() == 2 else states[self.attention_mask.bool()]

    def gradient(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the same gradient for every variant, zero for padding, in the layout of its ``states``."""
        key = tuple(states.shape)
        if key not in self._gradients:
            shape = (*self.attention_mask.shape, states.shape[-1])
            if shape not in self._gradients:
                gradient = torch.randn(shape, generator=self._generator).to(states)
                self._gradients[shape] = gradient * self.attention_mask.unsqueeze(-1).to(states)
            if key != shape:
                self._gradients[key] = self.packed(self._gradients[shape])
        return self._gradients[key]


class Encoders:
    """The modules of all variants of one size, cached when they are first made."""

    def __init__(self, size: str, dtype: torch.dtype, device: str):
        self.size, self.dtype, self.device = size, dtype, device
        self.deberta = self._model(DebertaV2Model, deberta_config(DebertaV2Config, size))
        draw_weights(self.deberta)
        self._cached = {"eager": self.deberta}

    def cached(self, name: str, make: Callable[[], object]):
        if name not in self._cached:
            self._cached[name] = make()
        return self._cached[name]

    def modernbert(self) -> ModernBertModel:
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        shape = SIZES[self.size][1]._asdict() | ids | {"vocab_size": VOCABULARY}
        config = ModernBertConfig(**shape, attn_implementation="sdpa", reference_compile=False)
        return self.cached("modernbert", lambda: self._model(ModernBertModel, config))

    def bert(self) -> BertModel:
        shape = SIZES[self.size][0]._asdict() | {"vocab_size": VOCABULARY, "max_position_embeddings": BERT_POSITIONS}
        config = BertConfig(**shape, pad_token_id=0, attn_implementation="sdpa")
        # DebertaV2Model and ModernBertModel have no pooling layer either.
        return self.cached("bert", lambda: self._model(functools.partial(BertModel, add_pooling_layer=False), config))

    def bert_onednn(self) -> BertModel:
        def make():
            twin = models.sharing_parameters(self.bert())
            for linear in (module for module in twin.modules() if type(module) is nn.Linear):
                linear.forward = lambda x, own=linear: onednn_linear.product(x, own.weight, own.bias)
            return twin

        return self.cached("bert-onednn", make)

    def native(self) -> deberta_fast.DebertaV2Model:
        config = deberta_config(deberta_fast.DebertaV2Config, self.size)
        return self.cached("native", lambda: models.native(deberta_fast.DebertaV2Model, config, self.deberta))

    def patched(self, **options) -> nn.Module:
        name = f"patched{options}"
        return self.cached(name, lambda: deberta_fast.patch(models.sharing_parameters(self.deberta), **options))

    def drop_gradients(self) -> None:
        for name in ("eager", "bert", "modernbert"):
            if name in self._cached:
                # The list is cached too, because walking the modules takes longer than some calls.
                for parameter in self.cached(f"{name}'s", lambda name=name: list(self._cached[name].parameters())):
                    parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradients of two of DeBERTa's parameters, which depend on the whole model."""
        return [self.deberta.get_parameter(name).grad for name in GRADIENTS]

    def _model(self, kind: Callable[..., nn.Module], config) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device):
            return kind(config).to(self.dtype).eval()


def deberta_config(kind: type, size: str):
    """Makes Hugging Face's or this package's configuration of DeBERTa v3, with VOCABULARY words, without dropout."""
    changes = dict(vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return kind(**models.V3_BASE | SIZES[size][0]._asdict() | changes)


def draw_weights(model: nn.Module) -> None:
    """Draws weights that keep unit variance. With the usual deviation of 0.02, position terms hardly change states."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            continue
        fan_in = 100 if parameter.dim() == 1 else 1 if "embeddings" in name else parameter.shape[1]
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def padded(model: Callable, batch: Batch) -> Forward:
    return lambda: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


def packed(forward_packed: Callable, batch: Batch) -> Forward:
    ids, ends, longest = batch.packed_ids, batch.cu_seqlens, batch.longest
    return lambda: forward_packed(ids, ends, max_seqlen=longest).last_hidden_state


def native_compiled(encoders: Encoders, batch: Batch) -> Forward:
    model = encoders.native()
    if batch.tokens < batch.input_ids.numel():
        return packed(torch.compile(model.forward_packed, dynamic=False), batch)
    return padded(torch.compile(model, dynamic=False), batch)


def native_graph(encoders: Encoders, batch: Batch) -> Forward:
    inside = copy.copy(batch)
    inside.input_ids, inside.attention_mask = batch.input_ids.clone(), batch.attention_mask.clone()
    forward, stream, graph = padded(encoders.native(), inside), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            states = forward()

    def replay():
        inside.input_ids.copy_(batch.input_ids)
        inside.attention_mask.copy_(batch.attention_mask)
        graph.replay()
        return states

    return replay


def _modernbert_by(attention: str, encoders: Encoders) -> ModernBertModel:
    def make():
        twin = models.sharing_parameters(encoders.modernbert())
        twin.set_attn_implementation(attention)
        return twin

    return encoders.cached(attention, make)


def modernbert_packed(encoders: Encoders, batch: Batch) -> Forward:
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    def attention(module, query, key, value, mask, *, scaling, sliding_window, cu_seq_lens_q, max_length_q, **_):
        reach = -1 if sliding_window is None else sliding_window - 1
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        output = varlen_attn(
            query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=(reach, reach),
        )  # fmt: skip
        return output.unsqueeze(0), None

    AttentionInterface.register("varlen", attention)
    model = _modernbert_by("varlen", encoders)
    ids, positions = batch.packed_ids.unsqueeze(0), batch.positions.unsqueeze(0)
    ends = dict(cu_seq_lens_q=batch.cu_seqlens, max_length_q=batch.longest)
    return lambda: model(input_ids=ids, position_ids=positions, **ends).last_hidden_state[0]


def onnxruntime(encoders: Encoders, batch: Batch) -> Forward:
    session = encoders.cached(f"onnxruntime{torch.get_num_threads()}", lambda: _session(encoders))
    names = ("input_ids", "attention_mask")
    inputs = {name: getattr(batch, name).numpy() for name in names}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _session(encoders: Encoders):
    import onnxruntime

    path = encoders.cached("onnx", lambda: _exported(encoders.deberta)).name + "/model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # spinning threads slow the next variant
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _exported(model: nn.Module) -> tempfile.TemporaryDirectory:
    """Returns a folder with model.onnx. It exists as long as this object."""
    folder = tempfile.TemporaryDirectory()
    inputs = {name: torch.ones(2, 48, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch, length = (torch.export.Dim(name, min=1, max=1 << 16) for name in ("batch", "length"))
    shapes = {name: {0: batch, 1: length} for name in inputs}
    path = f"{folder.name}/model.onnx"
    torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    return folder


def int8(encoders: Encoders, batch: Batch) -> Forward:
    def make():
        twin = models.sharing_parameters(encoders.deberta)
        torch.ao.quantization.quantize_dynamic(twin, {nn.Linear}, torch.qint8, inplace=True)
        return deberta_fast.patch(twin)

    return padded(encoders.cached("int8", make), batch)


def _of(module: Callable[[Encoders], nn.Module]) -> Callable[[Encoders, Batch], Forward]:
    return lambda encoders, batch: padded(module(encoders), batch)


def _compiled(module: Callable[[Encoders], nn.Module]) -> Callable[[Encoders, Batch], Forward]:
    return lambda encoders, batch: padded(torch.compile(module(encoders), dynamic=False), batch)


_variable = lambda case, gpu: case.variable
_half_on_gpu = lambda case, gpu: gpu and case.dtype != "float32"
_forward_on_cpu = lambda case, gpu: not gpu and case.passes == "forward" and case.dtype == "float32"
_short = lambda case, gpu: case.length <= BERT_POSITIONS
_DEBERTA = "Hugging Face's DebertaV2Model"
# build(encoders, batch) returns a Forward; suits(case, gpu) says whether a group of rows has the variant.
VARIANTS = {
    "eager": Entry(_DEBERTA, _of(lambda encoders: encoders.deberta)),
    "eager+compile": Entry("eager in torch.compile(dynamic=False)", _compiled(lambda encoders: encoders.deberta)),
    "patched": Entry("eager after deberta_fast.patch", _of(Encoders.patched)),
    "patched-unpad": Entry(
        "after deberta_fast.patch(model, unpad=True)", _of(lambda encoders: encoders.patched(unpad=True)), _variable
    ),
    "native": Entry("deberta_fast.DebertaV2Model, which removes padding by itself", _of(Encoders.native)),
    "native-packed": Entry(
        "its forward_packed, of a batch that was never padded",
        lambda encoders, batch: packed(encoders.native().forward_packed, batch),
        _variable,
    ),
    "native+compile": Entry("either in torch.compile(dynamic=False): packed where lengths vary", native_compiled),
    "native-graph": Entry(
        "native in a CUDA graph, ids and mask copied into it",
        native_graph,
        lambda case, gpu: gpu and case.passes == "forward" and case.batch == 1,
    ),
    "bert": Entry(
        f"Hugging Face's BertModel, scaled_dot_product_attention, {BERT_POSITIONS} positions",
        _of(Encoders.bert),
        _short,
    ),
    "bert-onednn": Entry(
        "bert, its linear layers by the products that native models use (oneDNN's where these are faster)",
        _of(Encoders.bert_onednn),
        lambda case, gpu: not gpu and _short(case, gpu),
    ),
    "bert+compile": Entry("bert in torch.compile(dynamic=False)", _compiled(Encoders.bert), _short),
    "modernbert": Entry("Hugging Face's ModernBertModel, scaled_dot_product_attention", _of(Encoders.modernbert)),
    "modernbert+compile": Entry("modernbert in torch.compile(dynamic=False)", _compiled(Encoders.modernbert)),
    "modernbert-flash": Entry(
        "modernbert with flash-attn, which has to be installed",
        _of(functools.partial(_modernbert_by, "flash_attention_2")),
        _half_on_gpu,
    ),
    "modernbert-packed": Entry(
        "modernbert of a batch that was never padded, attention by torch's varlen_attn",
        modernbert_packed,
        lambda case, gpu: _half_on_gpu(case, gpu) and case.variable,
    ),
    "onnxruntime": Entry(
        f"{_DEBERTA} exported to ONNX, one program for all shapes, float32: it has no bfloat16 kernels for CPUs",
        onnxruntime,
        _forward_on_cpu,
    ),
    "int8": Entry("patched, its linear layers by torch.ao.quantization.quantize_dynamic", int8, _forward_on_cpu),
}


def family(variant: str) -> str:
    """Names the model that a variant is; all variants of a family should have the same states."""
    return next((name for name in ("bert", "modernbert") if variant.startswith(name)), "deberta")


def build_call(encoders: Encoders, variant: str, passes: str, batch: Batch) -> Callable[[], torch.Tensor]:
    """Returns a call without arguments that returns the states; a training step first drops old gradients."""
    forward = VARIANTS[variant].build(encoders, batch)

    def infer():
        with torch.inference_mode():
            return forward()

    def train():
        encoders.drop_gradients()
        states = forward()
        states.backward(batch.gradient(states))
        return states.detach()

    return infer if passes == "forward" else train


def measured(case: Case, variant: str, device: str) -> list[Callable[[], torch.Tensor]]:
    """Returns one call for ``timing.peak_memory``, after one over a few tokens, whose gradients are dropped."""
    encoders = Encoders(case.model, getattr(torch, case.dtype), device)
    build_call(encoders, variant, case.passes, Batch(2, 8, case.variable, device))()
    encoders.drop_gradients()
    batch = Batch(case.batch, case.length, case.variable, device)
    return [build_call(encoders, variant, case.passes, batch)]
