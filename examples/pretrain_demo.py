"""Pretrains a small DeBERTa v3 on the English text that comes with Python, and fine-tunes it on film reviews.

    python examples/pretrain_demo.py                # make pretrain-demo: four minutes on two cores with AVX-512

A tokenizer, then a discriminator of 4 layers and a generator of 2, 256 wide, by replaced-token detection on the
standard library's docstrings, comments and manual. Then the exported discriminator, and a new model of the same shape,
learn from labelled sentences whether they praise a film, with 3 seeds each. The program compares their accuracies, and
writes losses.png and comparison.json into --out. Every step is a command or a function that users have too.

Two cores see 0.6 million tokens in 2 to 6 minutes. Pretraining does not help the comparison yet, and 20 million do not
either: see docs/pretraining.md, "Measured". --steps, --train and --own-text are what to vary on a faster machine.
"""

import argparse
import ast
import json
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from movie_reviews import Labelled, snippets
from torch.utils.data import DataLoader
from tqdm import tqdm

from deberta_fast import DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Tokenizer
from deberta_fast.cli import main as command
from deberta_fast.data import PackedCollator, TokenBudgetSampler

SEEDS = 3
LEAST = 60  # characters of a docstring or comment
SMALL = dict(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, position_buckets=256,
    relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
    position_biased_input=False, type_vocab_size=0, max_position_embeddings=512,
    # Dropout is against overfitting, for which these steps are too few.
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DROPOUT = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)  # of fine-tuning
TOY = SMALL | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def main(argv: list[str] | None = None) -> dict:
    """Runs the demonstration; returns what comparison.json holds."""
    options = _options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    train, test = labelled(options)
    write_texts(options, [text for text, _ in train] if options.own_text else [])
    tokenizer, run, model = options.out / "tokenizer", options.out / "run", options.out / "discriminator"
    if not tokenizer.exists():
        size = str(options.vocabulary)
        _command("train-tokenizer", options.out / "train.txt", "--output", tokenizer, "--vocab-size", size)
    _command("pretrain", settings(options, tokenizer, run))
    _command("export", run, model, "--part", "discriminator")
    pretrained = time.monotonic() - started
    results = compared(model, train, test, options)
    results |= {"pretraining_seconds": pretrained, "seconds": time.monotonic() - started, "snippets": len(train)}
    (options.out / "comparison.json").write_text(json.dumps(results, indent=1))
    _report(results, options.out)
    return results


