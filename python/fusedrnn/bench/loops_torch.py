"""A cell's loop over time in PyTorch, as source text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from fusedrnn.bench.loops import CALL, ONCE, Loop, Text, all_steps, indented, sum_of, times_gain, times_h
from fusedrnn.cells.trace import Norm


class TorchLoop(Loop):
    """In PyTorch, and TorchScript compiles it too."""

    transposed = ".t()"
    words = ("torch", "F", "ys", "rms_norm")
    operations: ClassVar[Mapping[str, str]] = {
        **{name: f"torch.{name}" for name in ("tanh", "sigmoid", "exp", "log", "sqrt", "relu")},
        **{name: f"torch.{name}" for name in ("maximum", "minimum", "where")},
        "softplus": "F.softplus",
        "absolute": "torch.abs",
    }

    def call(self, op: str, args: list[str], numbers: list[bool]) -> str:
        if op in ("maximum", "minimum") and any(numbers):  # which take no number
            bound = numbers.index(True)
            limit = "min" if op == "maximum" else "max"
            return f"torch.clamp({args[1 - bound]}, {limit}={args[bound]})"
        if op == "where" and all(numbers[1:]):  # which would be of the default dtype
            name = self.fresh("number")
            self.assign(ONCE, name, f"x.new_full((), {args[1]})")
            args = [args[0], name, args[2]]
        return super().call(op, args, numbers)

    def multiply(self, value: Text, weights: str, bias: str | None, added: Sequence[str], each: bool) -> Text:
        if not each:
            return sum_of([*added, f"F.linear({value.words}, {weights}{f', {bias}' if bias else ''})"])
        terms = [*added, *([bias] if bias else [])]
        if not terms:
            return Text(f"torch.mm({value.words}, {weights})")
        return sum_of([f"torch.addmm({terms[0]}, {value.words}, {weights})", *terms[1:]])

    def split(self, text: Text, blocks: Sequence[int]) -> str:
        words = text.words if text.binds == CALL else f"({text.words})"
        if len(set(blocks)) == 1:
            return f"{words}.chunk({len(blocks)}, -1)"
        return f"{words}.split([{', '.join(times_h(k) for k in blocks)}], -1)"

    def beside(self, values: Iterable[str], axis: int) -> str:
        return f"torch.cat([{', '.join(values)}], {axis})"

    def norm(self, norm: Norm, value: str, blocks: int, gain: str | None, bias: str | None) -> Text:
        if norm.kind == "layer":
            return Text(f"F.layer_norm({value}, [{times_h(blocks)}], {gain}, {bias}, {norm.eps!r})")
        return times_gain(f"rms_norm({value}, {norm.eps!r})", gain, bias)

    def source(self) -> str:
        lines = ["import torch", "import torch.nn.functional as F", "", ""]
        before, body = self.before(), self.body()
        if any("rms_norm(" in line for line in [*before, *body]):
            lines += ["def rms_norm(v, eps: float):"]
            lines += ["    return v * torch.rsqrt((v * v).mean(-1, keepdim=True) + eps)", "", ""]
        steps = [f"{all_steps(name)}.unbind(0)" for name in self.sequences]
        taken = steps[0] if len(steps) == 1 else f"zip({', '.join(steps)})"
        lines += [self.signature(), *indented(before), "    ys = []"]
        lines += [f"    for {', '.join(self.sequences)} in {taken}:"]
        lines += indented([*body, f"ys.append({self.states[0]})"], 8)
        return "\n".join([*lines, f"    return torch.stack(ys), {', '.join(self.states)}", ""])
