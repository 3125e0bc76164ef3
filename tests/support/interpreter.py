"""An interpreter of its own, for what a process does only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(
    code: str, *arguments: str, cwd: Path | None = None, limit: float = 280, **environment: str
) -> str:
    """What the code prints; an error where it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
