"""Runs a script of examples/ as a reader would, with fewer epochs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "examples"


def run_example(monkeypatch: Any, name: str, epochs: int, *arguments: str) -> dict[str, Any]:
    """Returns the names that the script defines."""
    path = FOLDER / f"{name}.py"
    code, found = re.subn(r"^(EPOCHS\b.* = )\d+", rf"\g<1>{epochs}", path.read_text(), flags=re.MULTILINE)
    assert found == 1, f"{path} has no EPOCHS"
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, path, "exec"), names)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    return names
