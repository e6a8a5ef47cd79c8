"""The commands of pretraining: ``train-tokenizer``, ``tokenize``, ``pretrain`` and ``export``.

Whatever they need is imported when one of them runs.
"""

import argparse
import os
from pathlib import Path

PARTS = ("discriminator", "generator", "both")
COMMANDS = ("train-tokenizer", "tokenize", "pretrain", "export")
CONFIGURATIONS = Path(__file__).with_name("configurations")
PRETRAIN = """\
SETTINGS is a YAML file, or the name of a ready one: {names}.
Changes are section.name=value, with values as in YAML. The same command continues a run that was stopped. Several
processes: torchrun --nproc-per-node 8 -m deberta_fast pretrain SETTINGS ...

  python -m deberta_fast pretrain v3-small tokenizer=tokenizer data.train=[texts] data.shards=shards output=run
"""


def add_to(commands) -> None:
    """Adds the commands to an argparse parser's."""
    text = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        "train-tokenizer",
        help="train a sentencepiece vocabulary",
        description="Trains a sentencepiece unigram model with DeBERTa-v3's special ids on texts.",
    )
    _add_texts(train)
    train.add_argument("--output", required=True, metavar="DIR", help="a folder without a tokenizer")
    train.add_argument("--vocab-size", type=int, default=128000, metavar="N", help="pieces; [MASK] comes behind them")
    train.add_argument("--lowercase", action="store_true", help="convert texts to lower case")

    tokenize = commands.add_parser(
        "tokenize",
        help="tokenize texts into shards",
        description="Tokenizes texts once into memory-mapped shards; continues where it was stopped.",
    )
    _add_texts(tokenize)
    tokenize.add_argument("--tokenizer", required=True, metavar="DIR", help="a folder, or a name on the hub")
    tokenize.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
    tokenize.add_argument("--processes", type=int, default=1, metavar="N", help="1 by default")
    tokenize.add_argument("--v1", action="store_true", help="the tokenizer is DeBERTa v1's")

    names = ", ".join(sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml")))
    pretrain = commands.add_parser(
        "pretrain",
        help="train a model from texts",
        description="Trains a masked language model, or generator and discriminator.",
        epilog=PRETRAIN.format(names=names),
        formatter_class=text,
    )
    pretrain.add_argument("settings", metavar="SETTINGS", help="a YAML file, or a name")
    pretrain.add_argument("changes", nargs="*", metavar="section.name=value", help="replace settings")

    export = commands.add_parser(
        "export",
        help="write a run's models for from_pretrained",
        description="Writes the models of a run, or of one of its checkpoints, for from_pretrained, here and of "
        "transformers, with the tokenizer.",
    )
    export.add_argument("run", metavar="RUN", help="folder of a run or of one of its checkpoints")
    export.add_argument("output", metavar="DIR", help="where to write")
    export.add_argument(
        "--part", default="both", choices=("discriminator", "generator", "both"), help="both by default"
    )
    export.add_argument("--microsoft", action="store_true", help="also write both models in one file, by their names")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="PATH", help="files or folders: .txt, .jsonl, .parquet")
    parser.add_argument("--dataset", metavar="NAME", help="a dataset on the hub instead, as a stream")
    parser.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    parser.add_argument("--split", default="train", metavar="NAME", help="its split; train by default")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column; text by default")
    parser.add_argument(
        "--documents", default="blank-line", choices=("blank-line", "line"), help="what ends one in .txt"
    )


def run(given: argparse.Namespace) -> int:
    """Runs one of the commands; returns the exit status."""
    return {"train-tokenizer": _train, "tokenize": _tokenize, "pretrain": _pretrain, "export": _export}[given.command](
        given
    )


def _sources(given: argparse.Namespace):
    from .sources import Sources

    return Sources(
        given.texts, dataset=given.dataset, config=given.dataset_config, split=given.split,
        text_field=given.text_field, documents=given.documents,
    )  # fmt: skip


def _train(given: argparse.Namespace) -> int:
    from .vocabulary import train_tokenizer

    tokenizer = train_tokenizer(_sources(given), given.output, vocab_size=given.vocab_size, lowercase=given.lowercase)
    print(f"{given.output}: {len(tokenizer)} ids, with the special ones")
    return 0


def _tokenize(given: argparse.Namespace) -> int:
    from .build import load_tokenizer
    from .settings import Settings
    from .shards import write_shards

    model = {"model_type": "deberta"} if given.v1 else {}
    tokenizer = load_tokenizer(Settings(tokenizer=given.tokenizer, model=model))
    shards = write_shards(_sources(given), tokenizer, given.output, processes=given.processes)
    print(f"{given.output}: {shards.documents:,} documents, {shards.tokens:,} tokens")
    return 0


def _pretrain(given: argparse.Namespace) -> int:
    from .settings import read_settings
    from .trainer import pretrain

    path = Path(given.settings)
    ready = CONFIGURATIONS / f"{given.settings}.yaml"
    if not path.suffix and ready.is_file():
        path = ready
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no file {given.settings}, and no ready settings of this name: {names}")
    checkpoint = pretrain(read_settings(path, given.changes))
    if os.environ.get("RANK", "0") == "0":  # torchrun's processes would all print it
        print(checkpoint)
    return 0


def _export(given: argparse.Namespace) -> int:
    from .export import export

    for folder in export(given.run, given.output, given.part, given.microsoft):
        print(folder)
    return 0
