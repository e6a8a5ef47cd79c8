"""Runs of one process: what they train, that they continue exactly, and what they do about bad steps."""

import json
import os
import signal

import pytest
import torch
import torch._dynamo
from pretraining_run import MODEL, assert_identical, outcome, settings, texts, trained

from deberta_fast.pretraining import phases
from deberta_fast.pretraining.checkpoints import finished
from deberta_fast.pretraining.log import read_log
from deberta_fast.pretraining.trainer import Run, pretrain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    texts(folder)
    return folder


CASES = {
    "mlm": dict(objective="mlm"),
    "mlm-words": dict(objective="mlm", masking__whole_words=True, masking__max_gram=3, masking__rule="ms"),
    "gdes": dict(),
    "es": dict(rtd__sharing="es"),
    "nes-bf16": dict(rtd__sharing="nes", training__precision="bf16"),
    "gdes-fp16": dict(training__precision="fp16"),
    "checkpointed": dict(training__checkpointing="keep_attention"),
    "v1-chunks": dict(
        model={k: v for k, v in MODEL.items() if k not in ("position_buckets", "share_att_key", "norm_rel_ebd")}
        | {"max_relative_positions": 32}, data__rows="chunks",
    ),
    "stream": dict(data__shards=None, data__shuffle_rows=16),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_losses_fall(name, folder, tmp_path):
    changes = CASES[name] | {"output": str(tmp_path / name)}
    if name == "v1-chunks":
        # The tokenizer stays v2's: it is loaded by the model's kind, so the kind is v2's, too
        changes["model"] = changes["model"] | {"model_type": "deberta-v2"}
    log = trained(folder, **changes)["log"]
    train = [entry for entry in log if entry["kind"] == "train"]
    assert train[-1]["mlm_loss"] < train[0]["mlm_loss"] - 0.2 and train[-1]["step"] == 20
    if not name.startswith("mlm"):
        assert train[-1]["rtd_loss"] < train[0]["rtd_loss"] and 0.7 < train[-1]["original"] < 1
    assert (tmp_path / name / "losses.png").stat().st_size > 5000


def test_workers_change_nothing(folder):
    assert_identical(
        trained(folder, "workers", data__workers=2, training__steps=6),
        trained(folder, "alone", training__steps=6),
    )


def test_checkpoints_are_kept_and_removed(folder):
    trained(folder, "kept", reporting__save_every=4, reporting__log_every=7, reporting__keep=2)
    assert [path.name for path in finished(folder / "kept")] == ["step-00000016", "step-00000020"]
    assert not list((folder / "kept" / "checkpoints").glob("*.unfinished"))
    before = outcome(folder / "kept")
    # There is nothing to do.
    assert_identical(trained(folder, "kept", reporting__save_every=4, reporting__keep=2), before)


def test_other_settings_do_not_continue_a_run(folder):
    trained(folder, "fixed", training__steps=4)
    with pytest.raises(ValueError, match=r"holds a run with masking=.*: choose another output, or keep the value"):
        pretrain(settings(folder, "fixed", masking__max_gram=2))
    with pytest.raises(ValueError, match="holds a run with training.batch_tokens=256, and the settings say 512"):
        pretrain(settings(folder, "fixed", training__batch_tokens=512))
    assert trained(folder, "fixed", training__steps=5)["name"] == "step-00000005"


def test_damaged_checkpoint(folder):
    trained(folder, "damaged", training__steps=4)
    (part,) = (folder / "damaged" / "checkpoints" / "step-00000004").glob("__0_0.distcp")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match="step-00000004 cannot be loaded"):
        pretrain(settings(folder, "damaged", training__steps=5))


def poisoned(monkeypatch, at, value, model="generator"):
    """Multiplies the loss of a model's phase at a step."""
    backward, count = phases.Phase.backward, []

    def spoiled(self, inputs, loss_of):
        count.append(self.name)
        factor = value if count.count(self.name) == at and self.name == model else 1.0
        return backward(self, inputs, lambda output, i: loss_of(output, i) * factor)

    monkeypatch.setattr(phases.Phase, "backward", spoiled)


def test_bad_step_stops_and_names_the_last_checkpoint(folder, monkeypatch):
    poisoned(monkeypatch, 12, float("nan"))
    with pytest.raises(
        RuntimeError, match=r"step 12: the loss of the generator is nan; the last checkpoint is .*00010"
    ):
        pretrain(settings(folder, "stopped"))
    assert [path.name for path in finished(folder / "stopped")] == ["step-00000010"]


@pytest.mark.parametrize("precision, model", [("fp32", "generator"), ("fp16", "generator"), ("fp16", "discriminator")])
def test_bad_step_is_skipped_and_counted(precision, model, folder, monkeypatch):
    poisoned(monkeypatch, 3, float("inf"), model)
    changes = dict(training__bad_step="skip", training__precision=precision, training__steps=8)
    found = trained(folder, f"skipped-{precision}-{model}", **changes)
    assert found["log"][-1]["skipped"] == 1 and all(x.isfinite().all() for x in found["weights"].values())


