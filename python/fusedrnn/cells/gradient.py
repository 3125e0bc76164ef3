"""The gradient of one step, as more operations of the same graph: reverse mode.

The gradient of a value is the sum of what each of its uses contributes: an upstream gradient times the
derivative of that use. Contributions that share a gradient are factored, ``d*a + d*b`` as ``d*(a + b)``, as
one does by hand. This rounds once less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fusedrnn.cells.graph import TUPLE, UNIT, Graph, Node, reach
from fusedrnn.cells.trace import Trace


class Term(NamedTuple):
    """A contribution. Its sign is stored separately, so that no operation negates a gradient."""

    sign: int
    node: Node


@dataclass
class Gradient:
    """The gradient of one step: upstream gradients, and the gradients of everything that a step reads."""

    upstream: dict[str, Node] = field(default_factory=dict)  # of each new state
    dense: dict[Node, Node] = field(default_factory=dict)  # of each product
    direct: dict[str, Node] = field(default_factory=dict)  # of each state, the part not through a product
    chain: dict[str, Node] = field(default_factory=dict)  # of each state, the part through products
    vectors: dict[Node, Node] = field(default_factory=dict)  # to be summed over rows and steps
    scalars: dict[str, Node] = field(default_factory=dict)  # to be summed over units

    @property
    def outputs(self) -> list[Node]:
        """All results of backward, in the order of the fields."""
        groups = (self.dense, self.direct, self.chain, self.vectors, self.scalars)
        return [node for group in groups for node in group.values()]


def derive(t: Trace) -> Gradient:
    """The gradient of a cell's step."""
    g = t.graph
    forward = reach(t.after.values())
    terms: dict[Node, list[Term]] = {n: [] for n in forward}
    items: dict[Node, dict[int, Node]] = {n: {} for n in forward if n.op == "normalise"}
    found = Gradient()
    for name, node in t.after.items():
        found.upstream[name] = g.node("upstream", attribute=name, shape=UNIT)
        terms[node].append(Term(1, found.upstream[name]))
    users: dict[Node, list[Node]] = {}  # the products of each operand
    for n in forward:
        for operand in n.args if n.op == "dense" else ():
            users.setdefault(operand, []).append(n)

    for n in reversed(forward):
        if n in users and n.op != "input":  # all its products came before
            products = [found.dense[u] for u in users[n]]
            back = g.node("transposed", *products, attribute=(n, tuple(users[n])), shape=UNIT)
            if n.op == "state":
                found.chain[n.attribute] = back
            else:
                terms[n].append(Term(1, back))
        if n.op == "project":  # only a new state: its gradient is the upstream one
            (value,), (term,) = n.args, terms[n]
            terms[value].append(Term(1, g.node("project_transposed", term.node, shape=UNIT)))
            continue
        if n.op == "normalise":
            dx = [items[n].get(k, g.constant(0)) for k in range(len(n.args))]
            back = g.node("normalise_gradient", n, *dx, attribute=n.attribute, shape=TUPLE)
            for k, a in enumerate(n.args):
                terms[a].append(Term(1, g.node("item", back, attribute=k, shape=UNIT)))
            continue
        if not terms[n]:  # a condition, or a state that is only the operand of a product
            if n.op == "dense":
                found.dense[n] = g.constant(0)
            continue
        total = add_up(g, terms[n])
        if n.op in RULES:
            for a, term in RULES[n.op](g, n, total.node):
                terms[a].append(Term(total.sign * term.sign, term.node))
            continue
        d = total.node if total.sign > 0 else g.neg(total.node)
        if n.op == "item":
            items[n.args[0]][n.attribute] = d
        elif n.op == "dense":
            found.dense[n] = d
        elif n.op == "state":
            found.direct[n.attribute] = d
        elif n.op == "vector":
            found.vectors[n] = d
        elif n.op == "scalar":
            found.scalars[n.attribute] = d
    return found


def multiples(d: Node) -> dict[Node, Node | None]:
    """Every gradient that a gradient is a multiple of, longest first.

    Each has the factor by which it is multiplied to give the one before it.
    """
    found: dict[Node, Node | None] = {d: None}
    while d.op == "mul":
        a, b = d.args
        d, factor = (a, b) if a.upstream else (b, a)
        found[d] = factor
    return found


