"""Lets Ctrl-C end ``python -m deberta_fast`` without a traceback while it imports torch, which takes seconds.

Importing this module installs the handler, and ``as_usual`` removes it. Other programs keep their own handler.
"""

import os
import signal
import sys

INTERRUPTED = 130  # exit status of a process that SIGINT ended
_HERE = ("-m", __package__) in zip(sys.orig_argv, sys.orig_argv[1:])


def as_usual() -> None:
    """Restores KeyboardInterrupt, which closes files."""
    if _HERE and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_) -> None:
    os._exit(INTERRUPTED)


if _HERE and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
