"""Modules import only modules of lower rank, and importing the package needs only torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deberta_fast"

# From the bottom up; a module may import those before it. Backends share a rank: none imports another.
RANKS = [
    {"_interrupt"},
    # op: the operator does not depend on models
    {"op.relative_position", "op.dropout"},
    {"op.call"},
    {"op.backends.extension", "op.backends.gpu"},
    {"op.backends.eager.scratch"},
    {"op.backends.eager.tables", "op.backends.eager.band"},
    {"op.backends.eager.chunk"},
    {f"op.backends.triton.{name}" for name in ("configuration", "kernels", "kernels.tile")},
    {f"op.backends.triton.kernels.{path.stem}" for path in (PACKAGE / "op/backends/triton/kernels").glob("[a-s]*.py")},
    {"op.backends.triton.launch"},
    {"op.backends.triton.plan"},
    {f"op.backends.{name}" for name in ("reference", "eager", "cpu", "cuda", "triton")},
    {"op.backends"},
    {"op.flops"},
    {"op.schema", "op.precision", "op.problems"},
    {"op.proof", "op.speed"},
    {"op.selection"},
    {"op.api"},
    {"op.context_parallel.exchange", "op.context_parallel.stretches"},
    {"op.context_parallel.heads", "op.context_parallel.ring"},
    {"op.context_parallel"},
    {"op"},
    # checkpoint: tensors and names
    {"checkpoint.error", "checkpoint.hub", "checkpoint.json_object"},
    {"checkpoint.replace"},
    {"checkpoint.formats"},
    {"checkpoint.files", "checkpoint.names"},
    {"checkpoint.load"},
    {"checkpoint"},
    # models
    {"models"},
    {"models.losses", "models.ordinary", "models.padding"},
    {"models.activation"},
    {f"models.{name}" for name in ("add_norm", "onednn_linear", "outputs", "packing", "weight_cache")},
    {"models.arguments", "models.checkpointing", "models.wrappers"},
    {"models.config", "models.sharding"},
    {"models.attention"},
    {"models.embeddings", "models.encoder", "models.heads"},
    {"models.pretrained"},
    {"models.model"},
    {"models.task_models"},
    # text
    {"data", "tokenization.special_tokens", "tokenization.batch_encoding"},
    {"tokenization.backends", "tokenization.bpe_encoder", "tokenization.files", "tokenization.model_inputs"},
    {"tokenization.base"},
    {"tokenization.slow", "tokenization.fast"},
    {"tokenization.deberta", "tokenization.deberta_v2"},
    {"tokenization"},
    {"pipelines.base"},
    {f"pipelines.{path.stem}" for path in (PACKAGE / "pipelines").glob("[c-z]*.py")},
    {"pipelines"},
    # leaves
    {"hf.fallback"},
    {"hf.sharded"},
    {"hf.forwards", "hf.packed"},
    {"hf.patch"},
    {"selfcheck", "testing", "distributed.groups", "distributed.tensor_parallel"},
    {"distributed.context_parallel", "distributed.loss_weights"},
    # pretraining
    {"pretraining"},
    {f"pretraining.{name}" for name in ("discriminator", "encoding", "flops", "log", "masking")},
    {f"pretraining.{name}" for name in ("optimizers", "parallel", "sift", "sources")},
    {f"pretraining.{name}" for name in ("sharing", "shards", "vocabulary")},
    {f"pretraining.{name}" for name in ("objectives", "rows", "settings")},
    {f"pretraining.{name}" for name in ("batches", "build", "evaluation", "phases", "streaming")},
    {f"pretraining.{name}" for name in ("checkpoints", "corpus")},
    {f"pretraining.{name}" for name in ("export", "trainer")},
    {"pretraining.command"},
    {"cli", "hf", "distributed"},
    {"__main__", ""},
]
# Packages that the functions of a folder or module import when they run. The import of the module itself does not need
# them, as the tests below show.
LATE = {
    "op.backends.triton": {"triton"},
    "checkpoint": {"huggingface_hub", "h5py", "numpy", "safetensors"},
    "models": {"accelerate"},
    "tokenization": {"numpy", "sentencepiece", "tokenizers"},
    "pipelines": {"tqdm"},
    "pretraining": {"datasets", "matplotlib", "numpy", "pyarrow", "sentencepiece", "tqdm", "yaml"},
    "cli": {"tqdm"},
}
# Nothing else imports from these folders.
LEAVES = {
    "hf": {"", "distributed.context_parallel", "distributed.tensor_parallel"},
    "pipelines": {"", "cli"},
    "cli": {"__main__"},
}
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."), path


def imported(name, path):
    """The package's modules that a module names in its import statements, and the other packages."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (("other", alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield "other", node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1]
            if node.module:
                yield "own", ".".join([*base, node.module])
            else:
                names = (".".join([*base, alias.name]) for alias in node.names)
                yield from (("own", name) for name in names if name in RANK)  # this excludes __version__


