"""The tests' own processes: they compute together, and a failure shows its traceback instead of a hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import Processes


def total(number):
    x = torch.tensor([float(number + torch.distributed.get_rank())])
    torch.distributed.all_reduce(x)
    return torch.distributed.get_rank(), x


def one_fails():
    if torch.distributed.get_rank() == 1:
        raise ValueError("this rank has no data")
    torch.distributed.barrier()


def one_dies():
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    torch.distributed.barrier()


def one_is_late():
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def test_results_and_failures():
    with Processes(2) as processes:
        for number in (1, 5):
            assert processes.run(total, number) == [(rank, torch.tensor([2.0 * number + 1])) for rank in range(2)]
        with pytest.raises(RuntimeError, match=r"(?s)one_fails, rank 1:.*ValueError: this rank has no data"):
            processes.run(one_fails)
        with pytest.raises(RuntimeError, match="rank 1:\nthe process died"):
            processes.run(one_dies)
        assert [rank for rank, _ in processes.run(total, 0)] == [0, 1]
        with pytest.raises(RuntimeError, match=r"one_is_late: no answer in time from ranks \[0\]"):
            processes.run(one_is_late, timeout=3)


SCRIPT = Path(__file__).with_name("train.py")


def test_torchrun(tmp_path):
    """A script under torchrun: its ranks' gradients equal one process's."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "localhost",
        "--nproc-per-node",
        "2",
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])
    command += [str(SCRIPT), str(tmp_path)]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, timeout=120, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank-0-agrees", "rank-1-agrees"]
