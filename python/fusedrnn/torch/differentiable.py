"""One layer in one direction in PyTorch's own operations: for derivatives of gradients, which no kernel has.

It computes what the operator ``recurrence`` does, from the same function of the cell, a step at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fusedrnn import masks
from fusedrnn.backends.protocol import Regularization, Weights
from fusedrnn.cells.evaluation import Step
from fusedrnn.cells.trace import Norm
from fusedrnn.torch.ops import CELLS, Call


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
        # not torch.maximum, which shares the gradient where both are equal
        "maximum": lambda a, b: torch.where((b > a) | b.isnan(), b, a),
        "minimum": lambda a, b: torch.where((a > b) | b.isnan(), b, a),
    }

    def normalise(self, norm: Norm, values: list[Tensor]) -> Sequence[Tensor]:
        """The normalised values."""
        v = torch.cat(values, dim=-1)
        if norm.kind == "layer":
            v = v - v.mean(dim=-1, keepdim=True)
        return (v / (v.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()).chunk(len(values), dim=-1)


def recurrence(call: Call, return_states: bool) -> list[Tensor]:
    """What the operator ``recurrence`` returns but its tape, as functions of all tensors of the call."""
    cell = CELLS[call.cell]
    x = call.x if call.x.dim() == 3 else call.x[None]
    T, B, _, H = call.sizes()
    zero = x.new_zeros(())
    state = [x.new_zeros((B, H)) if s is None else s for s in (call.h0, call.c0)[: len(cell.states)]]
    weights = dict(zip(Weights._fields, call.weights, strict=True))
    lengths, reset = (None if a is None else torch.as_tensor(a, device=x.device) for a in call.rows())
    active = None if lengths is None else torch.arange(T, device=x.device)[:, None] < lengths
    cuts = reset if reset is None or active is None else reset & active
    if cuts is not None and call.reverse:  # what comes from t + 1 is cleared where t + 1 is reset
        cuts = torch.cat([cuts[1:], torch.zeros_like(cuts[:1])])
    r = call.regularization()
    dropout = None if r is None else _dropout(r, x, H)
    ys: list[Any] = [None] * T
    every: list[Any] = [None] * T
    ran: Tensor | None = None  # the rows for which the step before was one
    for k, t in enumerate(reversed(range(T)) if call.reverse else range(T)):
        if cuts is not None:
            state = [torch.where(cuts[t, :, None], zero, s) for s in state]
        if call.detach_every and k and k % call.detach_every == 0:
            state = [s.detach() if ran is None else torch.where(ran, s.detach(), s) for s in state]
        row = None if active is None else active[t, :, None]
        x_t = x[t] if row is None else torch.where(row, x[t], zero)  # NaN in the padding would come back
        after: list[Tensor] = list(TorchStep(cell.definition, weights, x_t, state, dropout=dropout).after)
        if r is not None:
            keeps = [_keep(r, name, t, x, H) for name in cell.states]
            after = [
                new if keep is None else keep * new + (1 - keep) * s
                for keep, new, s in zip(keeps, after, state, strict=True)
            ]
        if row is None:
            ys[t], every[t], state = after[0], after, after
        else:
            ys[t] = torch.where(row, after[0], zero)
            # in the padding a state stands still, and no gradient comes in there
            every[t] = [torch.where(row, a, s.detach()) for a, s in zip(after, state, strict=True)]
            state = [torch.where(row, a, s) for a, s in zip(after, state, strict=True)]
        ran = row
    found = [torch.stack(ys) if T else x.new_zeros((0, B, H))] if call.x.dim() == 3 else []
    found += state
    if return_states:
        found += [torch.stack([s[j] for s in every]) for j in range(len(cell.states))]
    return found


def _dropout(r: Regularization, x: Tensor, H: int) -> Tensor | None:
    """(B, H), what recurrent dropout multiplies operands with."""
    if r.seed is None or not r.recurrent_dropout:
        return None
    rows = np.arange(x.size(1))
    return torch.as_tensor(masks.dropout(r.recurrent_dropout, r.seed, r.stream, rows, H)).to(x)


def _keep(r: Regularization, state: str, t: int, x: Tensor, H: int) -> Tensor | None:
    """(B, H), the share of a new state that zoneout keeps."""
    rate = {"h": r.zoneout_h, "c": r.zoneout_c}[state]
    found = masks.zoneout(rate, state, r.seed, r.stream, t, np.arange(x.size(1)), H)
    return None if found is None else torch.as_tensor(found).to(x)
