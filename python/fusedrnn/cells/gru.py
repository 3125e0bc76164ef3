"""The GRU cell in both forms, forward and backward side by side.

    r = sigmoid(ar)  z = sigmoid(az)
    h = (1 - z) * n + z * h_prev

and n in two forms, where r resets after or before the product with weight_hn:

    after:  n = tanh(an + r * q), q = weight_hn h_prev + bias_hn, an = weight_in x + bias_in    saves r z n q
    before: n = tanh(an), an = weight_in x + bias_in + weight_hn (r * h_prev) + bias_hn         saves r z n

``ar`` and ``az`` are ``weight_ih x + bias_ih + weight_hh h_prev + bias_hh`` of their gate. The second form
has two phases, because n needs r of all units.

Source: after as in ``torch.nn.GRU`` and cuDNN; before by Cho et al. 2014, equations 5 to 8. Chung et al. 2014
write z for our 1 - z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells import builtin
from fusedrnn.cells.activations import ONE, sigmoid, tanh
from fusedrnn.cells.definition import Definition


def forward_after(ar: Any, az: Any, an: Any, q: Any, h_prev: Any) -> tuple[Any, Any, Any, Any, Any]:
    """-> h, r, z, n, q"""
    r = sigmoid(ar)
    z = sigmoid(az)
    n = tanh(an + r * q)
    h = (ONE - z) * n + z * h_prev
    return h, r, z, n, q


def backward_after(dh: Any, r: Any, z: Any, n: Any, q: Any, h_prev: Any) -> tuple[Any, Any, Any, Any, Any]:
    """-> dar, daz, dan, dq, and the direct part of dh_prev"""
    dan = dh * (ONE - z) * (ONE - n * n)
    daz = dh * (h_prev - n) * z * (ONE - z)
    dar = dan * q * r * (ONE - r)
    return dar, daz, dan, dan * r, dh * z


def forward_before_gates(ar: Any, az: Any, h_prev: Any) -> tuple[Any, Any, Any]:
    """First phase -> r, z, and r * h_prev, which weight_hn multiplies"""
    r = sigmoid(ar)
    z = sigmoid(az)
    return r, z, r * h_prev


def forward_before_output(an: Any, z: Any, h_prev: Any) -> tuple[Any, Any]:
    """Second phase -> h, n"""
    n = tanh(an)
    return (ONE - z) * n + z * h_prev, n


def backward_before_output(dh: Any, z: Any, n: Any, h_prev: Any) -> tuple[Any, Any, Any]:
    """Second phase back -> daz, dan, and the direct part of dh_prev so far"""
    dan = dh * (ONE - z) * (ONE - n * n)
    daz = dh * (h_prev - n) * z * (ONE - z)
    return daz, dan, dh * z


def backward_before_gates(drh: Any, direct: Any, r: Any, h_prev: Any) -> tuple[Any, Any]:
    """First phase back, from drh = dan weight_hn, the gradient of r * h_prev -> dar, direct part"""
    dar = drh * h_prev * r * (ONE - r)
    return dar, direct + drh * r


@dataclass(frozen=True)
class GRU:
    """GRU cell; ``reset_after`` says whether r multiplies the recurrent product (PyTorch) or h before it.

    ``layer_norm``: see ``layer_norm.py``; r and z are normalised together, n by itself.
    """

    reset_after: bool = True
    layer_norm: bool = False

    name: ClassVar[str] = "gru"
    gates: ClassVar[int] = 3
    norms: ClassVar[tuple[tuple[int, int], ...]] = ((0, 2), (2, 3))
    states: ClassVar[tuple[str, ...]] = ("h",)

    @property
    def saves(self) -> tuple[str, ...]:
        """What a step saves for backward beside its states."""
        return ("r", "z", "n", "q") if self.reset_after else ("r", "z", "n")

    @property
    def definition(self) -> Definition:
        """The cell as one function."""
        return builtin.gru.with_options(reset_after=self.reset_after, layer_norm=self.layer_norm)