@pytest.mark.parametrize("name, path", list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_arrows(name, path):
    assert name in RANK, f"give {name} a rank"
    for kind, target in imported(name, path):
        if kind == "own":
            assert RANK[target] < RANK[name], f"{name or 'deberta_fast'} imports {target}"
            folder = target.partition(".")[0]
            leaf = folder in LEAVES and name.partition(".")[0] != folder
            assert not leaf or name in LEAVES[folder], f"{name} imports {target}, a leaf"
        else:
            late = set().union(*(packages for prefix, packages in LATE.items() if name.startswith(prefix)))
            assert target in sys.stdlib_module_names | {"torch"} | late, f"{name} imports {target}"


@pytest.mark.parametrize(
    "absent",
    [
        ("triton",),
        ("transformers", "huggingface_hub"),
        ("numpy", "sentencepiece", "safetensors", "tokenizers", "h5py", "tqdm"),
    ],
)
def test_import_without(absent):
    """A fresh interpreter that cannot find these packages imports and uses deberta_fast."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, deberta_fast
q = torch.randn(1, 2, 5, 16)
deberta_fast.disentangled_attention(q, q, q)
deberta_fast.DebertaV2Model(deberta_fast.DebertaV2Config(hidden_size=24, num_hidden_layers=1, vocab_size=9))
assert not set({absent!r}) & set(sys.modules) and "deberta_fast.op.precision" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_import_brings_neither_triton_nor_transformers():
    code = "import sys, deberta_fast; print(*{'triton', 'transformers'} & set(sys.modules))"
    before = "import sys, torch; print(*{'triton', 'transformers'} & set(sys.modules))"
    run = [subprocess.check_output([sys.executable, "-c", c], text=True, timeout=120) for c in (code, before)]
    assert run[0] == run[1]


def test_import_takes_little_longer_than_torchs():
    """It takes at most 1.3 times as long. The fastest of a few tries counts, since a busy machine slows some."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    seconds = {"torch": [], "deberta_fast": []}
    for _ in range(4):
        for module, found in seconds.items():
            command = [sys.executable, "-W", "ignore", "-c", code.format(module)]
            found.append(float(subprocess.check_output(command, timeout=120)))
    assert min(seconds["deberta_fast"]) <= 1.3 * min(seconds["torch"]), seconds


def test_torch_sentencepiece_and_safetensors_are_enough(tmp_path):
    """They load, save and run a model, its tokenizer and a pipeline. safetensors needs NumPy to write files."""
    pytest.importorskip("sentencepiece")
    from native_models import build
    from tokenizer_files import spm_folder

    folder = tmp_path / "model"
    build("v3", "ForSequenceClassification", vocab_size=1100).save_pretrained(folder)
    (folder / "spm.model").write_bytes((spm_folder() / "spm.model").read_bytes())
    code = f"""
from importlib.machinery import PathFinder
absent = "transformers", "tokenizers", "huggingface_hub", "h5py", "tqdm", "google"
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *place: None if name.partition(".")[0] in absent else find_spec(name, *place)
import sys
import deberta_fast
answers = deberta_fast.pipeline("text-classification", {str(folder)!r})(["A text.", "Another one."])
assert [answer["label"][:6] for answer in answers] == ["LABEL_", "LABEL_"]
deberta_fast.DebertaV2Tokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(tmp_path / "again")!r})
model = deberta_fast.DebertaV2ForSequenceClassification.from_pretrained({str(folder)!r})
model.save_pretrained({str(tmp_path / "again")!r})
deberta_fast.pipeline("text-classification", {str(tmp_path / "again")!r})("A text.")
try:
    deberta_fast.DebertaV2TokenizerFast.from_pretrained({str(folder)!r})
except ImportError as error:
    assert "pip install tokenizers" in str(error)
assert not set(absent) & set(sys.modules) and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
