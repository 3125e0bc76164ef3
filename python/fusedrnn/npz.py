"""Arrays in ``.npz`` files without pickle, which are never written incompletely."""

from __future__ import annotations

import errno
import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusedrnn.backends.arguments import bfloat16
from fusedrnn.backends.protocol import Array

PathLike = str | os.PathLike[str]


def write(path: PathLike, arrays: Mapping[str, Array], previous: Path | None = None) -> None:
    """Write to a temporary file next to ``path``, flush it to the disk, then rename it.

    A file that was at ``path`` before is renamed to ``previous``, if that is given. NumPy's format has no
    bfloat16: such arrays are written in float32, which has all of its numbers.
    """
    arrays = {k: a.astype(np.float32) if a.dtype in bfloat16() else a for k, a in arrays.items()}
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write to, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    # Always the same name: a file left by a killed process is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:  # np.savez takes some names as arguments of its own
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "nt":  # which opens no folders
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name is on the disk too
    finally:
        os.close(directory)


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that the first one always exists."""
    link = previous.with_name(f".{previous.name}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # not every file system has links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def read(path: PathLike) -> dict[str, Array]:
    """Read all arrays of a file. A ValueError names an entry that is pickled or damaged."""
    entry = ""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            arrays = {}
            for name in archive.namelist():
                entry = name.removesuffix(".npy")
                member = io.BytesIO(archive.read(name))  # all of it, which checks its checksum
                arrays[entry] = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):
                    raise ValueError("more bytes than the array has")
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        what = f"entry {entry!r}" if entry else "not an .npz file, or a truncated one"
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise ValueError(f"{path}: entry {entry!r} is pickled, which is never loaded") from None
        raise ValueError(f"{path}: {what}: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a position that is not in the file
            raise
        raise ValueError(f"{path}: not an .npz file, or a damaged one: {error}") from error


def checked(array: Array, shape: tuple[int | None, ...] | None, key: str, source: str) -> Array:
    """The array, if it holds real numbers and has the shape, in which None is any length."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{source}: entry {key!r}: expected real numbers, got {array.dtype}")
    if shape is not None and (
        array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True))
    ):
        expected = str(tuple("any" if n is None else n for n in shape)).replace("'", "")
        raise ValueError(f"{source}: entry {key!r}: expected shape {expected}, got {array.shape}")
    return array
