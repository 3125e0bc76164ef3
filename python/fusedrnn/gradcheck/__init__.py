"""Gradient checking of any layer or function. ``gradcheck_suite`` checks all kernels.

There are two methods. ``oracle`` compares with the NumPy reference in long double, which is itself compared
with complex-step derivatives. ``central`` compares with central differences ``(f(x + h) - f(x - h)) / 2h``,
which need only the function and are accurate to about 1e-10 in float64.

The tolerances of the oracle are the limits of the kernels on standard problems (docs/accuracy.md). The error
of a central difference is about ``h**2`` (truncation) plus ``eps / h`` (rounding). It is lowest at ``h =
eps**(1/3)``, where both are ``eps**(2/3)``, which is also SciPy's choice (scipy/optimize/_numdiff.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedrnn.backends.arguments import check_bools, check_number, check_whole
from fusedrnn.cells import Cell
from fusedrnn.gradcheck.adapters import adapted
from fusedrnn.gradcheck.central import check_central
from fusedrnn.gradcheck.compare import GradcheckError
from fusedrnn.gradcheck.oracle import check_oracle
from fusedrnn.layers import Recurrent

__all__ = ["GradcheckError", "gradcheck"]


def gradcheck(
    func_or_layer: Any,
    inputs: Any,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    fast_mode: bool = False,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **scalars: Any,
) -> bool:
    """Check the gradients of a function or layer with respect to its inputs, and to a layer's parameters.

    You can check the layers of this library; functions of its Variables; PyTorch modules and functions of
    PyTorch tensors; and functions of NumPy arrays that return ``(outputs, backward)``, where
    ``backward(*doutputs)`` returns gradients with the same structure as the inputs.

    The check fails for a wrong element, NaN or infinity, a wrong shape or dtype, a missing gradient, a result
    that differs when it is evaluated again, and an input that was modified.

    Args:
        func_or_layer: The function or layer. Its parameters and states are restored at the end.
        inputs: One input or a tuple of them, nested as the function takes them. Arrays of float32 or float64
            are checked, and Variables and tensors that require a gradient. A recurrent layer of this library
            takes ``x`` or ``(x, state)``, x (B, I) or (T, B, I). Without a state it starts from the state
            that it keeps. A layer on a GPU takes CuPy arrays; it is evaluated there and compared on the CPU.
        eps: ``central``: the step. None: the cube root of the machine epsilon times max(1, abs(x)).
        atol: The absolute tolerance. ``central``: passed if ``abs(a - n) <= atol + rtol * abs(n)`` for every
            element, as in PyTorch; None: rtol times the largest output or derivative. ``oracle``: None: 0.
        rtol: The relative tolerance. ``central``: None: 300 * epsilon**(2/3) (1.1e-8 in float64, 7e-3 in
            float32). ``oracle``: relative to the tensor's largest entry; None: outputs 1e-14 and gradients
            2e-14 in float64, 2e-6 and 5e-6 in float32, or 4 times plain NumPy's error if that is larger for a
            badly conditioned problem.
        raise_exception: False: return False instead of raising ``GradcheckError``.
        nondet_tol: The allowed difference between two evaluations with the same inputs.
        fast_mode: ``central``: a few random directions instead of every element: 8 evaluations for each
            tensor instead of 2 for each element.
        method: "oracle" for the recurrent layers of ``fusedrnn.layers``; "central" for everything. None:
            "oracle" if it is possible.
        options: Keyword arguments of every call, such as ``{"lengths": lengths}``.
        seed: The seed of the random upstream gradients and directions. It is also set in the global
            generators of NumPy, Python and PyTorch for every evaluation, so that dropout draws the same
            masks; they are restored at the end.
        scalars: For a recurrent layer of this library, the row scalars of its cell, such as ``dt``, by name.
            They are checked like inputs.

    Returns:
        True; or False if a check failed and ``raise_exception`` is False.

    Raises:
        GradcheckError: A check failed. It is an AssertionError.
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    if isinstance(func_or_layer, Cell):
        raise TypeError(
            f"func_or_layer: expected a layer, such as fusedrnn.layers.Recurrent({func_or_layer.name}, 5, 4, "
            f'dtype="float64"), got the cell {func_or_layer.name}'
        )
    possible = isinstance(func_or_layer, Recurrent)
    if method is None:
        method = "oracle" if possible else "central"
    if method not in ("oracle", "central"):
        raise ValueError(f'method: expected "oracle", "central" or None, got {method!r}')
    if method == "oracle" and not possible:
        raise TypeError(
            'method: "oracle" needs a recurrent layer of fusedrnn.layers, '
            f'got {type(func_or_layer).__name__}; use "central"'
        )
    if method == "oracle" and (eps is not None or fast_mode):
        raise ValueError('eps, fast_mode: expected None and False with method "oracle"')
    if not callable(func_or_layer):
        raise TypeError(f"func_or_layer: expected a callable, got {type(func_or_layer).__name__}")
    for name, value in (("eps", eps), ("atol", atol), ("rtol", rtol), ("nondet_tol", nondet_tol)):
        if value is None and name != "nondet_tol":
            continue
        number = check_number(name, value)
        if not (number > 0 if name == "eps" else number >= 0):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    check_whole("seed", seed, 0, 2**32 - 1)
    check_bools(raise_exception=raise_exception, fast_mode=fast_mode)
    if not isinstance(options, Mapping | None):
        raise TypeError(f"options: expected a mapping of names to values, got {type(options).__name__}")
    options = dict(options or {})
    inputs = tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)
    if scalars:
        if not possible:
            raise TypeError(f"{next(iter(scalars))}: expected only with a recurrent layer of fusedrnn.layers")
        inputs = (*inputs, scalars)
    try:
        if method == "oracle":
            check_oracle(func_or_layer, inputs, options, atol, rtol, nondet_tol, seed)
        else:
            with adapted(func_or_layer, inputs, options) as adapter:
                check_central(adapter, eps, atol, rtol, nondet_tol, fast_mode, seed)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True
