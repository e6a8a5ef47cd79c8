"""What test_processes.py runs by torchrun: a step of DistributedDataParallel, compared with one process's."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from native_models import build, inputs_of
from torch.nn.parallel import DistributedDataParallel


def main():
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = inputs_of("ForSequenceClassification", labels=True, batch=2 * ranks)
    alone, model = (build("v3", "ForSequenceClassification").train() for _ in range(2))
    alone(**batch).loss.backward()
    wrapper = DistributedDataParallel(model)
    wrapper(**{name: x[2 * rank : 2 * rank + 2] for name, x in batch.items()}).loss.backward()
    for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=2e-6 * float(1 + expected.grad.abs().max()))
    # A file, not a line: lines of two processes can run into each other
    Path(sys.argv[1], f"rank-{rank}-agrees").touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
