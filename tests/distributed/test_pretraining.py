"""Pretraining by two processes: the steps of one, and runs that continue after a kill, bit for bit."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from pretraining_run import MODEL, assert_identical, outcome, settings, texts, trained
from processes import Processes

from deberta_fast.pretraining.checkpoints import finished
from deberta_fast.pretraining.settings import write_settings
from deberta_fast.pretraining.trainer import Run, pretrain

WITHOUT_DROPOUT = MODEL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
STEP = Run._step


def run(folder, output, changes, crash=None):
    """Runs in this process of a group; the last rank kills itself before step ``crash``."""
    Run._step = STEP
    if crash is not None:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        die = lambda own, *rest: os.kill(os.getpid(), 9) if last and own.done == crash else STEP(own, *rest)
        Run._step = die
    pretrain(settings(folder, output, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining-processes")
    texts(folder)
    return folder


KILLED = {
    "one-process": (1, {}),
    "one-process-stream-fp16": (1, dict(data__shards=None, data__shuffle_rows=8, training__precision="fp16")),
    "fsdp": (2, dict(training__strategy="fsdp")),
    "ddp-es-stream": (2, dict(rtd__sharing="es", data__shards=None, data__shuffle_rows=8)),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_continued(name, folder):
    """20 steps are 10, a kill -9 in the eighteenth, and 10 more: weights and log are the same to the bit."""
    ranks, changes = KILLED[name]
    changes = changes | dict(training__micro_batch_tokens=64)
    with Processes(ranks) as processes:
        processes.run(run, folder, f"{name}-whole", changes)
        with pytest.raises(RuntimeError, match="the process died|Connection closed by peer|ranks"):
            processes.run(run, folder, f"{name}-cut", changes, 17)  # the log tells of step 15 already
        cut = folder / f"{name}-cut"
        assert [path.name for path in finished(cut)] == ["step-00000010"]
        # A kill may also come in the middle of a line, or of a checkpoint.
        with open(cut / "log.jsonl", "a") as log:
            log.write('{"kind": "tra')
        (cut / "checkpoints" / "step-00000017.unfinished").mkdir()
        processes.run(run, folder, f"{name}-cut", changes)
    assert_identical(outcome(cut), outcome(folder / f"{name}-whole"))


SAME = {
    "mlm-ddp": dict(objective="mlm"),
    "mlm-fsdp": dict(objective="mlm", training__strategy="fsdp"),
    "gdes-ddp": dict(),
    "gdes-fsdp": dict(training__strategy="fsdp"),
    "es-ddp": dict(rtd__sharing="es"),
    "es-fsdp": dict(rtd__sharing="es", training__strategy="fsdp"),
}


def shorter(batch):
    """Keeps a batch's first 24 tokens or more; how many depends on its tokens alone."""
    size = 24 + int(batch.input_ids.sum()) % 40
    tokens = dict(
        input_ids=batch.input_ids[:size], hidden_ids=batch.hidden_ids[:size], position_ids=batch.position_ids[:size]
    )
    kept = batch.cu_seqlens[batch.cu_seqlens < size]
    ends = torch.cat([kept, torch.tensor([size], dtype=torch.int32)])
    return batch._replace(**tokens, places=batch.places[batch.places < size], cu_seqlens=ends)


def joined(batches):
    starts = [0, *itertools.accumulate(len(batch.input_ids) for batch in batches)]
    ends = [batch.cu_seqlens[1:] + start for batch, start in zip(batches, starts)]
    return type(batches[0])(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        hidden_ids=torch.cat([batch.hidden_ids for batch in batches]),
        places=torch.cat([batch.places + start for batch, start in zip(batches, starts)]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *ends]).to(torch.int32),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        max_seqlen=max(batch.max_seqlen for batch in batches),
    )