def add_up(g: Graph, terms: list[Term]) -> Term:
    """The sum of the terms, factored."""
    left = [(term, multiples(term.node)) for term in terms]
    counts = Counter(d for _, of in left for d in of)
    while (shared := next((d for _, of in left for d in of if counts[d] > 1), None)) is not None:
        inner, rest = [], []
        for term, of in left:
            if shared not in of:
                rest.append((term, of))
                continue
            counts.subtract(of.keys())
            factors = list(of.values())[1 : list(of).index(shared) + 1]
            product = g.constant(1)
            for f in reversed(factors):
                assert f is not None
                product = g.mul(product, f)
            inner.append(Term(term.sign, product))
        total = _sum(g, inner)
        node = g.mul(shared, total.node)
        left = [*rest, (Term(total.sign, node), multiples(node))]
        counts.update(left[-1][1].keys())
    return _sum(g, [term for term, _ in left])


def _sum(g: Graph, terms: list[Term]) -> Term:
    """The terms in their order, those with a plus first."""
    first, *rest = sorted(terms, key=lambda term: -term.sign)
    node = first.node
    for term in rest:
        node = g.add(node, term.node) if term.sign == first.sign else g.sub(node, term.node)
    return Term(first.sign, node)


Rule = Callable[[Graph, Node, Node], list[tuple[Node, Term]]]


def _where(g: Graph, condition: Node, a: Node, b: Node) -> Node:
    return g.node("where", condition, a, b, shape=UNIT)


def _one_of_two(g: Graph, a: Node, b: Node, second: Node, d: Node) -> list[tuple[Node, Term]]:
    """The gradient d goes to b where ``second`` holds, else to a."""
    zero = g.constant(0)
    return [(a, Term(1, _where(g, second, zero, d))), (b, Term(1, _where(g, second, d, zero)))]


def _relu(g: Graph, n: Node, d: Node) -> list[tuple[Node, Term]]:
    zero = g.constant(0)  # "0 >= y" is false where y is NaN: there the gradient passes
    return [(n.args[0], Term(1, _where(g, g.node("greater_equal", zero, n), zero, d)))]


def _absolute(g: Graph, n: Node, d: Node) -> list[tuple[Node, Term]]:
    (x,), zero = n.args, g.constant(0)
    at_most_zero = _where(g, g.node("greater", zero, x), g.neg(d), zero)
    return [(x, Term(1, _where(g, g.node("greater_equal", zero, x), at_most_zero, d)))]


def _divide(g: Graph, n: Node, d: Node) -> list[tuple[Node, Term]]:
    a, b = n.args
    quotient = g.div(d, b)
    return [(a, Term(1, quotient)), (b, Term(-1, g.mul(quotient, n)))]


def _derivative(of: Callable[[Graph, Node], Node]) -> Rule:
    """The rule for a function of one argument, from its derivative as an expression."""
    return lambda g, n, d: [(n.args[0], Term(1, g.mul(d, of(g, n))))]


# The gradients of the arguments of an operation n with the gradient d.
RULES: dict[str, Rule] = {
    "add": lambda g, n, d: [(n.args[0], Term(1, d)), (n.args[1], Term(1, d))],
    "sub": lambda g, n, d: [(n.args[0], Term(1, d)), (n.args[1], Term(-1, d))],
    "mul": lambda g, n, d: [
        (n.args[0], Term(1, g.mul(d, n.args[1]))),
        (n.args[1], Term(1, g.mul(d, n.args[0]))),
    ],
    "div": _divide,
    "neg": lambda g, n, d: [(n.args[0], Term(-1, d))],
    "tanh": _derivative(lambda g, y: g.sub(g.constant(1), g.mul(y, y))),
    "sigmoid": _derivative(lambda g, y: g.mul(y, g.sub(g.constant(1), y))),
    "exp": _derivative(lambda g, y: y),
    "log": lambda g, n, d: [(n.args[0], Term(1, g.div(d, n.args[0])))],
    "sqrt": lambda g, n, d: [(n.args[0], Term(1, g.div(g.mul(d, g.constant(0.5)), n)))],
    "softplus": _derivative(lambda g, y: g.node("sigmoid", y.args[0])),
    "relu": _relu,
    "absolute": _absolute,
    "maximum": lambda g, n, d: _one_of_two(
        g, n.args[0], n.args[1], g.node("greater", n.args[1], n.args[0]), d
    ),
    "minimum": lambda g, n, d: _one_of_two(
        g, n.args[0], n.args[1], g.node("greater", n.args[0], n.args[1]), d
    ),
    "where": lambda g, n, d: _one_of_two(g, n.args[2], n.args[1], n.args[0], d),
}
