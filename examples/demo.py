"""Compares Hugging Face's DeBERTa with the same model patched, on real English text: answers, time and memory.

    python examples/demo.py                  # a DeBERTa-v3-base with random weights, about three minutes on two cores
    python examples/demo.py --model DIR      # a checkpoint of your own, DeBERTa v1, v2 or v3

The text is the language reference that comes with Python (pydoc_data), so nothing is downloaded. Without a checkpoint,
a sentencepiece tokenizer is trained on it. The program writes demo-output/demo.png and demo.json, and exits with 1 if
the answers differ by more than rounding explains.
"""

import argparse
import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import sentencepiece
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, DebertaV2Config, DebertaV2Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ belongs to the repository, not to the package

import deberta_fast
from bench import timing
from bench.models import V3_BASE

PAD, CLS, SEP, UNK = range(4)  # DeBERTa-v3's ids; [MASK] comes next
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = {"HF eager": deberta_fast.unpatch, "patched": deberta_fast.patch}


@dataclass(frozen=True)
class Batch:
    """Documents as token ids, padded to the longest."""

    documents: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return max(map(len, self.documents))

    def __str__(self) -> str:
        return str(self.length) if len(self.documents) == 1 else " + ".join(str(len(d)) for d in self.documents)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(document) for document in self.documents])
        rows = [torch.tensor(document) for document in self.documents]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id or 0)
        mask = (torch.arange(self.length) < lengths[:, None]).long()
        return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    encode, options.vocabulary = local_tokenizer(options.model) if options.model else trained_tokenizer()
    model = make_model(options)
    _check_lengths(model, options.lengths)
    batches = make_batches(encode, options.lengths)
    description = _describe(model, options)
    print(f"{description}, vocabulary {options.vocabulary}, {torch.get_num_threads()} threads")

    steps = 1 + 2 * len(batches) + len(BACKENDS)
    with tqdm(total=steps, unit="step") as progress:
        rows, errors = compare_answers(model, batches, progress)
        measure_times(model, batches, rows, progress)
        measure_memory(options, batches, rows, progress)

    print(f"\n{timing.markdown(rows)}\n\n{errors}")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"provenance": timing.provenance(), "model": description, "errors": errors, "rows": rows}
    (options.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, description, options.out / "demo.png")
    print(f"Written: {options.out / 'demo.json'}, {options.out / 'demo.png'}")


def trained_tokenizer(size: int = 8000) -> tuple[Callable[[str], list[int]], int]:
    """Trains a sentencepiece unigram model like DeBERTa-v3's on the text of the demo."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(paragraph for text in topics.values() for paragraph in text.split("\n\n") if paragraph),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,  # the text may yield fewer pieces
        pad_id=PAD,
        bos_id=CLS,
        eos_id=SEP,
        unk_id=UNK,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        user_defined_symbols=["[MASK]"],
        minloglevel=2,
    )
    return sentencepiece_tokenizer(model_proto=model.getvalue())


def sentencepiece_tokenizer(**model) -> tuple[Callable[[str], list[int]], int]:
    pieces = sentencepiece.SentencePieceProcessor(**model)
    return lambda text: [CLS, *pieces.encode(text), SEP], pieces.vocab_size()


def local_tokenizer(checkpoint: Path) -> tuple[Callable[[str], list[int]], int]:
    if not (checkpoint / "config.json").is_file():
        sys.exit(f"--model {checkpoint}: no checkpoint there; expected a folder with a config.json")
    pieces = checkpoint / "spm.model"
    try:
        if pieces.is_file():  # v2 and v3; transformers would want protobuf to read it
            return sentencepiece_tokenizer(model_file=str(pieces))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # transformers raises errors of many types.
        sys.exit(f"--model {checkpoint}: its tokenizer cannot be loaded: {error}")
    return lambda text: tokenizer(text, verbose=False)["input_ids"], len(tokenizer)


def make_batches(encode: Callable[[str], list[int]], lengths: list[int]) -> list[Batch]:
    """Makes one document of each length and a padded batch of two, of different texts; returns the smallest first."""
    middle = lengths[len(lengths) // 2]
    sizes = [(length,) for length in lengths] + [(middle, max(2, middle * 5 // 8))]
    texts = sorted(topics.values(), key=len, reverse=True)
    batches, first = [], 0
    for group in sizes:
        documents = []
        for size in group:
            text = "\n\n".join(texts[first:] + texts[:first])[: 16 * size]
            ids = encode(text)
            if len(ids) < size:
                sys.exit(f"not enough text for a document of {size} tokens: choose shorter --lengths")
            documents.append((*ids[: size - 1], ids[-1]))  # keeps [SEP]
            first += 1
        batches.append(Batch(tuple(documents)))
    return sorted(batches, key=lambda batch: batch.length * len(batch.documents))


def make_model(options: argparse.Namespace) -> nn.Module:
    if options.model is None:
        model = random_v3_base(options.layers, options.vocabulary)
    else:
        transformers.utils.logging.disable_progress_bar()  # one bar is enough
        try:
            model = AutoModel.from_pretrained(options.model, local_files_only=True)
            deberta_fast.unpatch(deberta_fast.patch(model))  # raises here if nothing can be patched
        except Exception as error:
            sys.exit(f"--model {options.model}: no DeBERTa that can be loaded: {error}")
    return model.eval().to(options.device, DTYPES[options.dtype])


def random_v3_base(layers: int, vocabulary: int) -> DebertaV2Model:
    """Makes a model of DeBERTa-v3-base's shape with random weights."""
    config = DebertaV2Config(**V3_BASE | dict(vocab_size=vocabulary, num_hidden_layers=layers, pad_token_id=PAD))
    torch.manual_seed(0)
    model = DebertaV2Model(config)
    # Hugging Face's weights have std 0.02, which gives scores of std 0.3, a nearly uniform softmax, and position terms
    # that hardly matter. With this std, queries, keys and their position tables have unit variance like the normalised
    # states, and so have the scores, which are three terms of variance D scaled by 1 / sqrt(3 D).
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


