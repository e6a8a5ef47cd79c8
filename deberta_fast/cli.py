"""``python -m deberta_fast``: ``run`` answers JSON lines with a pipeline, ``check`` tests the backends.

``pretrain``, ``export``, ``tokenize`` and ``train-tokenizer`` are those of ``pretraining.command``.
"""

import argparse
import contextlib
import json
import os
import queue
import stat
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

import torch

from . import __version__
from ._interrupt import INTERRUPTED
from .op import backends
from .pipelines import ALIASES, TASKS, InputError, pipeline
from .pipelines.base import progress_bar
from .pretraining import command as pretraining
from .selfcheck import check, usable_device

# Largest number of lines that are read ahead and answered together.
WAITING = 1024
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
# Exit statuses. FAILED: the input or a file has an error, or no fused backend passed the check. MISUSED: the command
# line has an error. UNREAD: the reader of the results ended first; shells give this status after SIGPIPE.
FAILED, MISUSED, UNREAD = 1, 2, 141
# A RuntimeError of torch with one of these texts means that memory on the CPU is short. The first two are its
# allocator's, the last comes from a parallel loop that could not start.
NO_MEMORY = ("can't allocate memory", "not enough memory", "torch_parallel_for")
EPILOG = """\
A line of input is a JSON string or {"text": ...}; for text-classification also {"text": ..., "text_pair": ...}; for
question-answering {"question": ..., "context": ...}. Every line gives one line of JSON, in the same order and as soon
as it is known. The results are those of deberta_fast.pipelines.

  echo '"The capital of France is [MASK]."' | python -m deberta_fast run --task fill-mask --model microsoft/deberta-base
  python -m deberta_fast run --task zero-shot-classification --candidate-labels politics,sport --model DIR \\
    --input texts.jsonl --output labels.jsonl
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m deberta_fast", description="Fast DeBERTa.")
    parser.add_argument("--version", action="version", version=f"deberta_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_check(commands)
    pretraining.add_to(commands)
    given = parser.parse_args(arguments)
    try:
        if given.command in pretraining.COMMANDS:
            return pretraining.run(given)
        return _check(given) if given.command == "check" else _run(given, commands.choices["run"])
    except BrokenPipeError:  # The process that reads the results has ended.
        return UNREAD
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"{parser.prog}: {_reason(error)}", file=sys.stderr)
        return FAILED


def _reason(error: Exception) -> str:
    """Returns an error's message in one line, and says clearly when memory was short."""
    reason = next(filter(None, map(str.strip, str(error).splitlines())), "")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(x in reason for x in NO_MEMORY):
        return f"out of memory; a smaller --batch-size or shorter texts need less ({reason or type(error).__name__})"
    return reason


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        help="answer lines of JSON with a model",
        description="Answers lines of JSON with a model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options that are not given are absent, so the task's defaults apply.
        argument_default=argparse.SUPPRESS,
    )
    run.add_argument("--task", required=True, choices=[*TASKS, *ALIASES], metavar="TASK", help=", ".join(TASKS))
    run.add_argument("--model", required=True, metavar="DIR", help="folder with a checkpoint, or its name on the hub")
    run.add_argument("--tokenizer", default=None, metavar="DIR", help="folder or name, if it differs from the model's")
    run.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    run.add_argument("--local-files-only", action="store_true", help="download nothing")
    run.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    run.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model; auto is the checkpoint's")
    run.add_argument("--backend", default=None, choices=backends.BACKENDS, help="of attention; by default the best one")
    run.add_argument("--batch-size", default=None, type=int, metavar="N", help="inputs; by default a budget of tokens")
    run.add_argument("--input", default=None, metavar="FILE", help="standard input by default")
    run.add_argument("--output", default=None, metavar="FILE", help="standard output by default")
    add = run.add_argument_group("options of the tasks").add_argument
    add("--top-k", type=_number_or_all, metavar="N", help='how many answers; "all" for all labels of a text')
    add("--targets", type=_list, metavar="A,B,...", help="fill-mask: tokens to choose from")
    add("--function-to-apply", metavar="NAME", help="text-classification: sigmoid, softmax or none")
    add("--truncation", action="store_true", help="fill-mask, text-classification: shorten long texts")
    add("--max-length", type=int, metavar="N", help="tokens that --truncation leaves; with --stride, tokens of a part")
    add("--candidate-labels", type=_list, metavar="A,B,...", help="zero-shot-classification: the labels")
    add("--hypothesis-template", metavar="TEXT", help='zero-shot-classification: "This example is {}." by default')
    add("--multi-label", action="store_true", help="zero-shot-classification: score each label by itself")
    add("--aggregation-strategy", metavar="NAME", help="token-classification: none, simple, first, average or max")
    add("--ignore-labels", type=_list, metavar="A,B,...", help='token-classification: labels left out; "O" by default')
    add("--stride", type=int, metavar="N", help="token-classification: overlap of the parts of long texts")
    add("--doc-stride", type=int, metavar="N", help="question-answering: overlap of the parts of long contexts")
    add("--max-answer-len", type=int, metavar="N", help="question-answering: most tokens of an answer; 15 by default")
    add("--max-seq-len", type=int, metavar="N", help="question-answering: tokens of question and part; 384 by default")
    add("--max-question-len", type=int, metavar="N", help="question-answering: tokens to cut questions to")
    add("--handle-impossible-answer", action="store_true", help="question-answering: there may be no answer")
    add("--no-align-to-words", dest="align_to_words", action="store_false", help="question-answering: may split words")


