"""Load a cell by its file, ``FILE.py:NAME``, or its module, ``package.module:NAME``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fusedrnn.cells.definition import Cell
from fusedrnn.cells.symbols import CellError, kind, line_of


def load(text: str) -> Cell:
    """The cell of this name, with the defaults of its options; its function has been run.

    A file becomes a module with the name of the file without ``.py``, so that the cell can be pickled, unless
    another module has that name.

    Raises:
        CellError: The file raises an error, or the name is not a cell; the message names the user's line.
        OSError: The file does not exist.
        ValueError: The name does not exist in it, or ``text`` has another form.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"expected a cell as FILE.py:NAME, such as cells.py:mgu, got {text!r}")
    module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
    found = getattr(module, name, None)
    if found is None:
        listed = [n for n, value in vars(module).items() if isinstance(value, Cell)]
        raise ValueError(f"{place} has no {name}; its cells: {', '.join(listed) or 'none'}")
    if not isinstance(found, Cell):
        raise CellError(f"{place}: expected {name} to be a cell, made by @cell, got {kind(found)}")
    with _naming_the_line(Path(found.function.__code__.co_filename)):
        _ = found.trace, found.gradient
    return found


def _of_name(name: str) -> ModuleType:
    """Import a module, which may be in the current folder."""
    with _first_on_the_path(Path.cwd()):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            raise ValueError(f"there is no module {name}; write a file with .py, as in cells.py:mgu")
        with _naming_the_line(Path(spec.origin or name)):
            return importlib.import_module(name)


def _of_file(path: Path) -> ModuleType:
    """Run the file as ``python FILE.py`` would, with its folder first on the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path = path.resolve()
    known = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    taken = known is not None and (known.origin is None or Path(known.origin).resolve() != path)
    name = f"file_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _first_on_the_path(path.parent), _naming_the_line(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _naming_the_line(path: Path) -> Iterator[None]:
    """Let errors of any kind, and an exit, name the last line of this file in their traceback."""
    try:
        yield
    except CellError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = line_of(str(path), lines[-1] or 0) if lines else str(path)
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
            said = f"{type(error).__name__}: {error.msg}"
        raise CellError(f"{where}\n{said}") from error
