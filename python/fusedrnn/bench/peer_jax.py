"""JAX: ``lax.scan`` over time, jitted; the products with the input are one product before the scan."""

from __future__ import annotations

import importlib
import os
from typing import Any
from unittest import mock

import numpy as np

from fusedrnn.backends.protocol import Weights
from fusedrnn.bench.libraries import Results, named, not_installed
from fusedrnn.cells import Cell
from fusedrnn.problems import Case, Data

_pool: int | None = None  # XLA's threads are made once in a process


def load(threads: int) -> Any:
    """JAX with float64 allowed and ``threads`` threads in XLA's pool.

    Raises:
        RuntimeError: The pool was made before, with another number.
    """
    global _pool
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    if _pool is None:
        with mock.patch.dict(os.environ, NPROC=str(threads)):  # the size of XLA's pool
            jax.devices("cpu")
        _pool = threads
    if _pool != threads:
        raise RuntimeError(f"XLA's pool has {_pool} thread(s) in this process, not {threads}: run again")
    return jax


def step(jax: Any, cell: Cell, ax: Any, ah: Any, state: Any) -> Any:
    """One step from the input part and the recurrent part of the gates."""
    np_, sigmoid = jax.numpy, jax.nn.sigmoid
    if cell.name == "lstm":
        i, f, g, o = np_.split(ax + ah, 4, axis=1)
        c = sigmoid(f) * state[1] + sigmoid(i) * np_.tanh(g)
        return (sigmoid(o) * np_.tanh(c), c)
    if cell.name == "gru":
        (rx, zx, nx), (rh, zh, nh) = (np_.split(a, 3, axis=1) for a in (ax, ah))
        z = sigmoid(zx + zh)
        n = np_.tanh(nx + sigmoid(rx + rh) * nh)
        return ((1 - z) * n + z * state[0],)
    return (jax.nn.relu(ax + ah) if cell.options["relu"] else np_.tanh(ax + ah),)


def build(jax: Any, data: Data) -> Any:
    """``forward(x, weights, scalars, state0) -> y, stateT`` of the case, whose cell has no scalars."""
    case, np_ = data.case, jax.numpy
    valid = None
    if data.lengths is not None:
        valid = np_.arange(case.shape.T)[:, None, None] < data.lengths[:, None]
    fresh = None if data.reset is None else np_.asarray(data.reset)[:, :, None]

    def direction(x: Any, weights: Weights, state0: Any, reverse: bool) -> Any:
        ax = x @ weights["weight_ih"].T + weights["bias_ih"]

        def body(state: Any, now: Any) -> Any:
            ax, valid, fresh = now
            if fresh is not None:
                state = tuple(np_.where(fresh, 0, s) for s in state)
            ah = state[0] @ weights["weight_hh"].T
            if "bias_hh" in weights:
                ah = ah + weights["bias_hh"]
            after = step(jax, case.cell, ax, ah, state)
            if valid is None:
                return after, after[0]
            held = tuple(np_.where(valid, a, s) for a, s in zip(after, state, strict=True))
            return held, np_.where(valid, after[0], 0)

        return jax.lax.scan(body, state0, (ax, valid, fresh), reverse=reverse)

    def forward(x: Any, weights: Any, scalars: Any, state0: Any) -> Any:
        D = case.directions
        final = []
        for layer in range(case.layers):
            ys = []
            for n in range(layer * D, layer * D + D):
                state, y = direction(x, weights[n], tuple(s[n] for s in state0), reverse=n % D == 1)
                ys.append(y)
                final.append(state)
            x = ys[0] if D == 1 else np_.concatenate(ys, axis=2)
        return x, tuple(np_.stack(s) for s in zip(*final, strict=True))

    return forward


class Jax:
    """Forward, and backward by ``jax.vjp``, in one jitted function."""

    def __init__(self, data: Data, threads: int) -> None:
        self.jax = jax = load(threads)
        self.data = data
        self.path = f"jitted lax.scan, {threads} thread(s) in XLA's pool"
        self.training = data.case.kind == "training"
        forward = self.forward()

        def training(x: Any, weights: Any, scalars: Any, state0: Any, upstream: Any) -> Any:
            out, backward = jax.vjp(lambda *given: forward(*given, state0), x, weights, scalars)
            return out, backward(upstream)

        N, B = data.case.layers * data.case.directions, data.case.shape.B
        begin = zip(data.case.widths, data.case.cell.trace.start.values(), strict=True)
        starts = tuple(np.full((N, B, width), start, data.x.dtype) for width, start in begin)
        arguments: Any = [data.x, data.weights, data.scalars]
        arguments.append(starts if data.state0 is None else data.state0)
        if self.training:
            arguments.append((data.dy, data.dstateT))
        self.arguments = jax.device_put(arguments, jax.devices("cpu")[0])
        self.function = jax.jit(training if self.training else forward)

    def forward(self) -> Any:
        """``forward(x, weights, scalars, state0) -> y, stateT``"""
        return build(self.jax, self.data)

    @classmethod
    def missing(cls) -> str | None:
        return not_installed("JAX", "jax")

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.kind == "update":
            return "an update is PyTorch's"
        if case.resets and case.bidirectional:
            return "resets are written for one direction only"
        return None

    def __call__(self) -> Any:
        return self.jax.block_until_ready(self.function(*self.arguments))

    def results(self) -> Results:
        result = self.jax.tree.map(np.asarray, self())
        if not self.training:
            y, stateT = result
            return named(self.data, y, stateT)
        (y, stateT), (dx, dweights, dscalars) = result
        return named(self.data, y, stateT, dx, dweights, dscalars)
