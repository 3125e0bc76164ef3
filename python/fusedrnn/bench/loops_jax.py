"""A cell's loop over time with JAX's ``scan``, as source text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from fusedrnn.bench.loops import CALL, SUM, Loop, Text, all_steps, indented, sum_of, times_gain, times_h
from fusedrnn.cells.trace import Norm


class JaxScan(Loop):
    """With ``jax.lax.scan``."""

    transposed = ".T"
    words = ("jax", "jnp", "state", "now", "step", "y", "layer_norm", "rms_norm")
    operations: ClassVar[Mapping[str, str]] = {
        **{name: f"jnp.{name}" for name in ("tanh", "exp", "log", "sqrt", "maximum", "minimum", "where")},
        **{name: f"jax.nn.{name}" for name in ("sigmoid", "softplus", "relu")},
        "absolute": "jnp.abs",
    }

    def multiply(self, value: Text, weights: str, bias: str | None, added: Sequence[str], each: bool) -> Text:
        left = value.words if value.binds == CALL else f"({value.words})"
        product = f"{left} @ {weights}" + ("" if each else self.transposed)
        return sum_of([*added, product, *([bias] if bias else [])])._replace(binds=SUM)

    def split(self, text: Text, blocks: Sequence[int]) -> str:
        if len(set(blocks)) == 1:
            return f"jnp.split({text.words}, {len(blocks)}, axis=-1)"
        ends = [sum(blocks[: k + 1]) for k in range(len(blocks) - 1)]
        return f"jnp.split({text.words}, [{', '.join(map(times_h, ends))}], axis=-1)"

    def beside(self, values: Iterable[str], axis: int) -> str:
        return f"jnp.concatenate([{', '.join(values)}], axis={axis})"

    def norm(self, norm: Norm, value: str, blocks: int, gain: str | None, bias: str | None) -> Text:
        return times_gain(f"{norm.kind}_norm({value}, {norm.eps!r})", gain, bias)

    def source(self) -> str:
        lines = ["import jax", "import jax.numpy as jnp", "", ""]
        before, body = self.before(), self.body()
        root = "    return v / jnp.sqrt((v * v).mean(-1, keepdims=True) + eps)"
        if any("layer_norm(" in line for line in [*before, *body]):
            lines += ["def layer_norm(v, eps):", "    v = v - v.mean(-1, keepdims=True)", root, "", ""]
        if any("rms_norm(" in line for line in [*before, *body]):
            lines += ["def rms_norm(v, eps):", root, "", ""]
        state, now = _tuple(self.states), _tuple(self.sequences)
        lines += [self.signature(), *indented(before), "", "    def step(state, now):"]
        lines += indented(
            [
                f"{_unpacked(state)} = state",
                f"{_unpacked(now)} = now",
                *body,
                f"return {state}, {self.states[0]}",
            ],
            8,
        )
        sequences = _tuple([all_steps(name) for name in self.sequences])
        lines += ["", f"    {state}, y = jax.lax.scan(step, {state}, {sequences})"]
        return "\n".join([*lines, f"    return y, {', '.join(self.states)}", ""])


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"


def _unpacked(names: str) -> str:
    return names if names.endswith(",)") else names.strip("()")
