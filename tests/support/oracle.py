"""The oracle: gradients by a complex step through a forward of its own.

The forward here is as plain as can be: a loop over rows, a loop over steps, the formulas written out. It
shares nothing with the backends but the activations; the masks too are drawn here by another program. A
derivative is the imaginary part of ``f(x + ih) / h``; without a difference nothing cancels, so h = 1e-20
leaves no error but rounding. An argument may have an axis in front, of many steps ih; so has every result.

``dtype`` is complex128 or clongdouble throughout.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from fusedrnn.backends.protocol import Array, Regularization, Weights
from fusedrnn.cells.activations import relu, sigmoid, tanh
from problems import Problem

STEP = 1e-20


@functools.cache
def kept(kind: int, rate: float, seed: int, stream: int, t: int, b: int, H: int) -> Array:
    """Which units a mask keeps, of row b at time t: Philox4x32-10 (Salmon et al. 2011) in Python's integers.

    kind: 0 recurrent dropout, 1 zoneout of h, 2 zoneout of c.
    """
    words: list[int] = []
    for group in range((H + 3) // 4):
        counter, key = [group, b, t, kind + 4 * stream], [seed % 2**32, seed // 2**32]
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
            high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        words += counter
    return np.array([word >= round(rate * 2**32) for word in words[:H]])


def product(w: Array, v: Array) -> Array:
    return (w @ v[..., None])[..., 0]


def norm(v: Array) -> Array:
    """(v - mean) / sqrt(variance + 1e-5)."""
    n = v.shape[-1]
    d = v - v.sum(-1, keepdims=True) / n
    return d / np.sqrt((d * d).sum(-1, keepdims=True) / n + 1e-5)


def norm_gates(cell: Any, a: Array) -> Array:
    """r and z of a GRU together and n by itself, all gates of the others together."""
    if cell.name != "gru":
        return norm(a)
    n = a.shape[-1] // 3 * 2
    return np.concatenate([norm(a[..., :n]), norm(a[..., n:])], -1)


def cell_step(cell: Any, x: Array, state: list[Array], w: Weights, mask: Any = 1) -> list[Array]:
    """One step of one row; ``mask`` is that of recurrent dropout."""
    h = state[0]
    H = state[-1].shape[-1]
    ax, ah = product(w["weight_ih"], x), product(w["weight_hh"], mask * h)
    if cell.vectors:
        ax, ah = norm_gates(cell, ax) * w["gain_ih"], norm_gates(cell, ah) * w["gain_hh"]
    ax = ax + w.get("bias_ih", 0)
    bias_hh = w.get("bias_hh", np.zeros_like(ax))
    ah = ah + bias_hh
    if cell.name == "rnn":
        return [relu(ax + ah) if cell.options["relu"] else tanh(ax + ah)]
    if cell.name == "lstm":
        a = ax + ah
        c = sigmoid(a[..., H : 2 * H]) * state[1] + sigmoid(a[..., :H]) * tanh(a[..., 2 * H : 3 * H])
        m = norm(c) * w["gain_c"] + w["bias_c"] if cell.vectors else c
        h = sigmoid(a[..., 3 * H :]) * tanh(m)
        return [product(w["weight_hr"], h) if "weight_hr" in w else h, c]
    r = sigmoid(ax[..., :H] + ah[..., :H])
    z = sigmoid(ax[..., H : 2 * H] + ah[..., H : 2 * H])
    if cell.options["reset_after"]:
        n = tanh(ax[..., 2 * H :] + r * ah[..., 2 * H :])
    else:
        q = product(w["weight_hh"][..., 2 * H :, :], mask * r * h)
        q = norm(q) * w["gain_hh"][..., 2 * H :] if cell.vectors else q
        n = tanh(ax[..., 2 * H :] + q + bias_hh[..., 2 * H :])
    return [n + z * (h - n)]


def widths_of(p: Problem) -> list[int]:
    """Of h, which weight_hh multiplies, and of c, which has four gates for each unit."""
    return [p.weights["weight_hh"].shape[-1], p.weights["weight_ih"].shape[-2] // 4][: len(p.cell.states)]


def forward(p: Problem, steps: tuple[int, ...] = ()) -> dict[str, Array]:
    """y, the final state and the states of every step, by the names of ``problems.named``.

    ``steps`` is the shape in front of an argument that has one.
    """
    T, B, _ = p.x.shape[-3:]
    dtype, widths = p.x.dtype, widths_of(p)
    P = widths[0]
    r = p.regularization or Regularization()
    out = {"y": np.zeros((*steps, T, B, P), dtype)}
    for s, width in zip(p.cell.states, widths, strict=True):
        out[f"{s}T"] = np.zeros((*steps, B, width), dtype)
        out[s] = np.zeros((*steps, T, B, width), dtype)
    for b in range(B):
        length = T if p.lengths is None else int(p.lengths[b])
        state = [
            np.zeros(width, dtype) if p.state0 is None else p.state0[k][..., b, :]
            for k, width in enumerate(widths)
        ]
        if p.reverse:
            for k, s in enumerate(p.cell.states):  # padding comes first: the initial state stands there
                out[s][..., length:, b, :] = state[k][..., None, :]
        order = range(T - 1, -1, -1) if p.reverse else range(T)
        for k, t in ((k, t) for k, t in enumerate(order) if t < length):
            first = t == (length - 1 if p.reverse else 0)
            if p.detach_every and k % p.detach_every == 0 and not first:
                state = [s.real.astype(dtype) for s in state]  # the derivative is the imaginary part
            if p.reset is not None and p.reset[t, b] and not p.reverse:
                state = [np.zeros_like(s) for s in state]
            mask: Any = 1
            if r.recurrent_dropout and r.seed is not None:
                keep = kept(0, r.recurrent_dropout, r.seed, r.stream, 0, b, P)
                mask = np.where(keep, 1 / max(1 - r.recurrent_dropout, 1e-9), 0)
            new = cell_step(p.cell, p.x[..., t, b, :], state, p.weights, mask)
            for k, rate in enumerate((r.zoneout_h, r.zoneout_c)[: len(new)]):
                if r.seed is None:
                    keep = 1 - rate
                    new[k] = keep * new[k] + (1 - keep) * state[k]
                else:
                    new[k] = np.where(kept(k + 1, rate, r.seed, r.stream, t, b, widths[k]), new[k], state[k])
            state = new
            out["y"][..., t, b, :] = state[0]
            for k, s in enumerate(p.cell.states):
                out[s][..., t, b, :] = state[k]
            if p.reset is not None and p.reset[t, b] and p.reverse and t > 0:
                state = [np.zeros_like(s) for s in state]
        for k, s in enumerate(p.cell.states):
            out[f"{s}T"][..., b, :] = state[k]
            if not p.reverse:
                out[s][..., length:, b, :] = state[k][..., None, :]
    return out


def loss(p: Problem, steps: tuple[int, ...] = ()) -> Any:
    """sum(y*dy) + sum(stateT*dstateT) + sum(states*dstates), over the valid steps."""
    T, B, _ = p.x.shape[-3:]
    out = forward(p, steps)
    valid = np.ones((T, B), bool) if p.lengths is None else np.arange(T)[:, None] < p.lengths
    total = np.zeros(steps, p.x.dtype)
    if p.dy is not None:
        total += (out["y"][..., valid, :] * p.dy[valid]).sum((-2, -1))
    for k, s in enumerate(p.cell.states):
        if p.dstateT is not None and p.dstateT[k] is not None:
            total += (out[f"{s}T"] * p.dstateT[k]).sum((-2, -1))
        if p.dstates is not None and p.dstates[k] is not None:
            total += (out[s][..., valid, :] * p.dstates[k][valid]).sum((-2, -1))
    return total


def variables(p: Problem) -> dict[str, Array]:
    """The arrays that gradients belong to, by the gradient's name."""
    arrays = {"dx": p.x} | {f"d{n}": w for n, w in p.weights.items()}
    if p.state0 is not None:
        arrays |= {f"d{s}0": a for s, a in zip(p.cell.states, p.state0, strict=True)}
    return arrays