def write_texts(options: argparse.Namespace, sentences: list[str]) -> None:
    """Writes train.txt and held-out.txt, documents between blank lines; every twentieth module is held out.

    Four of ``sentences`` make a document of train.txt.
    """
    found = {"train": ["\n".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)], "held-out": []}
    for number, text in enumerate(documents(toy=options.toy)):
        found["train" if number % 20 else "held-out"].append(text)
    for name, texts in found.items():
        (options.out / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")


def documents(toy: bool = False) -> Iterator[str]:
    """Yields the English of each module of the standard library: docstrings and comments; and the manual's topics."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    if toy:
        paths = [path for path in paths if path.parent == root][:60]
    seen: set[str] = set()
    for path in paths:
        parts = [part for part in english(path) if len(part) >= LEAST and part not in seen]
        seen.update(parts)
        if parts:
            yield "\n".join(parts)
    topics = root / "pydoc_data" / "topics.py"
    if topics.is_file() and not toy:
        for node in ast.walk(ast.parse(topics.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
                yield _one_paragraph(node.value)


def english(path: Path) -> list[str]:
    """Returns a module's docstrings and its runs of comment lines, each as one paragraph."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):  # tests of the parser
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    run: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.lstrip().startswith("# "):
            run.append(line.lstrip()[2:])
        elif run:
            texts.append("\n".join(run))
            run = []
    return [_one_paragraph(text) for text in texts if text]


def _one_paragraph(text: str) -> str:
    return " ".join(text.split())


def settings(options: argparse.Namespace, tokenizer: Path, run: Path) -> Path:
    """Writes the run's settings; returns their file."""
    import yaml

    length = 64 if options.toy else 128
    values = {
        "output": str(run), "tokenizer": str(tokenizer), "objective": "rtd",
        "model": TOY if options.toy else SMALL,
        "data": {
            "train": [str(options.out / "train.txt")], "evaluation": [str(options.out / "held-out.txt")],
            "shards": str(options.out / "shards"), "length": length,
        },
        "training": {
            "steps": options.steps, "batch_tokens": 16 * length,
            "learning_rate": options.pretraining_rate,
            # At the generator's rate the states of a sentence's tokens grow alike sooner.
            "discriminator_learning_rate": 0.3 * options.pretraining_rate,
            "warmup_steps": options.steps // 5, "device": options.device, "precision": options.precision,
        },
        "reporting": {"log_every": max(1, options.steps // 20), "evaluate_every": max(1, options.steps // 4)},
    }  # fmt: skip
    path = options.out / "settings.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def compared(folder: Path, train: Labelled, test: Labelled, options: argparse.Namespace) -> dict:
    """Fine-tunes the pretrained model and new ones; returns their accuracies by seed."""
    tokenizer = DebertaV2Tokenizer.from_pretrained(folder)
    encoded = [features(texts, tokenizer) for texts in (train, test)]
    found: dict[str, list[float]] = {"pretrained": [], "new": []}
    changes = {"num_labels": 2, **DROPOUT}
    for seed in range(options.seeds):
        for kind, accuracies in found.items():
            torch.manual_seed(seed)
            if kind == "pretrained":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the classifier is new, which is what we want
                    model = DebertaV2ForSequenceClassification.from_pretrained(folder, **changes)
            else:
                model = DebertaV2ForSequenceClassification(DebertaV2Config.from_pretrained(folder, **changes))
            rate = options.rate if kind == "pretrained" else options.new_rate
            fine_tune(model.to(options.device), encoded[0], rate, seed, options, f"{kind}, seed {seed}")
            accuracies.append(accuracy(model, encoded[1]))
    return found


def features(texts: Labelled, tokenizer: DebertaV2Tokenizer) -> list[dict]:
    ids = tokenizer([text for text, _ in texts], truncation=True, max_length=128)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, texts)]


def fine_tune(model, train: list[dict], rate: float, seed: int, options: argparse.Namespace, name: str) -> None:
    """Trains a classifier by AdamW with a linear warm-up and decay."""
    lengths = [len(feature["input_ids"]) for feature in train]
    sampler = TokenBudgetSampler(lengths, 1024, seed=seed)
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=PackedCollator(token_labels=False))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.01)
    steps = sum(1 for epoch in range(options.epochs) for _ in (sampler.set_epoch(epoch), *sampler)[1:])
    factor = lambda step: min((step + 1) / (0.1 * steps + 1), (steps - step) / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with tqdm(total=steps, desc=name, unit="step", disable=None) as bar:
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                batch = {k: x.to(options.device) if isinstance(x, torch.Tensor) else x for k, x in batch.items()}
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(model, test: list[dict]) -> float:
    model.eval()
    sampler = TokenBudgetSampler([len(x["input_ids"]) for x in test], 4096, shuffle=False)
    right = 0
    for batch in DataLoader(test, batch_sampler=sampler, collate_fn=PackedCollator(token_labels=False)):
        batch = {k: x.to(model.device) if isinstance(x, torch.Tensor) else x for k, x in batch.items()}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(test)


def labelled(options: argparse.Namespace) -> tuple[Labelled, Labelled]:
    if options.snippets is not None:
        rows = [json.loads(line) for line in options.snippets.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["text"], row["label"]) for row in rows]
        return pairs[: len(pairs) * 3 // 4], pairs[len(pairs) * 3 // 4 :]
    train, test = snippets(options.archive)
    return train[: options.train], test


def _command(*arguments) -> None:
    print("python -m deberta_fast", *arguments, file=sys.stderr, flush=True)
    if status := command([str(x) for x in arguments]):
        sys.exit(status)


def _report(results: dict, out: Path) -> None:
    print(f"\naccuracy after fine-tuning on {results['snippets']} sentences, {len(results['new'])} seeds")
    for kind in ("pretrained", "new"):
        values = results[kind]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        shown = ", ".join(f"{x:.4f}" for x in values)
        print(f"  {kind:10}  {statistics.mean(values):.4f} ± {spread:.4f}   ({shown})")
    outside = min(results["pretrained"]) > max(results["new"])
    print(f"the worst pretrained one is {'' if outside else 'not '}better than the best new one")
    print(f"{results['seconds']:.0f} s in all, {results['pretraining_seconds']:.0f} s of them until the export; {out}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("pretrain-demo-output"), metavar="DIR")
    parser.add_argument("--archive", type=Path, default=Path("build/vader"), metavar="DIR", help="of the download")
    parser.add_argument("--snippets", type=Path, metavar="FILE", help="JSON lines with text and label instead")
    parser.add_argument("--steps", type=int, metavar="N", help="of pretraining (300)")
    parser.add_argument("--train", type=int, default=1500, metavar="N", help="labelled sentences (1500)")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="of fine-tuning (2)")
    parser.add_argument("--pretraining-rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of the pretrained model")
    parser.add_argument("--new-rate", type=float, default=3e-4, help="learning rate of the new model")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument(
        "--own-text", action="store_true", help="pretrain on the labelled sentences too, without labels"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of pretraining")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="a tiny model, in seconds")
    options = parser.parse_args(argv)
    options.steps = options.steps or (6 if options.toy else 300)
    options.vocabulary = 600 if options.toy else 8000
    return options


if __name__ == "__main__":
    main()