def test_spikes(folder, monkeypatch):
    monkeypatch.setattr(phases, "RUNNING", 4)
    poisoned(monkeypatch, 7, 10.0)
    with pytest.raises(RuntimeError, match=r"step 7: the loss of the generator is \d+.*, its running mean"):
        pretrain(settings(folder, "spike", training__spike_factor=3.0))


def test_spike_behind_a_stop(folder, monkeypatch):
    """A run that continues knows the running mean of the losses before."""
    monkeypatch.setattr(phases, "RUNNING", 4)
    trained(folder, "spike-behind-a-stop", training__steps=6, training__spike_factor=3.0)
    poisoned(monkeypatch, 1, 10.0)
    with pytest.raises(RuntimeError, match=r"step 7: the loss of the generator is \d+.*, its running mean"):
        pretrain(settings(folder, "spike-behind-a-stop", training__spike_factor=3.0))


def test_sigterm_ends_with_a_checkpoint(folder, monkeypatch):
    whole = trained(folder, "uninterrupted")
    step = Run._step

    def told(run, *arguments):
        step(run, *arguments)
        if run.done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", told)
        pretrain(settings(folder, "told"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in finished(folder / "told")] == ["step-00000007"]
    got = trained(folder, "told")
    assert all(torch.equal(x, got["weights"][name]) for name, x in whole["weights"].items())


def test_accumulation_is_one_large_batch(folder):
    """Micro-batches of one row each and the whole batch at once make the same steps, up to rounding."""
    changes = dict(objective="mlm", model=MODEL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    one = trained(folder, "whole-batch", training__micro_batch_tokens=None, training__steps=5, **changes)
    parts = trained(folder, "parts", training__micro_batch_tokens=64, training__steps=5, **changes)
    for name, x in one["weights"].items():
        torch.testing.assert_close(parts["weights"][name], x, rtol=0, atol=2e-5, msg=name)


def test_compiled_layers_make_the_same_steps(folder):
    changes = dict(objective="mlm", model=MODEL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    eager = trained(folder, "not-compiled", training__steps=3, **changes)
    torch._dynamo.utils.counters.clear()
    compiled = trained(folder, "compiled", training__steps=3, training__compile=True, **changes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, x in eager["weights"].items():
        torch.testing.assert_close(compiled["weights"][name], x, rtol=0, atol=2e-5, msg=name)


def test_evaluation(folder):
    changes = dict(data__evaluation=[str(folder / "texts.jsonl")], reporting__evaluate_every=10)
    log = trained(folder, "evaluated", **changes)["log"]
    found = [entry for entry in log if entry["kind"] == "evaluation"]
    assert [entry["step"] for entry in found] == [10, 20]
    names = {"mlm_loss", "mlm_perplexity", "mlm_accuracy", "rtd_loss", "rtd_accuracy", "original", "recall", "auc"}
    assert names < found[0].keys() and found[1]["mlm_loss"] < found[0]["mlm_loss"]
    # Evaluation draws no random numbers of training.
    train = [entry for entry in log if entry["kind"] == "train"]
    assert train == [x for x in trained(folder, "not-evaluated")["log"] if x["kind"] == "train"]


TEXTS = {
    "absent": (dict(data__train=["/nowhere/x.txt"]), FileNotFoundError, "/nowhere/x.txt"),
    "ranks": (dict(training__batch_tokens=192), ValueError, "micro_batch_tokens must divide a process's share: 3 rows"),
    "nothing": (dict(data__train=[]), ValueError, None),
    "device": (dict(training__device="cuda"), ValueError, "torch finds no GPU"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_errors_before_the_first_step(name, folder, tmp_path):
    changes, kind, message = TEXTS[name]
    if name == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if name == "nothing":
        changes = changes | {"data__shards": str(tmp_path / "absent")}
        kind, message = (ValueError, FileNotFoundError), "absent"
    with pytest.raises(kind, match=message):
        pretrain(settings(folder, str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_shards_of_another_tokenizer(folder, tmp_path):
    from tokenizer_files import spm_folder

    trained(folder, "first", training__steps=1)
    with pytest.raises(ValueError, match="tokenizer"):
        pretrain(settings(folder, str(tmp_path), tokenizer=str(spm_folder("world")), data__train=[], training__steps=1))


def test_log_has_no_nan(folder):
    log = (folder / "first" / "log.jsonl") if (folder / "first").exists() else None
    if log is None:
        trained(folder, "first", training__steps=1)
        log = folder / "first" / "log.jsonl"
    for line in log.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert read_log(log)[-1]["step"] == 1
