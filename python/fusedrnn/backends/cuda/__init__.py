"""The CUDA backend: the kernels of csrc/cuda on arrays in a GPU's memory, CuPy's.

Experimental: no kernel has run on a GPU yet (docs/cuda.md). Importing it imports no CuPy.
"""

from fusedrnn.backends.cuda.backend import KERNEL, PRECISION, CudaBackend
from fusedrnn.backends.cuda.weights import dtypes_of

__all__ = ["KERNEL", "PRECISION", "CudaBackend", "dtypes_of"]
