"""A cell as programs of numbers for the vector machine of the compiled module (csrc/cpu/machine).

A step runs round by round, forward and backward (``rounds``). Each round begins with products of matrices,
whose results are in the first registers. In forward these are the accumulators of the round; in backward
first the gradients of the new states, then those of the operands that the cell computes. A round may also
begin with
norms: statistics of each row by which values in memory are normalised. Then it runs a program, a sequence of
instructions on registers. Values that the program of a later round needs are stored in memory.

The machine computes projections itself. Programs store the value before the projection in place of the first
state, and backward starts with the gradient of that value instead of the first state's. Then the only
operands are x and the first state.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fusedrnn.cells.definition import PLAIN, Cell
from fusedrnn.cells.fusion import Operation, lower
from fusedrnn.cells.graph import UNIT, Node, number
from fusedrnn.cells.rounds import rounds
from fusedrnn.cells.saved import choose

# In the order of csrc/cpu/machine/operations.def.
OPERATIONS = (
    *("constant", "vector", "scalar", "load", "store", "add_to"),
    *("add", "sub", "mul", "div", "neg", "fma", "fnma"),
    *("tanh", "sigmoid", "exp", "log", "sqrt", "softplus", "relu", "absolute"),
    *("maximum", "minimum", "where", "greater", "greater_equal"),
    *("one_minus", "sigmoid_gradient", "tanh_gradient"),
    *("normalise", "normalise_gradient"),
)

# Places in memory. They are followed by the places of each state before and after the step and of its direct
# gradient, then of the operands from the second on; the first one is x. DROPOUT and KEEP: the masks of
# dropout and zoneout. No instruction loads or stores the places of norms.
SAVED, CARRIED, GRADIENTS, SUMS, SCALARS, DROPOUT, KEEP_H, KEEP_C, _NORMS, _NORM_GRADIENTS, STATES = range(11)
KEEP = {"h": KEEP_H, "c": KEEP_C}


class Instruction(NamedTuple):
    """Compute register d from registers a, b and c, except:

    - ``constant``, ``vector`` and ``scalar``: register d is number a of these;
    - ``load``: register d is vector b of place a, and the next c registers are the next c vectors;
    - ``store`` and ``add_to``: register d is stored in, or added to, vector b of place a;
    - ``normalise``: b is the index of the norm, a one of its values;
    - ``normalise_gradient``: c is the index of the norm, a is a gradient, b the normalised value.
    """

    op: str
    d: int
    a: int = 0
    b: int = 0
    c: int = 0


class Memory(NamedTuple):
    """An instruction without its register."""

    op: str
    a: int
    b: int = 0


class Product(NamedTuple):
    """The product of an operand for an accumulator: blocks of H rows of weights and biases; bias -1: none."""

    accumulator: int
    operand: int
    weight: int
    bias: int


class RowNumbers(NamedTuple):
    """The statistics of a row for a norm.

    In forward ``of`` is whether values are centred, and the constant ``eps``; in backward the index of the
    norm in forward. ``values`` are their places and vectors; in backward those of each gradient and its
    value.
    """

    of: list[int]
    values: list[Memory]


class Round(NamedTuple):
    """The number of accumulators (forward) or the operands (backward) that come first; norms; the program."""

    first: list[int]
    norms: list[RowNumbers]
    code: list[Instruction]


@dataclass
class Plan:
    """A cell as the machine needs it."""

    start: list[float]  # of each state
    direct: list[bool]  # of each state, whether it has a gradient not through products
    operands: list[int]  # from the second on: the index of the state, or -1: computed
    products: list[Product]
    parameters: dict[str, int]  # other than weights and biases, with the number of blocks
    vectors: list[tuple[int, int]]  # parameter and block; parameters begin with PLAIN
    blocks: list[int]  # of weight_ih, weight_hh, bias_ih, bias_hh
    saved: int
    scalars: int  # the number of row scalars
    projects: bool  # the first state
    projected_mask: int = 0  # its zoneout is h's (1) or c's (2); 0: none
    carried: tuple[int, int] = (0, 0)  # forward and backward
    forward: list[Round] = field(default_factory=list)
    backward: list[Round] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """The whole plan except start and constants."""
        counts = [len(self.start), len(self.operands) + 1, len(self.products), len(self.parameters)]
        counts += [len(self.vectors), len(self.constants), self.saved, *self.carried, *self.blocks]
        counts += [self.scalars, self.projects, self.projected_mask]
        found = [*counts, *self.direct, *self.operands]
        for row in (*self.products, self.parameters.values(), *self.vectors):
            found += row
        for direction in (self.forward, self.backward):
            found.append(len(direction))
            for r in direction:
                found += [len(r.first), *r.first, len(r.norms)]
                for of, values in r.norms:
                    found += [*of, len(values) // (1 if direction is self.forward else 2)]
                    found += [k for where in values for k in (where.a, where.b)]
                found.append(len(r.code))
                for op, *registers in r.code:
                    found += [OPERATIONS.index(op), *registers]
        return [int(n) for n in found]


def plan(cell: Cell, dropout: bool = False, zoned: Sequence[str] = ()) -> Plan:
    """The plan of a cell.

    Args:
        cell: what a step computes.
        dropout: with recurrent dropout of the operands. The time loop applies it to states.
        zoned: the states with zoneout.
    """
    t, gradient = cell.trace, cell.gradient
    own = rounds(cell.forward_nodes)
    dense = [n for n in cell.forward_nodes if n.op == "dense"]
    # In each round: those of only x, those of both, those of only a state.
    dense.sort(key=lambda n: (own[n], (n.args[0].op != "input") + (n.args[-1].op != "input")))
    operands = [t.x, *dict.fromkeys(a for n in dense for a in n.args if a is not t.x)]
    states, names, S = list(t.states.values()), list(t.states), len(t.states)
    vectors = [n for n in cell.forward_nodes if n.op == "vector"]
    projected = t.after[names[0]].args if cell.projects else ()
    found = Plan(
        list(t.start.values()),
        [name in gradient.direct or name in zoned for name in names],
        [states.index(a) if a.op == "state" else -1 for a in operands[1:]],
        [
            Product(k, operands.index(a), weight, bias)
            for k, n in enumerate(dense)
            for a, weight, bias in zip(
                n.args, n.attribute.weights, n.attribute.biases or [-1] * len(n.args), strict=True
            )
        ],
        {name: cell.blocks[name] for name in cell.vectors},
        [((*PLAIN, *cell.vectors).index(n.attribute[0]), n.attribute[1]) for n in vectors],
        [cell.blocks.get(name, 0) for name in PLAIN],
        0,
        len(cell.scalars),
        cell.projects,
    )
    if cell.projects and names[0] in zoned:
        found.projected_mask = KEEP[names[0]] - DROPOUT
        zoned = [s for s in zoned if s != names[0]]
    # The masks, and the operations that they add.
    mask = {k: _operation("mask").node for k in (DROPOUT, *KEEP.values())}
    more: list[Operation] = []
    after, rest = {s: n for s, n in t.after.items() if n.op != "project"}, {}
    for s in zoned:
        keep = mask[KEEP[s]]
        rest[s] = _operation("one_minus", keep)
        old = _operation("mul", rest[s].node, t.states[s])
        more += [rest[s], old, _operation("fma", keep, after[s], old.node)]
        after[s] = more[-1].node
    product = {}  # for each operand that the cell computes, the value in products
    for n in operands[1:]:
        if n.op != "state":
            product[n] = n
            if dropout:
                more.append(_operation("mul", n, mask[DROPOUT]))
                product[n] = more[-1].node
    before = {n: Memory("load", STATES + s) for s, n in enumerate(states)}
    before |= {n: Memory("load", place) for place, n in mask.items()}
    before |= {n: Memory("scalar", k) for k, n in enumerate(t.scalars.values())}
    chosen = choose(t, gradient, set(cell.fused.values()), zoned) if zoned else cell.saved
    found.saved = len(chosen)
    kept = [(n, Memory("store", STATES + S + names.index(s))) for s, n in after.items()]
    kept += [(n, Memory("store", SAVED, k)) for k, n in enumerate(chosen)]
    computed = [
        (product[n], Memory("store", STATES + 3 * S + k)) for k, n in enumerate(operands[1:]) if n in product
    ]
    computed += [(n, Memory("store", STATES + S)) for n in projected]
    constants: dict[str, int] = {}

    forward = Direction(constants, vectors, before, [*kept, *computed])
    forward.own = _with_rounds(own, more)
    forward.early = {n for n, r in forward.own.items() if r == 0}
    forward.kept = {n: where._replace(op="load") for n, where in kept}
    forward.norms = sorted((n for n in cell.forward_nodes if n.op == "normalise"), key=lambda n: own[n])
    for n in dense:
        forward.given.setdefault(own[n], []).append(n)
        for a in n.args:
            if a in product:
                due = forward.due.get(product[a], own[n])
                forward.due[product[a]] = min(own[n] - 1, due)
    line = [*(o for o in cell.forward if o.op != "project"), *more]
    for given, its_norms, code in forward.programs(line, 1):
        found.forward.append(Round([len(given)], its_norms, code))

    comes_in = list(gradient.upstream.values())
    comes_in[:1] = [n for n in cell.backward_nodes if n.op == "project_transposed"] or comes_in[:1]
    known = [*before, *forward.kept, *vectors, t.x, *comes_in]
    groups = (gradient.dense, gradient.direct, gradient.vectors, gradient.scalars)
    back = [n for n in cell.backward_nodes if n.op == "normalise_gradient"]
    normed = [n for n in cell.forward_nodes if n.op == "item" and n.args[0] in {b.args[0] for b in back}]
    outputs = [n for group in groups for n in group.values()]
    line = lower([*outputs, *product, *normed, *projected], known, cell.fused)
    transposed = [n for n, op, _ in line if op == "transposed"]
    # From upstream gradients to gradients of what the cell computes.
    first = {u: _operation("mul", mask[KEEP[s]], u) for s, u in gradient.upstream.items() if s in zoned}
    first |= {n: _operation("mul", n, mask[DROPOUT]) for n in transposed if dropout}
    line = [o._replace(args=tuple(first[a].node if a in first else a for a in o.args)) for o in line]
    past = {s: _operation("mul", rest[s].node, gradient.upstream[s]) for s in zoned}  # it bypasses the cell
    line = [*rest.values(), *past.values(), *first.values(), *line]
    line += [o for o in more if o.node in product.values()]
    direct = {s: first[d].node if d in first else d for s, d in gradient.direct.items()}
    own = _with_rounds(rounds(cell.backward_nodes, [*cell.forward_nodes, *comes_in]), line)
    for s in zoned:
        direct[s] = _add(line, own, direct[s], past[s].node) if s in direct else past[s].node

    stores = [(gradient.dense[n], Memory("store", GRADIENTS, k)) for k, n in enumerate(dense)]
    stores += [(d, Memory("add_to", SUMS, vectors.index(n))) for n, d in gradient.vectors.items()]
    stores += [(d, Memory("store", SCALARS, cell.scalars.index(s))) for s, d in gradient.scalars.items()]
    stores = [(first[n].node if n in first else n, where) for n, where in stores]
    stores += [(d, Memory("store", STATES + 2 * S + names.index(s))) for s, d in direct.items()]
    stores += computed  # computed again, for the gradients of the weights
    backward = Direction(constants, vectors, before | forward.kept, stores)
    backward.own = _with_rounds(own, line)
    backward.early = set(cell.forward_nodes)
    backward.norms = sorted(back, key=lambda n: backward.own[n])
    backward.norms_before = forward.norms
    backward.given[0] = comes_in
    for n in transposed:
        backward.given.setdefault(backward.own[n], []).append(n)
    for given, its_norms, code in backward.programs(line, 0):
        which = [operands.index(n.attribute[0]) for n in given if n.op == "transposed"]
        found.backward.append(Round(which, its_norms, code))
    found.carried = len(forward.carried), len(backward.carried)
    found.constants = [float.fromhex(c) for c in constants]
    return found


def _operation(op: str, *args: Node) -> Operation:
    """An operation that is not in the cell."""
    return Operation(Node(0, op, args, None, UNIT, False), op, args)


def _add(line: list[Operation], own: Mapping[Node, int], total: Node, part: Node) -> Node:
    """Add to a sum, or to its first part if that is in an earlier round, as the compiled cells do."""
    for k, o in enumerate(line):
        if o.node is total and o.op in ("add", "fma", "fnma"):
            early = min(o.args if o.op == "add" else o.args[2:], key=lambda a: own.get(a, 0))
            if own.get(early, 0) < own[total]:
                added = _operation("add", early, part)
                line[k] = o._replace(args=tuple(added.node if a is early else a for a in o.args))
                line.insert(k, added)
                return total
    line.append(_operation("add", total, part))
    return line[-1].node


def _with_rounds(own: Mapping[Node, int], more: Iterable[Operation]) -> dict[Node, int]:
    """The round of each value, including these operations; their products have one already."""
    found = dict(own)
    for n, _, args in more:
        found.setdefault(n, max((found.get(a, 0) for a in args), default=0))
    return found


class Direction:
    """Forward or backward of a step, to be split into programs.

    Attributes:
        own: the round of each value.
        early: the values that need only what can be loaded in any round.
        given: for each round, the values in the first registers.
        norms: those computed here, in the order of their rounds; ``norms_before``: in backward, those of
            forward.
        due: the last round in which a value may be computed.
        anywhere: the places of values that are known from the start.
        kept: the places of values after they are computed.
        carried: the values that are stored only for a later round.
    """

    def __init__(
        self,
        constants: dict[str, int],
        vectors: Sequence[Node],
        known: Mapping[Node, Memory],
        stores: Iterable[tuple[Node, Memory]],
    ) -> None:
        self.constants, self.anywhere = constants, dict(known)
        self.anywhere |= {n: Memory("vector", k) for k, n in enumerate(vectors)}
        self.stores: dict[Node, list[Memory]] = {}
        for n, where in stores:
            self.stores.setdefault(n, []).append(where)
        self.own: dict[Node, int] = {}
        self.early: set[Node] = set()
        self.given: dict[int, list[Node]] = {}
        self.norms: list[Node] = []
        self.norms_before: list[Node] = []
        self.due: dict[Node, int] = {}
        self.kept: dict[Node, Memory] = {}
        self.carried: dict[Node, Memory] = {}

    def programs(
        self, line: Iterable[Operation], first: int
    ) -> list[tuple[list[Node], list[RowNumbers], list[Instruction]]]:
        """For each round the values of the first registers, norms, code. ``first``: the usual first round."""
        given = {n for nodes in self.given.values() for n in nodes}
        line = [n for n in line if n.node not in given]
        items = {(n.args[0], n.attribute): n for n, op, _ in line if op == "item"}
        line = normalised(line, items)
        normed = [(n, values_of(n, items)) for n in self.norms]
        for n, op, _ in line:
            if op == "constant":
                self.anywhere[n] = Memory(
                    "constant", self.constants.setdefault(n.attribute, len(self.constants))
                )
        kept = [*self.stores, *(a for _, values in normed for a in values)]
        line = shortened([n for n in line if n.node not in self.anywhere], kept)
        at = {n: r for r, nodes in self.given.items() for n in nodes}
        for n, values in normed:
            at[n] = self.own[n]
            self.due |= {a: min(at[n] - 1, self.due.get(a, at[n])) for a in values}
        for n, _, args in reversed(line):
            # A value that needs no product is computed at its first use, and so are its arguments.
            at[n] = self.due.get(n, first) if n in self.early else self.own[n]
            for a in args:
                self.due[a] = min(self.due.get(a, at[n]), at[n])
        # A value that is stored and not computed: in a round in which it is available.
        made: dict[int, list[Operation]] = {}
        for operation in line:
            made.setdefault(at[operation.node], []).append(operation)
        for n in self.stores:
            at.setdefault(n, min(self.due.get(n, first), first))
        last = max(at.values())
        for n, needs in [*normed, *((n, args) for n, _, args in line)]:
            for a in needs:
                there = a in self.anywhere or a in self.kept or a in self.carried
                if a in at and at[a] < at[n] and not there:
                    self.carried[a] = Memory("load", CARRIED, len(self.carried))
                    self.stores.setdefault(a, []).append(self.carried[a]._replace(op="store"))
        found = []
        for r in range(min(at.values()), last + 1):
            stored = {n for n in self.stores if at[n] == r}
            norms = [self._numbers(n, values) for n, values in normed if at[n] == r]
            found.append((self.given.get(r, []), norms, self._program(r, made.get(r, []), stored)))
        return found

    def _where(self) -> dict[Node, Memory]:
        return self.kept | self.carried | self.anywhere

    def _numbers(self, norm: Node, values: Sequence[Node]) -> RowNumbers:
        where = self._where()
        if norm.op == "normalise_gradient":
            of = [self.norms_before.index(norm.args[0])]
        else:
            kind, eps = norm.attribute
            of = [kind == "layer", self.constants.setdefault(eps.hex(), len(self.constants))]
        return RowNumbers(of, [where[a] for a in values])

    def _program(self, r: int, line: Sequence[Operation], stored: set[Node]) -> list[Instruction]:
        """One round: first loads, since they take longest, then operations; each result is stored at once."""
        given = self.given.get(r, [])
        there = {*given, *(n for n, _, _ in line)}
        loads = dict.fromkeys(a for _, _, args in line for a in args if a not in there)
        loads |= dict.fromkeys(n for n in self.stores if n in stored and n not in there)
        where = self._where()
        loads = dict.fromkeys(sorted(loads, key=lambda n: where[n]))
        steps: list[tuple[str, Node, tuple[Node, ...], Memory | None]] = []

        def store(n: Node) -> None:
            steps.extend((to.op, n, (n,), to) for to in (self.stores[n] if n in stored else ()))

        for n in given:
            store(n)
        for n in loads:
            steps.append((where[n].op, n, (), where[n]))
            store(n)
        for n, op, args in line:
            steps.append((op, n, args, None))
            store(n)
        numbers = {n: k for norms in (self.norms, self.norms_before) for k, n in enumerate(norms)}
        return _with_registers(given, steps, numbers)


Items = Mapping[tuple[Node, int], Node]  # the items of norms, by index


def normalised(line: Iterable[Operation], items: Items) -> list[Operation]:
    """The operations without norms, whose items are computed from values and statistics of the row."""
    norms = {n for n, _ in items}
    found = []
    for n, op, args in line:
        if op == "item":
            (norm,), k = args, n.attribute
            back = norm.op == "normalise_gradient"
            n_args = (norm.args[1 + k], items[norm.args[0], k]) if back else (norm.args[k],)
            found.append(Operation(n, norm.op, n_args))
        elif n not in norms:
            found.append(Operation(n, op, args))
    return found


def values_of(norm: Node, items: Items) -> list[Node]:
    """The values of a norm, or each gradient and its normalised value; a gradient of 0 is left out."""
    if norm.op == "normalise":
        return list(norm.args)
    normed, *gradients = norm.args
    return [v for k, d in enumerate(gradients) if d.op != "constant" for v in (d, items[normed, k])]


def shortened(line: Sequence[Operation], kept: Iterable[Node]) -> list[Operation]:
    """The operations with 1 - y, x * (y * (1 - y)) and x * (1 - y * y) as one operation each."""
    uses = Counter(a for _, _, args in line for a in args)
    uses.update(list(kept))
    of = {operation.node: operation for operation in line}
    found: dict[Node, Operation] = {}
    for n, op, args in line:
        found[n] = Operation(n, op, args)
        if op == "sub" and _is_one(args[0]):
            found[n] = Operation(n, "one_minus", args[1:])
        for x, factor in (args, args[::-1]) if op == "mul" else ():
            if uses[factor] == 1 and factor in of and (y := _slope_of(of, of[factor])):
                found[n] = Operation(n, f"{y[0]}_gradient", (x, y[1]))
                break
    needed = set(kept)
    for n, _, args in reversed(found.values()):
        if n in needed:
            needed |= set(args)
    return [operation for operation in found.values() if operation.node in needed]


def _slope_of(of: Mapping[Node, Operation], factor: Operation) -> tuple[str, Node] | None:
    """The name and y, if the factor is the derivative of a sigmoid or a tanh with the value y."""
    if factor.op == "fnma" and factor.args[0] is factor.args[1] and _is_one(factor.args[2]):
        return "tanh", factor.args[0]
    for y, rest in (factor.args, factor.args[::-1]) if factor.op == "mul" else ():
        if rest in of and of[rest].op == "sub" and _is_one(rest.args[0]) and rest.args[1] is y:
            return "sigmoid", y
    return None


def _is_one(n: Node) -> bool:
    return n.op == "constant" and number(n) == 1


def _with_registers(
    given: Sequence[Node],
    steps: Sequence[tuple[str, Node, tuple[Node, ...], Memory | None]],
    norms: Mapping[Node, int],
) -> list[Instruction]:
    """Assign a register to each value, which is free again after its last use."""
    last: dict[Node, int] = {}
    for k, (_, n, args, _) in enumerate(steps):
        last |= dict.fromkeys((n, *args), k)
    register = {n: k for k, n in enumerate(given)}
    free = [register[n] for n in given if n not in last]
    count = len(given)
    code = []
    for k, (op, n, args, memory) in enumerate(steps):
        sources = [register[a] for a in args]
        for r in {register[a] for a in args if last[a] == k}:
            heapq.heappush(free, r)
        if n not in args:
            if not free:
                heapq.heappush(free, count)
                count += 1
            register[n] = heapq.heappop(free)
        if memory is None:
            number = [norms[n.args[0]]] if n.op == "item" else []
            code.append(Instruction(op, register[n], *sources, *number))
        elif code and _follows(code[-1], op, register[n], memory):
            code[-1] = code[-1]._replace(c=code[-1].c + 1)
        else:
            code.append(Instruction(op, register[n], memory.a, memory.b))
    return code


def _follows(last: Instruction, op: str, register: int, memory: Memory) -> bool:
    """Whether a load continues the one before it."""
    op_before, d, a, b, more = last
    return op == op_before == "load" and (register, *memory[1:]) == (d + more + 1, a, b + more + 1)
