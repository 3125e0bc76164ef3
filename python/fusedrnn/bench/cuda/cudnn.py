"""Which of cuDNN's algorithms PyTorch asks for.

What ``get_algo`` in PyTorch's aten/src/ATen/native/cudnn/RNN.cpp decides, for layers without a projection on
compute capability 8.0 and later. Nothing tells from outside what cuDNN then does. PyTorch never asks for
PERSIST_DYNAMIC.
"""

from __future__ import annotations

from fusedrnn.problems import Case

SMALL_H, STATIC, STANDARD = "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC", "STANDARD"
SMALLEST_GPU = 98  # multiprocessors, for PERSIST_STATIC


def algorithm(
    case: Case, dtype: str, *, backward: bool, capability: tuple[int, int], multiprocessors: int
) -> str:
    """Of one pass of ``torch.nn``'s layer; ``backward`` is the pass back.

    A ragged case goes packed, one with resets step by step.
    """
    if case.ragged or dtype == "float64":
        return STANDARD
    _, B, I, H = case.shape
    elman = case.cell.name == "rnn"
    forward_up_to, back_up_to = (384, 256) if elman else (192, 128)
    small = back_up_to if backward else forward_up_to
    if small >= H:
        return SMALL_H
    fitting = H <= 1024 and H % 128 == 0 and I % 128 == 0
    one_layer = case.layers == 1 and not case.bidirectional
    if dtype == "float16" and fitting and one_layer and _fits(case, B, H, capability, multiprocessors):
        return STATIC
    return STANDARD


def _fits(case: Case, B: int, H: int, capability: tuple[int, int], multiprocessors: int) -> bool:
    """Whether PyTorch trusts PERSIST_STATIC with this cell and batch on this GPU."""
    if multiprocessors < SMALLEST_GPU or capability[1] == 6 or B % 8 or B > 128:
        return False
    if case.cell.name == "gru":
        return False
    return case.cell.name == "lstm" or B < 96 or H < 896
