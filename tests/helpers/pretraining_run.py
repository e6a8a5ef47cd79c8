"""A tiny pretraining run: its texts, tokenizer and settings."""

import json
from pathlib import Path

import torch
from tokenizer_files import sentences, spm_folder

from deberta_fast.pretraining.build import described
from deberta_fast.pretraining.checkpoints import finished, load_weights
from deberta_fast.pretraining.log import read_log
from deberta_fast.pretraining.settings import Settings, read_settings
from deberta_fast.pretraining.trainer import pretrain

MODEL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64,
    relative_attention=True, position_buckets=16, pos_att_type=["c2p", "p2c"], share_att_key=True,
    norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
)  # fmt: skip
SPEEDS = ("time", "tokens_per_second", "tflops")  # of a log, which no two runs share


def texts(folder: Path) -> Path:
    """Writes some documents; returns their file."""
    path = folder / "texts.jsonl"
    rows = sentences()
    documents = [" ".join(rows[i : i + 1 + i % 9]) for i in range(0, 160, 3)]
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in documents))
    return path


def settings(folder: Path, output: str = "run", **changes) -> Settings:
    """Settings of a run of 20 steps; ``changes`` are ``section__name=value``."""
    path = texts(folder) if not (folder / "texts.jsonl").exists() else folder / "texts.jsonl"
    values = {
        "output": folder / output, "tokenizer": spm_folder(), "model": MODEL, "data.train": [str(path)],
        "data.shards": folder / "shards", "data.length": 64, "training.steps": 20, "training.batch_tokens": 256,
        "training.micro_batch_tokens": 128, "training.learning_rate": 3e-3, "training.warmup_steps": 3,
        "training.device": "cpu", "reporting.log_every": 5, "reporting.save_every": 10, "reporting.progress": False,
    }  # fmt: skip
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return read_settings(None, [f"{name}={json.dumps(value, default=str)}" for name, value in values.items()])


def trained(folder: Path, output: str = "run", **changes) -> dict:
    """Runs the run; returns its weights and its log without times."""
    pretrain(settings(folder, output, **changes))
    return outcome(folder / output)


def outcome(run: Path) -> dict:
    """The weights of a run's last checkpoint, by name, and its log without times."""
    checkpoint = finished(run)[-1]
    models = described(checkpoint)
    load_weights(checkpoint, models)
    log = [{k: v for k, v in entry.items() if k not in SPEEDS} for entry in read_log(run / "log.jsonl")]
    return {"weights": models.state_dict(), "log": log, "name": checkpoint.name}


def assert_identical(got: dict, expected: dict) -> None:
    assert got["name"] == expected["name"] and got["log"] == expected["log"]
    assert got["weights"].keys() == expected["weights"].keys()
    assert [name for name, x in expected["weights"].items() if not torch.equal(x, got["weights"][name])] == []
