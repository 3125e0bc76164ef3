"""csrc/cuda compiled to GPU code by NVRTC: no nvcc, no header of a toolkit, and no GPU needed.

The code of a cell, dtype and architecture is kept on disk in ``$FUSEDRNN_CACHE``, else in
``$XDG_CACHE_HOME/fusedrnn``, else in ``~/.cache/fusedrnn``, under a hash of all that it depends on. CuPy's
own cache does not look at the headers. Importing this file imports no CuPy.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

WARPS = 8  # of a block; FUSEDRNN_WARPS
# The kernel variants. They are compiled one by one: a call needs two or three.
KERNELS = ("steps", "cluster", "grid")
DTYPES = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat16"}  # in C++
PRECISIONS = ("ieee", "tf32", "bf16", "fp16")  # of csrc/cuda/tile.h
_PACKAGE = Path(__file__).resolve().parents[2]


class Code(NamedTuple):
    """What the kernels are compiled for."""

    cell: str  # a type of csrc/cells/cells.def, or Regularized<> of one
    dtype: str  # out of the values of ``DTYPES``
    precision: str = "ieee"  # of the products within a launch; of Half fp16, of Bfloat16 bf16 alone


@functools.cache
def sources() -> Path:
    """The folder csrc: in the installed package, or in a source tree."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parents[1] / "csrc"):
        if (folder / "cuda" / "kernels.cu").is_file():
            return folder
    raise RuntimeError(f"the sources of the CUDA kernels, csrc/cuda, are not beside {_PACKAGE}")


def variant_of(kernel: str) -> str:
    """Out of ``KERNELS``, the one that a kernel of csrc/cuda/kernels.cu belongs to."""
    variant = kernel.partition("_")[0]
    return variant if variant in KERNELS else "steps"


def cubin(code: Code, architecture: str, variant: str | None = None) -> bytes:
    """Code for a GPU by NVRTC, of this run or of an earlier one.

    Args:
        code: For what.
        architecture: Such as "sm_90".
        variant: Whose kernels, out of ``KERNELS``; None: all.

    Raises:
        RuntimeError: NVRTC refuses; the message is its own.
    """
    macros = {name.upper(): value for name, value in code._asdict().items()} | {"WARPS": WARPS}
    name = code.cell.replace("<", "-").rstrip(">")  # Regularized<Lstm>
    if variant:
        macros["ONLY"] = KERNELS.index(variant)
        name += f"-{variant}"
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--fmad=false"]
    options += [f"--define-macro=FUSEDRNN_{macro}={value}" for macro, value in macros.items()]
    path = folder() / "-".join((name, *code[1:], architecture, f"{key(options, version())}.cubin"))
    with contextlib.suppress(OSError):
        return path.read_bytes()
    headers = sources(), sources() / "cuda" / "nvrtc"
    made = _compile([*options, *(f"--include-path={path}" for path in headers)])
    with contextlib.suppress(OSError):  # a folder that cannot be written to is no error
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as new:
            (Path(new) / path.name).write_bytes(made)
            os.replace(Path(new) / path.name, path)  # at once: other processes may do the same
    return made


def folder() -> Path:
    """Where compiled code is kept."""
    if own := os.environ.get("FUSEDRNN_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "fusedrnn" if base else Path("~/.cache/fusedrnn").expanduser()


def key(*said: Any) -> str:
    """A hash of the sources, and of what a compiler is told and is."""
    digest = hashlib.sha256(repr(said).encode())
    csrc = sources()
    for path in sorted(csrc.rglob("*")):
        name = path.relative_to(csrc).as_posix()
        if path.suffix in (".h", ".cu") and not name.startswith("cpu/"):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def version() -> tuple[int, int]:
    """Of NVRTC: major, minor."""
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return major, minor


def _compile(options: list[str]) -> bytes:
    from cupy.cuda import nvrtc

    text = (sources() / "cuda" / "kernels.cu").read_text()
    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        code: bytes = nvrtc.getCUBIN(program)
        return code
    except nvrtc.NVRTCError as error:
        said = nvrtc.getProgramLog(program).strip()
        raise RuntimeError(f"{error}, with {' '.join(options)}: {said}") from None
    finally:
        nvrtc.destroyProgram(program)
