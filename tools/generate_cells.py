"""Writes csrc/cells/derived.h: the built-in cells in C++, derived from python/fusedrnn/cells/builtin.py.

It imports neither fusedrnn nor NumPy, only the files that derive.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def text() -> str:
    """What derived.h has to be."""
    for name in ("fusedrnn", "fusedrnn.cells"):  # without what the packages import
        package = ModuleType(name)
        package.__path__ = [str((ROOT / "python").joinpath(*name.split(".")))]
        sys.modules[name] = package
    header: str = importlib.import_module("cells_cpp").header()
    return header


if __name__ == "__main__":
    (ROOT / "csrc/cells/derived.h").write_text(text())
