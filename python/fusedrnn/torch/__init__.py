"""PyTorch's recurrent layers with our kernels: ``from fusedrnn.torch import LSTM``."""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("fusedrnn.torch needs PyTorch: pip install torch") from error

import contextlib as _contextlib

from fusedrnn import threads as _threads
from fusedrnn.torch import compilable
from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.convert import Converted, convert, patched, to_torch
from fusedrnn.torch.frozen import freeze, unfreeze
from fusedrnn.torch.layers import GRU, LSTM, RNN
from fusedrnn.torch.own import Recurrent, RecurrentCell
from fusedrnn.torch.paths import FallbackWarning, fallback, set_fallback_errors

# PyTorch's threads spin after its operations: beside them ours would wait (docs/speed.md).
with _contextlib.suppress(RuntimeError):
    _threads.set_thread_pool("openmp")

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Converted",
    "FallbackWarning",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "compilable",
    "convert",
    "fallback",
    "freeze",
    "patched",
    "set_fallback_errors",
    "to_torch",
    "unfreeze",
]