def with_states(p: Problem) -> Problem:
    """The problem with zeros written out where state0 is None, since that has a gradient too."""
    if p.state0 is not None:
        return p
    zeros = tuple(np.zeros((p.x.shape[1], width), p.x.dtype) for width in widths_of(p))
    return replace(p, state0=zeros)


def changed(p: Problem, key: str, array: Array) -> Problem:
    """The problem with another array in place of the one to which this gradient belongs."""
    if key == "dx":
        return replace(p, x=array)
    if key[1:] in p.weights:
        return replace(p, weights=p.weights | {key[1:]: array})
    assert p.state0 is not None
    states = zip(p.cell.states, p.state0, strict=True)
    return replace(p, state0=tuple(array if key == f"d{s}0" else a for s, a in states))


def gradients(p: Problem, dtype: Any = np.clongdouble) -> dict[str, Array]:
    """Every gradient, entry by entry: a step ih each, so for tiny problems only."""
    p = with_states(p).astype(dtype)
    result = {}
    for key, array in variables(p).items():
        step = array.real.dtype.type(STEP)
        each = np.eye(array.size, dtype=bool).reshape(array.size, *array.shape)
        moved = np.where(each, array + 1j * step, array)
        result[key] = (loss(changed(p, key, moved), moved.shape[:1]).imag / step).reshape(array.shape)
    return result


def directional(p: Problem, directions: dict[str, Array], dtype: Any = np.complex128) -> dict[str, Any]:
    """The derivative of the loss along a direction of each array, for real sizes: one forward per array."""
    p = with_states(p).astype(dtype)
    result = {}
    for key, array in variables(p).items():
        step = array.real.dtype.type(STEP)
        moved = array + 1j * step * directions[key].astype(array.real.dtype)
        result[key] = loss(changed(p, key, moved)).imag / step
    return result
