"""Processes over gloo that stay alive for a module of tests and run one function after the other, all of them each."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import torch
from poison import poison_empty_memory

TIMEOUT = 120  # seconds of one function
# A server imports once what most functions need, and all processes are forked from it.
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch.distributed.fsdp", "torch._dynamo", "deberta_fast.distributed",
    "transformers.models.deberta.modeling_deberta", "transformers.models.deberta_v2.modeling_deberta_v2",
])  # fmt: skip


class Processes:
    """``with Processes(2) as processes: processes.run(function, *arguments)`` runs it in two processes of one group.

    Functions belong to the top level of a module. Arguments and results are pickled, and copied. If one process raises
    or dies, or they take too long, all are stopped, so that nobody waits for a lost one; the next ``run`` starts new
    ones.
    """

    def __init__(self, number: int):
        self.number = number
        self._folder: tempfile.TemporaryDirectory | None = None
        self._started: list = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def run(self, function: Callable, *arguments, timeout: float = TIMEOUT) -> list:
        """Returns what each process's ``function(*arguments)`` returned, in the order of ranks.

        Raises:
            RuntimeError: with the traceback of the process that failed, or the ranks that did not answer.
        """
        if not self._started:
            self._start()
        for _, pipe in self._started:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        try:
            return self._answers(function.__name__, time.monotonic() + timeout)
        except BaseException:
            self._stop()
            raise

    def _answers(self, name: str, deadline: float) -> list:
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._started)}
        answers = {}
        while len(answers) < self.number:
            missing = [pipe for pipe, rank in ranks.items() if rank not in answers]
            ready = connection.wait(missing, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{name}: no answer in time from ranks {[ranks[pipe] for pipe in missing]}")
            for pipe in ready:
                try:
                    result, error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    result, error = None, "the process died"
                if error is not None:
                    raise RuntimeError(f"{name}, rank {ranks[pipe]}:\n{error}")
                answers[ranks[pipe]] = result
        return [answers[rank] for rank in range(self.number)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="processes-")
        for rank in range(self.number):
            own, other = SERVER.Pipe()
            place = rank, self.number, str(Path(self._folder.name) / "store")
            process = SERVER.Process(target=_serve, args=(other, *place), daemon=True)
            process.start()
            other.close()
            self._started.append((process, own))

    def _stop(self) -> None:
        for process, pipe in self._started:
            pipe.close()
            process.kill()
            process.join()
        self._started = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _serve(pipe: connection.Connection, rank: int, number: int, store: str) -> None:
    """Answers requests until the pipe is closed."""
    torch.set_num_threads(1)
    poison_empty_memory()
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number),
        MASTER_ADDR="localhost", MASTER_PORT="0", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.distributed.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=number, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(request)
            torch.manual_seed(0)
            answer = pickle.dumps((function(*arguments), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)