def compare_answers(model: nn.Module, batches: list[Batch], progress: tqdm) -> tuple[list[dict], str]:
    """Returns the first columns of the table and a summary; ends the program if the answers are wrong.

    The rule is that of the package's tests: compared with Hugging Face's model in float64, the patched model may have
    twice the error of Hugging Face's model in the same dtype, plus half a unit in the last place for the maximum. Only
    the smallest batch is run in float64. For all batches the rule implies |patched - eager| <= (2 + 1) errors + half a
    unit. The error on longer texts is unknown, but that of the random model varies by less than a sixth from 512 to
    2048 tokens. Twice the measured error leaves a margin for other text, while one wrong row of the 512 in one position
    table causes hundreds of times that.
    """
    smallest, dtype = batches[0], model.dtype
    inputs = [batch.tensors(model) for batch in batches]
    exact = answer(model.double(), inputs[0])
    model.to(dtype)
    progress.update()
    half_unit = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    rows, problems, errors = [], [], {}
    for batch, tensors in zip(batches, inputs):
        progress.set_description(f"answers, {batch} tokens")
        valid = tensors["attention_mask"].bool()
        answers = {}
        for name, prepare in BACKENDS.items():
            answers[name] = answer(prepare(model), tensors)[valid].double()
            if batch is smallest:
                errors[name] = _differences(answers[name], exact[valid])
        (eager_max, eager_mean), (patched_max, patched_mean) = errors.values()
        worst, mean = _differences(*answers.values())
        bounds = [(worst, 2 * 3 * eager_max + half_unit, "largest"), (mean, 2 * 3 * eager_mean, "mean")]
        problems += [
            f"{batch} tokens: {what} difference from HF eager {value:.2e}, at most {bound:.2e} would be rounding"
            for value, bound, what in bounds
            if not value <= bound  # NaN fails too
        ]
        rows.append({"length": batch.length, "batch": len(batch.documents), "largest difference": worst})
        progress.update()
    if not patched_max <= 2 * eager_max + half_unit or not patched_mean <= 2 * eager_mean:
        problems.append(f"{smallest} tokens: more than twice HF eager's error against float64")
    summary = f"Error against float64, {smallest} tokens: " + ", ".join(
        f"{name} {worst:.1e} at most, {mean:.1e} in the mean" for name, (worst, mean) in errors.items()
    )
    if problems:
        progress.close()
        sys.exit("\n".join(["The patched model's answers are wrong.", *problems, summary]))
    return rows, summary


