"""fusedrnn: fused LSTM, Elman RNN and GRU, forward and backward, for training from Python.

::

    import fusedrnn
    import fusedrnn.functions as F
    import fusedrnn.layers as L

Layers, models and optimizers train networks. ``kernels`` has the kernels alone, which take and return arrays.
"""

from typing import Any

from fusedrnn import interrupts as interrupts  # before all that takes a while

# isort: split

from fusedrnn import checkpoint, cuda, dataloaders, datasets, functions, kernels, layers, models, optimizers
from fusedrnn.autograd import Function, Parameter, Variable, as_array, as_variable
from fusedrnn.config import no_grad, test_mode, using_config
from fusedrnn.dataloaders import DataLoader, SeqDataLoader
from fusedrnn.datasets import Dataset
from fusedrnn.gradcheck import GradcheckError, gradcheck
from fusedrnn.layers import Layer
from fusedrnn.models import Model
from fusedrnn.threads import get_num_threads, set_num_threads

__all__ = [
    "DataLoader",
    "Dataset",
    "Function",
    "GradcheckError",
    "Layer",
    "Model",
    "Parameter",
    "SeqDataLoader",
    "Variable",
    "as_array",
    "as_variable",
    "checkpoint",
    "cuda",
    "dataloaders",
    "datasets",
    "functions",
    "get_num_threads",
    "gradcheck",
    "kernels",
    "layers",
    "models",
    "no_grad",
    "optimizers",
    "set_num_threads",
    "test_mode",
    "using_config",
]

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":  # to look it up takes as long as half of this import
        from fusedrnn import system

        return system.version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
