"""The loop over time that people write for a cell, as source text; ``loops_torch`` and ``loops_jax`` have the
words of each library.

It is what an experienced user of the library would write. What depends on no state is computed for all steps
before the loop. ``unbind`` takes the sequences apart. A step makes one product for each recurrent operand, of
all its gates; PyTorch's ``addmm`` adds what x gives in the same operation.
"""

from __future__ import annotations

import keyword
import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from fusedrnn.cells import Cell
from fusedrnn.cells.graph import Node, number
from fusedrnn.cells.trace import Norm, side

ONCE, ALL_STEPS, EACH_STEP = range(3)  # when a value is computed
Nodes = tuple[Node, ...]

# The text of an operation, and how tightly it binds; a call binds most.
INFIX = {
    "greater": ("{} > {}", 1),
    "greater_equal": ("{} >= {}", 1),
    "add": ("{} + {}", 2),
    "sub": ("{} - {}", 2),
    "mul": ("{} * {}", 3),
    "div": ("{} / {}", 3),
    "neg": ("-{}", 4),
}
SUM, CALL = 2, 5
DEEPEST = 10  # operations within one another on a line


class Text(NamedTuple):
    """The text of a value."""

    words: str
    binds: int = CALL


class Line(NamedTuple):
    """``target = words``"""

    target: str
    words: str


class Value(NamedTuple):
    """A value that has a name."""

    name: str
    stage: int


