"""The peers by name, and who takes part in a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fusedrnn.bench.libraries import Library, Native, Numba, Peer, Reference
from fusedrnn.bench.peer_dezero import DeZero
from fusedrnn.bench.peer_jax import Jax
from fusedrnn.bench.peer_loops import LoopCompiled, LoopInJax, LoopInTorch, LoopInTorchScript
from fusedrnn.bench.peer_onnx import OnnxRuntime
from fusedrnn.bench.peer_torch import (
    FusedCell,
    FusedLayer,
    Place,
    Torch,
    TorchCell,
    TorchMasked,
    TorchPacked,
    TorchSegments,
    TorchSplit,
)
from fusedrnn.problems import Case, Data

PEERS: dict[str, type[Peer]] = {
    "torch": Torch,
    "torch-cell": TorchCell,
    "torch-packed": TorchPacked,
    "torch-masked": TorchMasked,
    "torch-segments": TorchSegments,
    "torch-split": TorchSplit,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
    "dezero": DeZero,
    "torch-loop": LoopInTorch,
    "torchscript": LoopInTorchScript,
    "jax-scan": LoopInJax,
    "torch-compile": LoopCompiled,
    "numba": Numba,
    "reference": Reference,
}
OWN = ("numba", "reference")  # backends of ours: shown, but nobody's best
LOOPS = ("torch-loop", "torchscript", "jax-scan", "torch-compile")  # for cells that no library has
ASKED_FOR = (*OWN, "torch-compile")  # take part where they are named; the last needs a minute to compile
APIS: dict[str, type[Torch]] = {"layer": FusedLayer, "cell": FusedCell}
LOW = "bfloat16"  # which tensors alone have


def ours(data: Data, backend: str, threads: int, dtype: str = "float32") -> Library:
    """The one that is measured."""
    api = data.case.api
    if dtype == LOW:
        return APIS[api or "layer"](data, threads, Place(dtype=LOW))
    return APIS[api](data, threads) if api else Native(data, backend)


def peer(name: str, data: Data, threads: int, dtype: str = "float32") -> Library:
    """One of ``PEERS``."""
    if dtype == LOW:
        return cast(type[Torch], PEERS[name])(data, threads, Place(dtype=LOW))
    return PEERS[name](data, threads)


def refuses(name: str, case: Case, dtype: str) -> str | None:
    """None where a peer can take part in a case, else why not."""
    if not case.cell.is_builtin and name not in (*LOOPS, *OWN):
        return f"it has no {case.cell.name}"
    if dtype == LOW and not issubclass(PEERS[name], Torch):
        return "in bfloat16 PyTorch's layers and cells alone are timed"
    return PEERS[name].refuses(case, dtype)


def choose(
    names: Sequence[str] | None, cases: Sequence[Case], dtype: str, backend: str
) -> tuple[list[str], list[str]]:
    """Who takes part, and a line for each who is left out.

    Args:
        names: Out of ``PEERS``; None for all but those of ``ASKED_FOR``, for a user's cell with Numba.
        cases, dtype: What is timed; who could take part in none of it is left out.
        backend: The one that is measured, which is no peer of its own.

    Raises:
        RuntimeError: A peer was asked for by name and cannot run.
        ValueError: A peer was asked for by name and takes part in no case, or is what is measured.
    """
    wanted = names
    if wanted is None:
        users = not all(case.cell.is_builtin for case in cases)
        wanted = [name for name in PEERS if name not in ASKED_FOR or (name == "numba" and users)]
    taken, left_out = [], []
    for name in wanted:
        if name == backend:
            if names is not None:
                raise ValueError(f"--peers {name}: it is the backend that is measured; name another")
            continue
        reasons = [refuses(name, case, dtype) for case in cases]
        if all(reasons):
            if names is not None:
                raise ValueError(f"--peers {name}: it takes part in none of these cases: {reasons[0]}")
        elif (missing := PEERS[name].missing()) is None:
            taken.append(name)
        elif names is not None:
            raise RuntimeError(f"peer {name}: {missing}")
        else:
            left_out.append(f"without {name}: {missing}")
    return taken, left_out
