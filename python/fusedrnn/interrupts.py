"""Ctrl-C while the command line is imported: the process exits at once, without a traceback.

``fusedrnn`` imports this first, since that takes a while. In other programs it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # the exit code


def _is_command() -> bool:
    """Whether this process is ``fusedrnn`` or ``python -m fusedrnn``."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # Python has not found the module yet
        return not {"fusedrnn", "-mfusedrnn"}.isdisjoint(sys.orig_argv)
    return Path(name).stem == "fusedrnn"


def _leave(number: int, frame: Any) -> None:
    os._exit(INTERRUPTED)  # which no import can catch


def raise_again() -> None:
    """From now on, Ctrl-C raises a KeyboardInterrupt as usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