def _add_check(commands) -> None:
    add = commands.add_parser(
        "check",
        help="compare and time the backends on this machine",
        description="Prints what is installed, compares every backend with the reference on a device, times it, and "
        "prints which one is the default. Exit status 0 if a fused backend passed, 1 if none did. A bug report should "
        "contain the output.",
    ).add_argument
    add("--device", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    add("--head-size", type=int, default=64, metavar="N", help="64 by default, as in all published models")
    dtypes = [name for name in DTYPES if name != "auto"]
    add("--dtype", nargs="+", choices=dtypes, default=dtypes, help="all three by default")
    add("--quick", action="store_true", help="check only dense calls with masks, and time nothing")
    add("--json", action="store_true", help="print a JSON object")


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _check(given: argparse.Namespace) -> int:
    if sys.stderr.isatty():
        print("checking takes a minute or two, and some more the first time that Triton compiles", file=sys.stderr)
    dtypes = tuple(DTYPES[name] for name in given.dtype)
    report = check(given.device, head_size=given.head_size, dtypes=dtypes, quick=given.quick)
    print(json.dumps(report.as_dict(), indent=1) if given.json else report)
    return 0 if report.passed else FAILED


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.device is not None:
        usable_device(given.device)
    own = ("command", "task", "model", "dtype", "input", "output")
    options = {name: value for name, value in vars(given).items() if name not in own}
    general = ("tokenizer", "device", "batch_size", "backend", "revision", "local_files_only")
    kind = TASKS[ALIASES.get(given.task, given.task)]
    try:
        _check_files(given)
        kind.changed({name: value for name, value in options.items() if name not in general})
        if kind.task == "zero-shot-classification" and "candidate_labels" not in options:
            raise ValueError(f"{kind.task} needs --candidate-labels")
    except (TypeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return MISUSED
    # File descriptor 0 is read instead of sys.stdin, and is not closed: the reading thread may still wait for a line,
    # and closing the file would wait for that thread.
    source = open(given.input or 0, "rb", closefd=bool(given.input))
    with contextlib.ExitStack() as stack:
        answer = pipeline(given.task, given.model, dtype=DTYPES[given.dtype], progress=False, **options)
        target = stack.enter_context(open(given.output or 1, "wb", closefd=bool(given.output)))
        if source.isatty():
            print("reading JSON from the terminal, one input per line; Ctrl-D ends", file=sys.stderr)
        shown = stack.enter_context(_bar(source, target))
        for lines in _batches(source):
            for result in _results(answer, lines):
                target.write(result)
                target.flush()
                if shown is not None:
                    shown.update()
    return 0


def _check_files(given: argparse.Namespace) -> None:
    """Raises ValueError if input and output are the same file, under any two names."""
    with contextlib.suppress(OSError):  # If one of the files does not exist, they differ.
        source, target = os.stat(given.input or 0), os.stat(given.output or 1)
        if os.path.samestat(source, target) and stat.S_ISREG(source.st_mode):
            name = given.input or given.output or "standard input"
            raise ValueError(f"{name}: input and output are the same file, which would be overwritten")


def _bar(source: BinaryIO, target: BinaryIO):
    """Returns a bar on stderr if that is a terminal on which neither input nor results appear."""
    return progress_bar(sys.stderr.isatty() and not source.isatty() and not target.isatty(), unit=" lines")


def _batches(source: BinaryIO) -> Iterator[list[tuple[int, bytes]]]:
    """Yields numbered lines, as many at once as have arrived: few from a slow writer, large batches from a fast one."""
    waiting = queue.Queue(WAITING)

    def read():
        try:
            for numbered in enumerate(source, 1):
                waiting.put(numbered)
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        items = [waiting.get()]
        with contextlib.suppress(queue.Empty):
            while len(items) < WAITING:
                items.append(waiting.get_nowait())
        ended = not isinstance(items[-1], tuple)  # The thread puts None at the end of the input, or an error.
        last = items.pop() if ended else None
        if items:
            yield items
    if last is not None:
        raise last


def _results(answer, lines: list[tuple[int, bytes]]) -> Iterator[bytes]:
    """Yields lines of results. Raises ValueError after the results of the lines before the first unusable one."""
    items, wrong, done = [], None, 0
    for number, line in lines:
        try:
            items.append(_item(line))
        except (TypeError, ValueError) as error:
            wrong = ValueError(f"line {number}: {error}")
            break
    while done < len(items):
        first = done
        try:
            for result in answer(iter(items[first:])):
                yield _line(result, lines[done][0])
                done += 1
        except InputError as error:
            # The pipeline answers windows of items. Items before the wrong one in its window have no answer yet, so the
            # loop runs again with these.
            items = items[: first + error.index]
            wrong = ValueError(f"line {lines[len(items)][0]}: {error.reason}")
    if wrong is not None:
        raise wrong


def _line(result, number: int) -> bytes:
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError:
        raise ValueError(f"line {number}: a score is infinite or no number") from None


def _item(line: bytes):
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        hint = f"{error.msg} in column {error.colno}" if line.strip() else "it is empty"
        raise ValueError(f"expected JSON, a string in quotes or an object: {hint}") from None
    except RecursionError:
        raise ValueError("expected JSON, a string in quotes or an object: it is nested too deeply") from None
    if not isinstance(item, str | dict):
        raise TypeError(f"expected a JSON string or object, got {line.decode().strip()[:40]}")
    return item
