"""csrc/cuda compiled to GPU code by NVRTC: no nvcc, no header of a toolkit, and no GPU needed.

The code of a cell, dtype and architecture is kept on disk in ``$FUSEDRNN_CACHE``, else in
``$XDG_CACHE_HOME/fusedrnn``, else in ``~/.cache/fusedrnn``, under a hash of all that it depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

WARPS = 8  # of a block; FUSEDRNN_WARPS
# The kernel variants. They are compiled one by one: a call needs two or three.
KERNELS = ("steps", "cluster_registers", "cluster", "grid_registers", "grid")
DTYPES = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat16"}  # in C++
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16", "fp16")  # of csrc/cuda/tile.h
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
    variant = kernel.replace("_forward", "").replace("_backward", "")
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
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(made)
                file.flush()
                os.replace(file.name, path)  # at once: other processes may do the same
            except BaseException:
                os.unlink(file.name)
                raise
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
    used = [csrc / "mask_rule.h", csrc / "steps.h"]
    for name in ("cuda", "cells", "simd"):
        used += (csrc / name).rglob("*")
    for path in sorted(p for p in used if p.suffix in (".h", ".cu")):
        digest.update(str(path.relative_to(csrc)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


@functools.cache
def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def version() -> tuple[int, int]:
    """Of NVRTC: major, minor."""
    major, minor = _call("nvrtcVersion")
    return major, minor


def _call(name: str, *arguments: Any) -> Any:
    """A function of NVRTC: what it gives beside its status, which is checked."""
    status, *values = getattr(_nvrtc(), name)(*arguments)
    if status != _nvrtc().nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{name}: {status.name}")
    return values[0] if len(values) == 1 else values


def _compile(options: list[str]) -> bytes:
    text = (sources() / "cuda" / "kernels.cu").read_bytes()
    program = _call("nvrtcCreateProgram", text, b"kernels.cu", 0, [], [])
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), [o.encode() for o in options])
        except RuntimeError as error:
            log = b" " * _call("nvrtcGetProgramLogSize", program)
            _call("nvrtcGetProgramLog", program, log)
            said = log.decode(errors="replace").strip(" \0")
            raise RuntimeError(f"{error}, with {' '.join(options)}: {said}") from None
        code: bytes = b" " * _call("nvrtcGetCUBINSize", program)
        _call("nvrtcGetCUBIN", program, code)
        return code
    finally:
        _call("nvrtcDestroyProgram", program)