class Loop:
    """One cell's loop; a subclass knows a library's words."""

    operations: ClassVar[Mapping[str, str]]
    transposed: ClassVar[str]
    words: ClassVar[tuple[str, ...]]  # that mean something else in the text

    def __init__(self, cell: Cell) -> None:
        t = cell.trace
        self.cell, self.x, self.nodes = cell, t.x, cell.forward_nodes
        self.taken = {"x", "H", *self.words}
        self.name = self.fresh(cell.name)
        blocks = [name for name in cell.blocks if cell.two_biases or name != "bias_hh"]
        self.parameters = {name: self.fresh(name) for name in blocks}
        self.scalars = {n: Value(self.fresh(name), ALL_STEPS) for name, n in t.scalars.items()}
        self.stage: dict[Node, int] = {}
        for n in self.nodes:
            given = {"state": EACH_STEP, "input": ALL_STEPS, "scalar": ALL_STEPS}.get(n.op, ONCE)
            self.stage[n] = max([given, *(self.stage[a] for a in n.args)])
        self.values = {n: Value(self.fresh(name), EACH_STEP) for name, n in t.states.items()}
        self.states = [v.name for v in self.values.values()]
        self.values |= self.scalars
        self.users: dict[Node, list[Node]] = {n: [m for m in self.nodes if n in m.args] for n in self.nodes}
        self.uses = Counter(a for n in self.nodes for a in n.args)
        self.uses.update(t.after.values())
        self.gates = Counter(n.attribute.gate for n in self.nodes if n.op == "dense")
        self.lines: tuple[list[Line], list[Line], list[Line]] = ([], [], [])
        self.sequences: list[str] = []  # that the loop takes apart
        self.inlined: dict[Node, Text] = {}
        self.depth: dict[Node, int] = {}  # of those, how many operations are within one another
        self.parts: dict[Node, list[Value]] = {}  # of each gate's sum
        self.whole: dict[Nodes, Value] = {}  # gates beside each other
        self.done: set[Node] = set()  # written with something else
        self.folded: set[Node] = set()  # whose biases stand with x
        for name, _ in self.scalars.values():
            self.assign(ALL_STEPS, name, f"{name}[:, :, None]")
        self.groups = self._groups()
        for nodes in self.groups.pop(self.x):
            self.product(self.x, nodes)
        for n in self.nodes:
            if n not in self.values and n not in self.done:
                self.write(n)
        self.after = [self.use(n, EACH_STEP).words for n in t.after.values()]
        self._update_in_place()

    # --- names ----------------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A name like this one that nothing has yet."""
        while keyword.iskeyword(name) or not self.taken.isdisjoint((name, all_steps(name))):
            name += "_"
        self.taken |= {name, all_steps(name)}
        return name

    def word(self, value: Value, stage: int) -> str:
        """A value's name at some stage; before the loop it is that of the whole sequence."""
        if value.stage == ALL_STEPS and stage == ALL_STEPS:
            return all_steps(value.name)
        if value.stage == ALL_STEPS and value.name not in self.sequences:
            self.sequences.append(value.name)
        return value.name

    def assign(self, stage: int, name: str, words: str) -> None:
        self.lines[stage].append(Line(self.word(Value(name, stage), stage), words))

    def assign_all(self, values: Sequence[Value], text: Text, blocks: Sequence[int]) -> None:
        """Assign a value, or the blocks of its columns to several names."""
        stage = values[0].stage
        words = self.split(text, blocks) if len(values) > 1 else text.words
        self.lines[stage].append(Line(", ".join(self.word(v, stage) for v in values), words))

    def use(self, n: Node, stage: int) -> Text:
        """A value's text where it is used."""
        if n.op == "vector" and n not in self.values:
            parameter, block = n.attribute
            self.values[n] = Value(self.rows(parameter, [block], f"{parameter}_{block}"), ONCE)
        if n.op == "constant":
            words = repr(number(n)).removesuffix(".0")
            return Text(words, INFIX["neg"][1] if words.startswith("-") else CALL)
        return self.inlined[n] if n in self.inlined else Text(self.word(self.values[n], stage))

    # --- values ---------------------------------------------------------------------------------------------

    def write(self, n: Node) -> None:
        """Write a value, by itself or into the one place where it is used."""
        match n.op:
            case "normalise":
                self.normalise(n)
            case "dense":
                self.gate(n)
            case "project":
                self.keep(n, self.projected(n))
            case op if op not in ("constant", "input", "vector", "item"):
                self.keep(n, self.expression(n))

    def expression(self, n: Node) -> Text:
        """An operation's text, its arguments in parentheses where they need them."""
        args = [self.use(a, self.stage[n]) for a in n.args if not self.is_absent(a)]
        if len(args) < len(n.args):
            return args[0]
        if n.op not in INFIX:
            numbers = [a.op == "constant" for a in n.args]
            return Text(self.call(n.op, [a.words for a in args], numbers))
        pattern, binds = INFIX[n.op]
        last = len(args) - 1
        needs = [a.binds < binds or (a.binds == binds and k == last) for k, a in enumerate(args)]
        words = [f"({a.words})" if need else a.words for a, need in zip(args, needs, strict=True)]
        return Text(pattern.format(*words), binds)

    def call(self, op: str, args: list[str], numbers: list[bool]) -> str:
        """A function of values, of which some are numbers."""
        return f"{self.operations[op]}({', '.join(args)})"

    def keep(self, n: Node, text: Text) -> None:
        """Give a value a line of its own if it is used twice, at a later stage or in the next step, or if it
        is too long."""
        stage = self.stage[n]
        state = next((name for name, after in self.cell.trace.after.items() if after is n), None)
        once = self.uses[n] == 1 and not state and all(self.stage[m] == stage for m in self.users[n])
        self.depth[n] = 1 + max((self.depth[a] for a in n.args if a in self.inlined), default=0)
        if once and self.depth[n] < DEEPEST:
            self.inlined[n] = text
            return
        gates = self.gates_of(n)
        if state and stage == EACH_STEP:
            name = self.fresh(f"new_{state}")
        elif len(gates) == 1 and gates[0] in self.values and self.uses[gates[0]] == 1:
            gate: str = gates[0].attribute.gate  # f = sigmoid(f)
            name = self.values[gates[0]].name if gate in self.taken else self.fresh(gate)
        else:
            name = next(v for k in range(1, len(self.nodes)) if self.fresh(v := f"v{k}") == v)
        self.values[n] = Value(name, stage)
        self.assign(stage, name, text.words)

    def gates_of(self, n: Node) -> list[Node]:
        """The gates that a value's line reads, of its own stage."""
        found: list[Node] = []
        for a in n.args:
            if a.op == "dense" and a not in self.inlined and self.stage[a] == self.stage[n]:
                found.append(a)
            elif a in self.inlined:
                found += self.gates_of(a)
        return found

    def is_absent(self, n: Node) -> bool:
        """Whether this is a bias that the layer does not have."""
        return n.op == "vector" and n.attribute[0] not in self.parameters

    def rows(self, parameter: str, blocks: Sequence[int], name: str = "") -> str:
        """Blocks of H rows of a parameter; with a name they get it, if they are not all there are."""
        all_rows, first, end = self.parameters[parameter], blocks[0], blocks[0] + len(blocks)
        if [*blocks] == [*range(self.cell.blocks[parameter])]:
            return all_rows
        if [*blocks] == [*range(first, end)]:
            begin, stop = times_h(first), times_h(end) if end < self.cell.blocks[parameter] else ""
            words = f"{all_rows}[{f'{begin} : {stop}'.strip() if '*' in begin + stop else f'{begin}:{stop}'}]"
        else:
            words = self.beside([self.rows(parameter, [k]) for k in blocks], 0)
        if name:
            name = self.fresh(name)
            self.assign(ONCE, name, words)
        return name or words

    # --- products -------------------------------------------------------------------------------------------

    def _groups(self) -> dict[Node, list[Nodes]]:
        """Of each operand the gates that it is multiplied for, in the order of their rows."""
        dense = [n for n in self.nodes if n.op == "dense"]
        found: dict[Node, list[Nodes]] = {}
        for operand in dict.fromkeys([self.x, *(a for n in dense for a in n.args)]):
            nodes = [n for n in dense if operand in n.args]
            nodes.sort(key=lambda n: n.attribute.weights[n.args.index(operand)])
            alike = (tuple(n for n in nodes if self.has_bias(n, operand) == has) for has in (True, False))
            found[operand] = [group for group in alike if group]
        return found

    def has_bias(self, n: Node, operand: Node) -> bool:
        """Whether a product has a bias."""
        return bool(n.attribute.biases) and f"bias_{side(operand)}" in self.parameters

    def takes_bias(self, n: Node) -> bool:
        """Whether the product with x can have the bias of the only other one of this gate, too."""
        _, *others = n.args
        groups = self.groups.get(others[0], ()) if len(others) == 1 else ()
        takes = any(n in group and self.joins(others[0], group) for group in groups)
        return takes and self.has_bias(n, others[0])

    def joins(self, operand: Node, nodes: Nodes) -> bool:
        """Whether these gates are made of x and this operand, and of nothing else."""
        return self.x is not operand and all(n.args == (self.x, operand) for n in nodes)

    def stays(self, operand: Node, nodes: Nodes, all_gates: Nodes) -> bool:
        """Whether these gates stay beside each other once they are multiplied with the operand."""
        if operand is self.x and any(nodes in group for group in self.groups.values()):
            return any(self.joins(o, nodes) for o, group in self.groups.items() if nodes in group)
        normed = any(n.op == "normalise" and n.args == nodes for n in self.nodes)
        complete = all(n.args == (operand,) for n in nodes) or self.joins(operand, all_gates)
        return normed and complete and all(self.uses[n] == 1 for n in nodes)

    def segments(self, operand: Node, nodes: Nodes) -> list[Nodes]:
        """The gates in parts that are not taken apart, as large as possible."""
        found: list[Nodes] = []
        k = 0
        while k < len(nodes):
            ends = (e for e in range(len(nodes), k + 1, -1) if self.stays(operand, nodes[k:e], nodes))
            found.append(nodes[k : next(ends, k + 1)])
            k += len(found[-1])
        return found

    def gate(self, n: Node) -> None:
        """A gate's sum, and before it the products of its operands with all their gates."""
        for operand in sorted(n.args, key=lambda a: self.stage[a]):
            for nodes in self.groups.pop(operand, ()):
                self.product(operand, nodes)
        parts = self.parts.get(n, ())
        if len(parts) == 1:
            self.values[n] = parts[0]
        elif parts:
            self.keep(n, Text(" + ".join(self.word(part, self.stage[n]) for part in parts), SUM))

    def product(self, operand: Node, nodes: Nodes) -> None:
        """The product of an operand for all these gates."""
        stage, which = self.stage[operand], side(operand)
        at = {n: n.args.index(operand) for n in nodes}
        gates = _beside([n.attribute.gate for n in nodes])
        value = Text("x") if operand is self.x else self.use(operand, stage)
        each = stage == EACH_STEP
        weights = self.rows(f"weight_{which}", [n.attribute.weights[k] for n, k in at.items()])
        if each:
            weights = self.transpose(weights, f"w_{gates}")
        before = self.whole.pop(nodes, None)
        parts = self.parts.get(nodes[0], [])
        if len(nodes) == 1 and parts and parts[-1].stage <= stage:
            before = parts.pop()
        bias = None
        if self.has_bias(nodes[0], operand) and nodes[0] not in self.folded:
            blocks = [n.attribute.biases[k] for n, k in at.items()]
            bias = self.rows(f"bias_{which}", blocks, f"b_{gates}" if each else "")
            if operand is self.x and all(map(self.takes_bias, nodes)):
                self.folded.update(nodes)
                bias += f" + {self.rows('bias_hh', [n.attribute.biases[1] for n in nodes])}"
        if before is not None and bias is not None and before.stage == ALL_STEPS:
            sequence = all_steps(before.name)
            self.lines[ALL_STEPS].append(Line(sequence, f"{sequence} + {bias}"))
            bias = None
        added = [] if before is None else [self.word(before, stage)]
        made = {
            part: Value(self.fresh(_beside([self.gate_name(n, operand) for n in part])), stage)
            for part in self.segments(operand, nodes)
        }
        text = self.multiply(value, weights, bias, added, each)
        self.assign_all([*made.values()], text, [len(part) for part in made])
        for part, columns in made.items():
            if len(part) > 1:
                self.whole[part] = columns
            else:
                self.parts.setdefault(part[0], []).append(columns)

    def transpose(self, weights: str, name: str) -> str:
        """A name for weights that each step multiplies with."""
        name = self.fresh(name)
        self.assign(ONCE, name, weights + self.transposed)
        return name

    def projected(self, n: Node) -> Text:
        """The product with weight_hr."""
        each, weights = self.stage[n] == EACH_STEP, self.parameters["weight_hr"]
        weights = self.transpose(weights, "w_hr") if each else weights
        return self.multiply(self.use(n.args[0], self.stage[n]), weights, None, [], each)

    def gate_name(self, n: Node, operand: Node) -> str:
        """A name for the product of a gate with an operand: the gate's, if that is all of it."""
        more = self.parts.get(n) or any(a in self.groups for a in n.args)
        if self.gates[n.attribute.gate] == 1 and not more:
            return str(n.attribute.gate)
        label = "x" if operand is self.x else self.values[operand].name if operand.op == "state" else "r"
        return f"{n.attribute.gate}_{label}"

    # --- norms ----------------------------------------------------------------------------------------------

    def normalise(self, n: Node) -> None:
        """A norm with its gain and bias, where these belong to the same values in the same order."""
        stage, made = self.stage[n], self.whole.get(n.args)
        if made is not None:
            value = self.word(made, stage)
        else:
            each = [self.use(a, stage).words for a in n.args]
            value = each[0] if len(each) == 1 else self.beside(each, -1)
        items = sorted(self.users[n], key=lambda item: int(item.attribute))
        names = [self.gate_name(a, a.args[0]) if a.op == "dense" else "normed" for a in n.args]
        results, gain = self.scaled(items, "mul", names)
        results, bias = self.scaled(results, "add", names) if gain else (results, None)
        text = self.norm(n.attribute, value, len(n.args), gain, bias)
        self.values |= {r: Value(self.fresh(name), stage) for r, name in zip(results, names, strict=True)}
        self.assign_all([self.values[r] for r in results], text, [1] * len(results))

    def scaled(self, values: list[Node], op: str, names: Sequence[str]) -> tuple[list[Node], str | None]:
        """What becomes of values with a vector each, blocks of one parameter, and these; or the values."""
        users = [self.users[v][0] for v in values if self.uses[v] == 1 and self.users[v]]
        vectors = [a for u in users if u.op == op for a in u.args if a.op == "vector"]
        if not len(values) == len(users) == len(vectors) or len({v.attribute[0] for v in vectors}) > 1:
            return values, None
        self.done.update(values)
        if self.is_absent(vectors[0]):
            return users, None
        parameter = vectors[0].attribute[0]
        name = f"{parameter}_{_beside(names)}"
        return users, self.rows(parameter, [v.attribute[1] for v in vectors], name)

    # --- the text -------------------------------------------------------------------------------------------

    def _update_in_place(self) -> None:
        """Name a new state like the old one where that is not read any more."""
        lines, states = self.lines[EACH_STEP], self.cell.trace.states
        for state, name in zip(states, self.states, strict=True):
            value = self.values.get(self.cell.trace.after[state])
            first = next((k for k, line in enumerate(lines) if value and line.target == value.name), None)
            if value is None or first is None or not value.name.startswith("new_"):
                continue
            later = [line.words for line in lines[first + 1 :]]
            if any(_reads(words, name) for words in [*later, *self.after]):
                continue

            def renamed(words: str, old: str = value.name, new: str = name) -> str:
                return re.sub(rf"\b{old}\b", new, words)

            lines[first:] = [
                Line(renamed(a), renamed(b) if k else b) for k, (a, b) in enumerate(lines[first:])
            ]
            self.after = [renamed(words) for words in self.after]

    def body(self) -> list[str]:
        """The lines of a step."""
        lines = [f"{line.target} = {line.words}" for line in self.lines[EACH_STEP]]
        left = {name: words for name, words in zip(self.states, self.after, strict=True) if name != words}
        return [*lines, *([f"{', '.join(left)} = {', '.join(left.values())}"] if left else [])]

    def before(self) -> list[str]:
        """The lines before the loop."""
        found = [f"{line.target} = {line.words}" for stage in (ONCE, ALL_STEPS) for line in self.lines[stage]]
        if any(_reads(line, "H") for line in [*found, *self.body()]):
            found.insert(0, f"H = {self.parameters.get('weight_hr', self.states[0])}.shape[1]")
        return found

    def signature(self) -> str:
        """The first line of the function: x, parameters, row scalars and states."""
        scalars = [value.name for value in self.scalars.values()]
        return f"def {self.name}({', '.join(['x', *self.parameters.values(), *scalars, *self.states])}):"

    def source(self) -> str:
        """The whole text: ``function(x, *parameters, *scalars, *states) -> y, *states``."""
        raise NotImplementedError

    def function(self) -> Callable[..., Any]:
        """The function of this text, whose source Python's own tools find."""
        source, path = self.source(), f"<{type(self).__name__} of {self.cell!r}>"
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        found: dict[str, Any] = {"__name__": f"{__name__}.{self.name}"}  # which TorchScript asks for
        exec(compile(source, path, "exec"), found)
        return found[self.name]

    # --- a library's words ----------------------------------------------------------------------------------

    def multiply(self, value: Text, weights: str, bias: str | None, added: Sequence[str], each: bool) -> Text:
        """The product of a value, with a bias and what else is added; ``each``: in the loop."""
        raise NotImplementedError

    def split(self, text: Text, blocks: Sequence[int]) -> str:
        """The blocks of H columns of a value, as several values."""
        raise NotImplementedError

    def beside(self, values: Iterable[str], axis: int) -> str:
        """Values beside each other."""
        raise NotImplementedError

    def norm(self, norm: Norm, value: str, blocks: int, gain: str | None, bias: str | None) -> Text:
        """A value of so many blocks of H columns, normalised, times the gain, plus the bias."""
        raise NotImplementedError


def all_steps(name: str) -> str:
    """The name of the whole sequence."""
    return f"{name}_all"


def _beside(names: Sequence[str]) -> str:
    """One name for values beside each other: i_h, f_h is if_h."""
    words = [name.partition("_") for name in names]
    if any(len(gate) > 1 or label != words[0][2] for gate, _, label in words):
        return "_".join(names)
    return "".join(gate for gate, _, _ in words) + "".join(words[0][1:])


def times_h(count: int) -> str:
    """So many times H; nothing for 0."""
    return f"{count} * H" if count > 1 else "H" if count else ""


def sum_of(terms: Sequence[str]) -> Text:
    """A sum, or the one term."""
    return Text(" + ".join(terms), SUM if len(terms) > 1 else CALL)


def times_gain(words: str, gain: str | None, bias: str | None) -> Text:
    """A value times its gain, plus its bias, where there are any."""
    return sum_of([(f"{gain} * " if gain else "") + words, *([bias] if bias else [])])._replace(binds=SUM)


def _reads(words: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", words) is not None


def indented(lines: Iterable[str], spaces: int = 4) -> list[str]:
    """Lines with so many spaces before them."""
    return [" " * spaces + line for line in lines]
