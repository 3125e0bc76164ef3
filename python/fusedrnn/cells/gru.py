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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusedrnn.cells.activations import ONE, sigmoid, tanh


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

    def step(
        self,
        ax: Sequence[Any],
        state: tuple[Any, ...],
        hidden: Callable[[Any, int, int], list[Any]],
        norm: Callable[[Any], Any],
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """One step on whole gates; see ``fusedrnn.cells``."""
        (h_prev,) = state
        if self.reset_after:
            ar, az, q = hidden(h_prev, 0, 3)
            h, *saved = forward_after(ax[0] + ar, ax[1] + az, ax[2], q, h_prev)
            return (h,), tuple(saved)
        ar, az = hidden(h_prev, 0, 2)
        r, z, rh = forward_before_gates(ax[0] + ar, ax[1] + az, h_prev)
        (an,) = hidden(rh, 2, 3)
        h, n = forward_before_output(ax[2] + an, z, h_prev)
        return (h,), (r, z, n)

    def step_backward(
        self,
        dstate: tuple[Any, ...],
        saved: tuple[Any, ...],
        before: tuple[Any, ...],
        after: tuple[Any, ...],
        product: Callable[[Sequence[Any], int, int], Any],
        norm: Callable[[Any], Any],
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """One step back on whole gates; see ``fusedrnn.cells``."""
        (dh,) = dstate
        (h_prev,) = before
        if self.reset_after:
            r, z, n, q = saved
            dar, daz, dan, dq, direct = backward_after(dh, r, z, n, q, h_prev)
            return (product((dar, daz, dq), 0, 3) + direct,), (dar, daz, dan), (dar, daz, dq)
        r, z, n = saved
        daz, dan, direct = backward_before_output(dh, z, n, h_prev)
        dar, direct = backward_before_gates(product((dan,), 2, 3), direct, r, h_prev)
        da = (dar, daz, dan)
        return (product((dar, daz), 0, 2) + direct,), da, da

    def operands(self, saved: tuple[Any, ...], h_prev: Any) -> list[tuple[int, int, Any]]:
        """What each run of gates multiplied with weight_hh; see ``fusedrnn.cells``."""
        if self.reset_after:
            return [(0, 3, h_prev)]
        return [(0, 2, h_prev), (2, 3, saved[0] * h_prev)]
