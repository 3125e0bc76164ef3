"""One layer in one direction in PyTorch's operations: for derivatives of gradients, which no kernel computes.

It computes the same as the kernels, from the same function of the cell, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fusedrnn import masks
from fusedrnn.backends.protocol import Regularization
from fusedrnn.cells import Cell
from fusedrnn.cells.evaluation import Step
from fusedrnn.cells.trace import Norm


class TorchStep(Step):
    """One step on tensors."""

    operations: ClassVar[dict[str, Any]] = {
        "add": torch.add,
        "sub": lambda a, b: a - b,
        "mul": torch.mul,
        "div": torch.div,
        "neg": torch.neg,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "softplus": softplus,
        "relu": torch.relu,
        "absolute": torch.abs,
        "where": torch.where,
        "greater": lambda a, b: a > b,
        "greater_equal": lambda a, b: a >= b,
        # not torch.maximum, which splits the gradient if both are equal
        "maximum": lambda a, b: torch.where((b > a) | b.isnan(), b, a),
        "minimum": lambda a, b: torch.where((a > b) | b.isnan(), b, a),
    }

    def constant(self, value: float) -> Tensor:
        """A number in the dtype of x."""
        return self.x.new_full((), value)

    def normalise(self, norm: Norm, values: list[Tensor]) -> Sequence[Tensor]:
        """The normalised values."""
        v = torch.cat(values, dim=-1)
        if norm.kind == "layer":
            v = v - v.mean(dim=-1, keepdim=True)
        return (v / (v.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()).chunk(len(values), dim=-1)


def recurrence(
    cell: Cell,
    x: Tensor,
    weights: Mapping[str, Tensor],
    state0: Sequence[Tensor | None] | None = None,
    *,
    scalars: Mapping[str, Tensor] | None = None,
    lengths: Any = None,
    reset: Any = None,
    reverse: bool = False,
    return_states: bool = False,
    detach_every: int | None = None,
    regularization: Regularization | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    """One layer in one direction, of any cell.

    Args:
        cell: What a step computes.
        x: (T, B, I).
        weights: By name, with weight_ih.
        state0: One tensor per state, (B, P) the first, (B, H) the others, or None for its initial value.
        scalars: The cell's row scalars by name, (T, B) each; padding is not read.
        lengths, reset: As in ``fusedrnn.kernels.forward``, checked.
        reverse, return_states, detach_every, regularization: As there.

    Returns:
        y (T, B, P); the final state; with ``return_states`` the states of every step, each with T first.
    """
    T, B, _ = x.shape
    H = weights["weight_ih"].size(0) // cell.blocks["weight_ih"]
    widths = cell.widths(H, weights["weight_hr"].size(0) if cell.projects else H)
    starts, zero = [x.new_full((), s) for s in cell.trace.start.values()], x.new_zeros(())
    given = state0 or [None] * len(starts)
    state = [
        s.expand(B, width) if g is None else g for s, g, width in zip(starts, given, widths, strict=True)
    ]
    lengths, reset = (None if a is None else torch.as_tensor(a, device=x.device) for a in (lengths, reset))
    active = None if lengths is None else torch.arange(T, device=x.device)[:, None] < lengths
    reset = reset if reset is None else reset != 0
    cuts = reset if reset is None or active is None else reset & active
    if cuts is not None and reverse:  # the state from t + 1 is cleared if t + 1 is reset
        cuts = torch.cat([cuts[1:], torch.zeros_like(cuts[:1])])
    numbers = {name: (scalars or {})[name][:, :, None] for name in cell.scalars}
    if active is not None:  # any number but NaN, which would come back
        numbers = {
            name: torch.where(active[:, :, None], v, torch.ones_like(zero)) for name, v in numbers.items()
        }
    r = regularization
    dropout = None if r is None else _dropout(r, x, H)
    ys: list[Any] = [None] * T
    every: list[Any] = [None] * T
    ran: Tensor | None = None  # the rows for which the step before was valid
    for k, t in enumerate(reversed(range(T)) if reverse else range(T)):
        if cuts is not None:
            state = [torch.where(cuts[t, :, None], n, s) for n, s in zip(starts, state, strict=True)]
        row = None if active is None else active[t, :, None]
        if detach_every and k and k % detach_every == 0:  # neither the initial nor the final state
            goes_on = None if ran is None or row is None else ran & row
            state = [s.detach() if goes_on is None else torch.where(goes_on, s.detach(), s) for s in state]
        x_t = x[t] if row is None else torch.where(row, x[t], zero)  # NaN in the padding would come back
        now = {name: v[t] for name, v in numbers.items()}
        after: list[Tensor] = list(TorchStep(cell, weights, x_t, state, now, dropout).after)
        if r is not None:
            keeps = [_keep(r, name, t, x, width) for name, width in zip(cell.states, widths, strict=True)]
            after = [
                new if keep is None else keep * new + (1 - keep) * s
                for keep, new, s in zip(keeps, after, state, strict=True)
            ]
        if row is None:
            ys[t], every[t], state = after[0], after, after
        else:
            ys[t] = torch.where(row, after[0], zero)
            # in the padding a state does not change, and gradients there are ignored
            every[t] = [torch.where(row, a, s.detach()) for a, s in zip(after, state, strict=True)]
            state = [torch.where(row, a, s) for a, s in zip(after, state, strict=True)]
        ran = row
    y = torch.stack(ys) if T else x.new_zeros((0, B, widths[0]))
    if not return_states:
        return y, state, None
    if not T:
        return y, state, [x.new_zeros((0, B, width)) for width in widths]
    return y, state, [torch.stack(each) for each in zip(*every, strict=True)]


def _dropout(r: Regularization, x: Tensor, H: int) -> Tensor | None:
    """The mask of recurrent dropout (B, H)."""
    if r.seed is None or not r.recurrent_dropout:
        return None
    rows = np.arange(x.size(1))
    return torch.as_tensor(masks.dropout(r.recurrent_dropout, r.seed, r.stream, rows, H)).to(x)


def _keep(r: Regularization, state: str, t: int, x: Tensor, width: int) -> Tensor | None:
    """The fraction of a new state that is used with zoneout (B, width)."""
    rate = {"h": r.zoneout_h, "c": r.zoneout_c}.get(state, 0.0)
    found = masks.zoneout(rate, state, r.seed, r.stream, t, np.arange(x.size(1)), width)
    return None if found is None else torch.as_tensor(found).to(x)
