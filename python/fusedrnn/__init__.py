"""fusedrnn: fused LSTM, Elman RNN and GRU, forward and backward, for training from Python.

    import fusedrnn
    import fusedrnn.functions as F
    import fusedrnn.layers as L

Layers, models and optimisers are for everyday use. ``kernels`` has the kernels alone: arrays in, arrays out.
"""

from fusedrnn import (
    checkpoint,
    cuda,
    dataloaders,
    datasets,
    functions,
    kernels,
    layers,
    models,
    optimizers,
)
from fusedrnn.autograd import (
    Function,
    Parameter,
    Variable,
    as_array,
    as_variable,
    no_grad,
    test_mode,
    using_config,
)
from fusedrnn.dataloaders import DataLoader, SeqDataLoader
from fusedrnn.datasets import Dataset
from fusedrnn.gradcheck import GradcheckError, gradcheck
from fusedrnn.layers import Layer
from fusedrnn.models import Model

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
    "gradcheck",
    "kernels",
    "layers",
    "models",
    "no_grad",
    "optimizers",
    "test_mode",
    "using_config",
]
