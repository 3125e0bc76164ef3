"""Tensors as arrays that share their memory, and back.

``Tensor.numpy`` makes a storage one that cannot be resized. So memory is lent by DLPack, for the time of a
call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fusedrnn.torch import gpu

DIRECT = False  # whether the compiled module takes tensors themselves
try:
    from fusedrnn import _core

    _core.take_tensors(Tensor, torch.nn.Parameter, Tensor.__dlpack_c_exchange_api__)  # type: ignore[attr-defined]
    DIRECT = True
except (ImportError, AttributeError, ValueError):  # not built; PyTorch before 2.10; another version of DLPack
    pass


def given(tensors: Sequence[Tensor | None]) -> Sequence[Any]:
    """Tensors as the compiled module takes them."""
    return tensors if DIRECT else [array(t) for t in tensors]


def array(t: Tensor | None) -> Any:
    """The tensor's memory as an array, NumPy's or on a GPU CuPy's."""
    if t is None:
        return None
    if not t.is_cpu:
        return gpu.array(t.detach())
    t = t.detach()
    if t.dtype is torch.bool:  # which NumPy does not take
        return np.from_dlpack(t.view(torch.uint8)).view(bool)  # type: ignore[arg-type]
    return np.from_dlpack(t)  # type: ignore[arg-type]


def bits(t: Any) -> Any:
    """The memory of a tensor in bfloat16 as one of int16, as the compiled module takes it; None as it is."""
    return None if t is None else t.detach().view(torch.int16)


def tensor(a: Any) -> Tensor:
    """The memory of an array as a tensor."""
    return torch.from_numpy(a) if type(a) is np.ndarray else gpu.tensor(a)


def contiguous(t: Tensor | None) -> Tensor | None:
    """The tensor in one piece, copied only where it is not."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def contiguous_features(t: Tensor | None) -> Tensor | None:
    """The tensor with contiguous features, which is all that the kernels ask of a sequence."""
    return t if t is None or t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def plain(t: Tensor | None) -> Tensor | None:
    """The tensor as a plain one: no negative view, no zeros without memory, no subclass."""
    if t is None or (type(t) is Tensor and not t.is_neg() and not t._is_zerotensor()):
        return t
    return t.new_zeros(t.shape) if t._is_zerotensor() else t.as_subclass(Tensor).resolve_neg()


def _readable(t: Any) -> Any:
    """A tensor that is aligned and plain; all else as it is."""
    if not isinstance(t, Tensor):
        return t
    return t.clone() if t.data_ptr() % t.element_size() else plain(t)


def with_copies(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """A function of a call that runs again, with copies, if kernels refuse memory: not aligned, or none."""

    @functools.wraps(function)
    def run(call: Any, *rest: Any) -> list[Tensor]:
        try:
            return function(call, *rest)
        except ValueError:
            given = [call.learned(), *rest]
            learned, *rest_again = again = tree_map(_readable, given)
            if all(a is b for a, b in zip(tree_leaves(again), tree_leaves(given), strict=True)):
                raise
        return function(call.with_learned(learned), *rest_again)

    return run