def _differences(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    distance = (ours - theirs).abs()
    return distance.max().item(), distance.mean().item()


def measure_times(model: nn.Module, batches: list[Batch], rows: list[dict], progress: tqdm) -> None:
    """Adds the columns of times: medians of a few runs, one run beyond 1024 tokens. compare_answers was the warm-up."""
    for batch, row in zip(batches, rows):
        progress.set_description(f"time, {batch} tokens")
        inputs = batch.tensors(model)
        # Both sides include patch or unpatch, which takes less than a millisecond.
        run = lambda prepare, inputs=inputs: answer(prepare(model), inputs)
        runs = {name: functools.partial(run, prepare) for name, prepare in BACKENDS.items()}
        tokens = batch.length * len(batch.documents)
        repeats = 20 if model.device.type == "cuda" else 5 if tokens <= 512 else 3 if tokens <= 1024 else 1
        eager, patched = (1000 * median(seconds) for seconds in timing.interleaved(runs, repeats, warmup=0).values())
        row |= {"HF eager ms": eager, "patched ms": patched, "times faster": eager / patched}
        progress.update()


def measure_memory(options: argparse.Namespace, batches: list[Batch], rows: list[dict], progress: tqdm) -> None:
    """Adds the columns of peak memory, which is measured in one process per model."""
    peaks = {}
    for name in BACKENDS:
        progress.set_description(f"memory, {name}")
        peaks[name] = timing.peak_memory(memory_runs, options, batches, name, device=options.device)
        progress.update()
    for row, eager, patched in zip(rows, *peaks.values()):
        row |= {"HF eager MiB": eager / timing.MIB, "patched MiB": patched / timing.MIB, "times less": eager / patched}


def memory_runs(options: argparse.Namespace, batches: list[Batch], name: str) -> list[Callable[[], torch.Tensor]]:
    model = BACKENDS[name](make_model(options))
    inputs = [batch.tensors(model) for batch in batches]
    answer(model, {key: tensor[:, :8] for key, tensor in inputs[0].items()})
    return [functools.partial(answer, model, tensors) for tensors in inputs]


def plot(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{row['length']}" if row["batch"] == 1 else f"{row['batch']} × {row['length']}\npadded" for row in rows]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, unit, ratio, what in zip(
        panels, ("ms", "MiB"), ("times faster", "times less"), ("Time, ms", "Peak memory beyond the weights, MiB")
    ):
        for side, (name, color) in enumerate(zip(BACKENDS, ("tab:gray", "tab:blue"))):
            heights = [row[f"{name} {unit}"] for row in rows]
            bars = panel.bar([x + 0.4 * side for x in range(len(rows))], heights, 0.4, label=name, color=color)
        panel.bar_label(bars, [f"{row[ratio]:.1f}×" for row in rows], padding=2)
        panel.set_xticks([x + 0.2 for x in range(len(rows))], labels)
        panel.set(xlabel="Tokens of a document", ylabel=what, title=f"patched: how many {ratio}")
        panel.title.set_fontsize("medium")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _describe(model: nn.Module, options: argparse.Namespace) -> str:
    config = model.config
    weights = "random weights" if options.model is None else options.model.name
    shape = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads"
    return f"{type(model).__name__}: {weights}, {shape}, {options.dtype} on {options.device}"


def _check_lengths(model: nn.Module, lengths: list[int]) -> None:
    config = model.config
    if getattr(config, "position_biased_input", True) and lengths[-1] > config.max_position_embeddings:
        sys.exit(f"this model adds absolute positions: --lengths must not pass {config.max_position_embeddings}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a local checkpoint instead of random weights")
    parser.add_argument("--layers", type=int, help="of the random model (12)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of the documents (512 1024 2048)")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quick", action="store_true", help="2 layers and short documents")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR")
    options = parser.parse_args(argv)
    if options.model is not None and options.layers is not None:
        parser.error("--layers is for the random model: a checkpoint has its own")
    options.layers = options.layers or (2 if options.quick else 12)
    options.lengths = sorted(options.lengths or ([64, 576] if options.quick else [512, 1024, 2048]))
    if options.layers < 1 or options.lengths[0] < 8:
        parser.error("--layers must be at least 1 and --lengths at least 8")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


if __name__ == "__main__":
    main()
