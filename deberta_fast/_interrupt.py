"""Ctrl-C while ``python -m deberta_fast`` still imports torch, which takes seconds: the end, as later on, and quietly.

To import this is to ask for it, until ``as_usual``. Other programs that import the package are left alone.
"""

import os
import signal
import sys

INTERRUPTED = 130  # the exit status of what SIGINT ended
_HERE = ("-m", __package__) in zip(sys.orig_argv, sys.orig_argv[1:])


def as_usual() -> None:
    """Back to KeyboardInterrupt, upon which files are closed."""
    if _HERE and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_) -> None:
    os._exit(INTERRUPTED)


if _HERE and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