def two_steps(folder, output, changes):
    """Makes a run's first two steps on batches of different sizes, with a draw that is always the same; returns the
    weights, the gradients' norms, and each batch's numbers of masked tokens and of tokens.

    A process alone makes each step of one batch; one of several, of its micro-batches.
    """
    from deberta_fast.pretraining import objectives

    objectives.draw = lambda logits, temperature: torch.full((len(logits),), 9)
    torch.manual_seed(0)
    own = Run(settings(folder, output, model=WITHOUT_DROPOUT, training__warmup_steps=0, **changes), _place())
    batches = map(shorter, own.text.batches(0, None))
    counts = []
    for _ in range(2):
        step = [next(batches) for _ in range(own.share.micro_batches)]
        counts += [(len(batch.places), len(batch.input_ids)) for batch in step]
        own.phases.step(step if torch.distributed.is_initialized() else [joined(step)])
    full = lambda x: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
    weights = {name: full(x) for name, x in own.models.named_parameters()}
    return weights, [phase.norm for phase in own.phases.all], counts


def _place():
    from deberta_fast.pretraining.parallel import Place

    if not torch.distributed.is_initialized():
        return Place(torch.device("cpu"))
    return Place(torch.device("cpu"), torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("name", SAME)
def test_two_processes_make_the_steps_of_one(name, folder, processes, monkeypatch):
    """Losses are means over all masked tokens and over all tokens of both and of all micro-batches, whose numbers
    differ."""
    from deberta_fast.pretraining import objectives

    monkeypatch.setattr(objectives, "draw", objectives.draw)
    changes = SAME[name] | dict(training__micro_batch_tokens=64, training__eps=1e-2)
    of_one = {k: v for k, v in changes.items() if k != "training__strategy"}
    alone, norms, counts = two_steps(folder, f"{name}-1", of_one)
    assert all(len(set(numbers)) > 2 for numbers in zip(*counts))
    for weights, found, _ in processes.run(two_steps, folder, f"{name}-2", changes):
        torch.testing.assert_close(found, norms, rtol=1e-4, atol=1e-6)
        assert weights.keys() == alone.keys()
        for parameter, x in alone.items():
            torch.testing.assert_close(weights[parameter], x, rtol=0, atol=2e-6, msg=parameter)


def test_run_continues_with_another_number_of_processes(folder, processes):
    processes.run(run, folder, "fewer", dict(training__strategy="fsdp", training__steps=10))
    log = trained(folder, "fewer", training__steps=20)["log"]
    assert log[-1]["step"] == 20 and log[-1]["mlm_loss"] < log[0]["mlm_loss"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun(strategy, folder, tmp_path):
    """The command as people give it: torchrun makes the processes, the command joins them and prints once."""
    write_settings(settings(folder, tmp_path / "run", training__strategy=strategy), tmp_path / "settings.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "deberta_fast", "pretrain", str(tmp_path / "settings.yaml"), "training.steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.split() == [str(tmp_path / "run" / "checkpoints" / "step-00000004")]
    assert len(list((tmp_path / "run" / "checkpoints" / "step-00000004").glob("*.distcp"))) == 2  # a part of each rank


def evaluated(folder, output, changes):
    own = Run(settings(folder, output, **changes), _place())
    found = {}

    class Log:
        write = lambda self, kind, step, figures: found.update(figures)

    own._evaluate(Log())
    return found


@pytest.mark.parametrize("sharing, strategy", [("gdes", "ddp"), ("es", "fsdp")])
def test_evaluation_counts_all_processes(sharing, strategy, folder, processes):
    held_out = folder / "held-out"
    held_out.mkdir(exist_ok=True)
    changes = dict(
        data__evaluation=[str(texts(held_out))], rtd__sharing=sharing, training__micro_batch_tokens=64,
    )  # fmt: skip
    alone = evaluated(folder, f"{sharing}-evaluated", changes)
    for found in processes.run(evaluated, folder, f"{sharing}-evaluated-2", changes | {"training__strategy": strategy}):
        assert found["mlm_loss"] == pytest.approx(alone["mlm_loss"], rel=1e-5)
        assert found["original"] == pytest.approx(alone["original"], abs=0.01)  # ranks draw other tokens


def test_shares_that_cannot_be_equal(folder, processes):
    with pytest.raises(RuntimeError, match="batch_tokens must be a multiple of rows x processes: 3 rows for 2"):
        processes.run(run, folder, "uneven", dict(training__batch_tokens=192, training__micro_batch_tokens=64))
