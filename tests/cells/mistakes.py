"""Seeded mistakes in what is derived from a cell: each is one change that the tests have to notice.

``old`` occurs exactly once in its file, else the list is out of date and the tests fail. The kind says which
tests have to notice it (test_mistakes.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    kind: str
    file: str  # in python/fusedrnn/cells
    old: str
    new: str


GRADIENT = "gradient.py"
EVALUATION = "evaluation.py"
SAVED = "saved.py"
FUSION = "fusion.py"
GRAPH = "graph.py"
DEFINITION = "definition.py"
SYMBOLS = "symbols.py"
ROUNDS = "rounds.py"
TRACE = "trace.py"
ACTIVATIONS = "activations.py"

# Of each kind: name, file, old, new.
KINDS = {
    "derivative": [
        (
            "difference: the second one has the sign of the first",
            GRADIENT,
            '"sub": lambda g, n, d: [(n.args[0], Term(1, d)), (n.args[1], Term(-1, d))]',
            '"sub": lambda g, n, d: [(n.args[0], Term(1, d)), (n.args[1], Term(1, d))]',
        ),
        (
            "product: times itself, not times the other factor",
            GRADIENT,
            "(n.args[0], Term(1, g.mul(d, n.args[1])))",
            "(n.args[0], Term(1, g.mul(d, n.args[0])))",
        ),
        (
            "quotient: the divisor's sign",
            GRADIENT,
            "(b, Term(-1, g.mul(quotient, n)))",
            "(b, Term(1, g.mul(quotient, n)))",
        ),
        (
            "quotient: the dividend in place of the quotient",
            GRADIENT,
            "(b, Term(-1, g.mul(quotient, n)))",
            "(b, Term(-1, g.mul(quotient, a)))",
        ),
        (
            "negation: the sign lost",
            GRADIENT,
            '"neg": lambda g, n, d: [(n.args[0], Term(-1, d))]',
            '"neg": lambda g, n, d: [(n.args[0], Term(1, d))]',
        ),
        ("tanh: y not squared", GRADIENT, "g.sub(g.constant(1), g.mul(y, y))", "g.sub(g.constant(1), y)"),
        (
            "sigmoid: 1 + y",
            GRADIENT,
            "g.mul(y, g.sub(g.constant(1), y))",
            "g.mul(y, g.add(g.constant(1), y))",
        ),
        (
            "exp: times its argument",
            GRADIENT,
            '"exp": _derivative(lambda g, y: y)',
            '"exp": _derivative(lambda g, y: y.args[0])',
        ),
        (
            "log: divided by the result",
            GRADIENT,
            'Term(1, g.div(d, n.args[0])))],\n    "sqrt"',
            'Term(1, g.div(d, n)))],\n    "sqrt"',
        ),
        ("sqrt: without 1/2", GRADIENT, "g.mul(d, g.constant(0.5))", "g.mul(d, g.constant(1))"),
        ("softplus: sigmoid of the result", GRADIENT, 'g.node("sigmoid", y.args[0])', 'g.node("sigmoid", y)'),
        (
            "relu: passes where it is 0",
            GRADIENT,
            'g.node("greater_equal", zero, n), zero, d)',
            'g.node("greater_equal", zero, n), d, zero)',
        ),
        (
            "absolute: the sign lost",
            GRADIENT,
            'g.node("greater", zero, x), g.neg(d), zero)',
            'g.node("greater", zero, x), d, zero)',
        ),
        (
            "maximum: to the smaller one",
            GRADIENT,
            'g.node("greater", n.args[1], n.args[0])',
            'g.node("greater", n.args[0], n.args[1])',
        ),
        (
            "minimum: to the larger one",
            GRADIENT,
            'g.node("greater", n.args[0], n.args[1])',
            'g.node("greater", n.args[1], n.args[0])',
        ),
        (
            "where: to the one that was not chosen",
            GRADIENT,
            "_one_of_two(g, n.args[2], n.args[1], n.args[0], d)",
            "_one_of_two(g, n.args[1], n.args[2], n.args[0], d)",
        ),
        (
            "sum: a later term's sign lost",
            GRADIENT,
            "if term.sign == first.sign else g.sub",
            "if term.sign else g.sub",
        ),
        (
            "sum: two terms with minus, as a difference",
            GRADIENT,
            "if term.sign == first.sign else g.sub",
            "if term.sign > 0 else g.sub",
        ),
        ("sum: its sign lost", GRADIENT, "    return Term(first.sign, node)", "    return Term(1, node)"),
        (
            "factoring: a sign lost inside",
            GRADIENT,
            "inner.append(Term(term.sign, product))",
            "inner.append(Term(1, product))",
        ),
        (
            "factoring: the sign of what is in brackets lost",
            GRADIENT,
            "(Term(total.sign, node), multiples(node))",
            "(Term(1, node), multiples(node))",
        ),
        ("factoring: the other terms lost", GRADIENT, "left = [*rest, (Term(", "left = [(Term("),
        ("factoring: only the last factor", GRADIENT, "product = g.mul(product, f)", "product = f"),
        (
            "chain: the sign of what comes in lost",
            GRADIENT,
            "Term(total.sign * term.sign, term.node)",
            "Term(term.sign, term.node)",
        ),
        (
            "chain: the sign lost where it ends",
            GRADIENT,
            "d = total.node if total.sign > 0 else g.neg(total.node)",
            "d = total.node",
        ),
        (
            "operand: its products in place of its other uses",
            GRADIENT,
            "terms[n].append(Term(1, back))",
            "terms[n] = [Term(1, back)]",
        ),
        (
            "state: what goes through products replaces the rest",
            EVALUATION,
            "sum(parts[1:], start=np.broadcast_to(parts[0], zeros.shape)) if parts",
            "np.broadcast_to(parts[0], zeros.shape) if parts",
        ),
        (
            "weight_hr: the gradient of c in place of that of h",
            EVALUATION,
            "dweight += self.values[self.cell.gradient.upstream[h]].T",
            "dweight += self.values[[*self.cell.gradient.upstream.values()][-1]].T[: len(dweight)]",
        ),
        (
            "a projection: the other sign",
            GRADIENT,
            'Term(1, g.node("project_transposed", term.node, shape=UNIT))',
            'Term(1, g.neg(g.node("project_transposed", term.node, shape=UNIT)))',
        ),
        (
            "transposed: the first block of weights for every operand",
            EVALUATION,
            "n.attribute.weights[n.args.index(operand)]",
            "n.attribute.weights[0]",
        ),
        ("transposed: the last product alone", EVALUATION, "total = total + self.of(", "total = self.of("),
        (
            "norm: the gradient of one value for all",
            GRADIENT,
            "items[n.args[0]][n.attribute] = d",
            "items[n.args[0]][0] = d",
        ),
        (
            "norm: the gradient of its first value to all",
            GRADIENT,
            'g.node("item", back, attribute=k, shape=UNIT)',
            'g.node("item", back, attribute=0, shape=UNIT)',
        ),
        (
            "layer norm: the mean is a constant",
            EVALUATION,
            'd = dx - dx.mean(axis=-1, keepdims=True) if norm.kind == "layer" else dx',
            "d = dx",
        ),
        (
            "RMS norm: less its mean, as in layer norm",
            EVALUATION,
            'd = dx - dx.mean(axis=-1, keepdims=True) if norm.kind == "layer" else dx',
            "d = dx - dx.mean(axis=-1, keepdims=True)",
        ),
        (
            "norms: the variance is a constant",
            EVALUATION,
            "d = d - x * (dx * x).mean(axis=-1, keepdims=True)",
            "pass",
        ),
        ("norms: the scale lost", EVALUATION, "np.split(normed.inverse * d,", "np.split(d,"),
    ],
    "plan": [
        ("a save is cheap", SAVED, "SAVE = 14", "SAVE = 2"),
        ("tanh costs more than a save", SAVED, '"softplus"), 10)', '"softplus"), 20)'),
        ("a division costs as much as a sum", SAVED, '{"div": 4, "sqrt": 4}', "{}"),
        ("states are not free", SAVED, '("state", "input", "constant")', '("input", "constant")'),
        ("new states are not free", SAVED, "    there |= {n for name", "    {n for name"),
        ("a fused product is saved", SAVED, " and n not in fused else", " else"),
        (
            "the operands of products are not wanted",
            SAVED,
            'n.op in ("dense", "project") for a in n.args}',
            'n.op == "project" for a in n.args}',
        ),
        (
            "what is projected is not wanted",
            SAVED,
            'n.op in ("dense", "project") for a in n.args}',
            'n.op == "dense" for a in n.args}',
        ),
        ("a norm is saved, as one value", SAVED, 'n.shape == UNIT and n.op != "item"', 'n.op != "item"'),
        ("a product is made again", SAVED, 'make = IMPOSSIBLE if n.op == "dense" else COST', "make = COST"),
        (
            "making again needs the first argument alone",
            SAVED,
            "for a in n.args:\n            if a not in there:",
            "for a in n.args[:1]:\n            if a not in there:",
        ),
        ("a value that is made again need not be there", SAVED, "        cut.implies(again, has)\n", ""),
        (
            "making again costs its price beside that of a save",
            SAVED,
            "cut.pay(make - save, again)",
            "cut.pay(make, again)",
        ),
        ("flow is never taken back", SAVED, "self._left[b][a] += flow", "self._left[b][a] += 0"),
    ],
    "fusion": [
        ("a product that is used twice", FUSION, "uses[a] == 1", "uses[a] <= 2"),
        ("a product that is an output too", FUSION, "    uses.update(outputs)\n", ""),
        ("a product of another round", FUSION, " and rounds[a] == rounds[n]", ""),
        ("what a product is taken from", FUSION, 'if n.op == "add" else n.args[1:]', "if n.op else ()"),
        ("the last of two products", FUSION, "                    break\n", ""),
        ("only sums", FUSION, 'if n.op in ("add", "sub"):', 'if n.op == "add":'),
        (
            "the product in place of what it is added to",
            FUSION,
            "n.args[1] is product else n.args[1]",
            "n.args[1] is product else n.args[0]",
        ),
        ("a difference as a sum", FUSION, '"fma" if n.op == "add" else "fnma"', '"fma"'),
        (
            "the order of the search, not that of the cell",
            FUSION,
            "sorted(found.values(), key=lambda operation: operation.node.id)",
            "list(found.values())",
        ),
        (
            "the first round begins with a product of a matrix",
            DEFINITION,
            "{n: max(r, 1) for n, r in rounds(forward).items()}",
            "rounds(forward)",
        ),
        (
            "backward counts rounds on from forward",
            DEFINITION,
            "rounds(backward, known=forward)",
            "rounds([*forward, *backward])",
        ),
        (
            "the product in backward is one of forward",
            DEFINITION,
            "fusion.fusions(backward, self.gradient.outputs,",
            "fusion.fusions([*forward, *backward], self.gradient.outputs,",
        ),
        ("a - b as b - a", GRAPH, 'COMMUTATIVE = {"add", "mul"}', 'COMMUTATIVE = {"add", "mul", "sub"}'),
        (
            "the maximum of b and a as that of a and b",
            GRAPH,
            'COMMUTATIVE = {"add", "mul"}',
            'COMMUTATIVE = {"add", "mul", "maximum"}',
        ),
        (
            "all constants are one",
            GRAPH,
            "if op in COMMUTATIVE else ids, attribute)",
            "if op in COMMUTATIVE else ids)",
        ),
        ("-(-x) is -x", GRAPH, "return a.args[0] if a.op", "return a if a.op"),
        ("x * 1 is 1", GRAPH, "                return other\n", "                return one\n"),
        ("rounded constants are folded", GRAPH, " and Fraction(found) == exact", ""),
        ("a zero is folded", GRAPH, "math.isfinite(found) and found and", "math.isfinite(found) and"),
        (
            "2 - x as x - 2",
            SYMBOLS,
            '__sub__, __rsub__ = _both("sub")',
            '__sub__ = __rsub__ = _both("sub")[0]',
        ),
    ],
    "rounds": [
        ("a norm does not wait", ROUNDS, '"normalise", "transposed"', '"transposed"'),
        ("a transposed product does not wait", ROUNDS, '"transposed", ', ""),
        ("the gradient of a norm does not wait", ROUNDS, ', "normalise_gradient"', ""),
        ("a projection does not wait", ROUNDS, ', "project"', ""),
        ("the gradient of a projection does not wait", ROUNDS, ', "project_transposed"', ""),
        ("a product does not wait", ROUNDS, 'WAITS = {"dense", ', "WAITS = {"),
        ("the first argument is enough", ROUNDS, "for a in n.args)", "for a in n.args[:1])"),
        ("the smallest round of the arguments", ROUNDS, "max((found[a]", "min((found[a]"),
        ("every operation waits", ROUNDS, "+ (n.op in WAITS)", "+ 1"),
        ("what is known comes a round late", ROUNDS, "fromkeys(known, 0)", "fromkeys(known, 1)"),
    ],
    "norms": [
        ("layer norm without its mean", EVALUATION, "        v = v - v.mean", "        v = v - 0 * v.mean"),
        ("RMS norm with a mean", EVALUATION, '    if norm.kind == "layer":\n', "    if norm.kind:\n"),
        (
            "eps added to the root",
            EVALUATION,
            "np.sqrt((v * v).mean(axis=-1, keepdims=True) + norm.eps)",
            "(np.sqrt((v * v).mean(axis=-1, keepdims=True)) + norm.eps)",
        ),
        ("eps is that of PyTorch, always", TRACE, "Norm(kind, float(eps))", "Norm(kind, 1e-5)"),
        (
            "each value by itself, with the scale of all",
            EVALUATION,
            "v = v - v.mean(axis=-1, keepdims=True)",
            "v = np.concatenate([a - a.mean(axis=-1, keepdims=True) for a in values], axis=-1)",
        ),
        ("one gain for all values", TRACE, "g.mul(gain, item)", "g.mul(gains[0], item)"),
        ("one value for all", TRACE, '"item", normed, attribute=k', '"item", normed, attribute=0'),
        (
            "no bias after the gain",
            TRACE,
            "zip(parts, biases, strict=True)] if biases else parts",
            "zip(parts, biases, strict=True)] if False else parts",
        ),
        ("biases before the norm", TRACE, "products, gains, added, what)", "products, gains, [], what)"),
        (
            "rows of both matrices counted together",
            TRACE,
            "return len(blocks) - 1",
            'return len(self._trace.blocks.get("weight_ih", blocks)) - 1',
        ),
        (
            "a gate's first bias for all its products",
            EVALUATION,
            "dense.biases[k]) if",
            "dense.biases[0]) if",
        ),
    ],
    "selections": [
        (
            "maximum: the second one wins a tie",
            ACTIVATIONS,
            "(a.real >= b.real) | np.isnan(a)",
            "(a.real > b.real) | np.isnan(a)",
        ),
        (
            "minimum: the second one wins a tie",
            ACTIVATIONS,
            "(a.real <= b.real) | np.isnan(a)",
            "(a.real < b.real) | np.isnan(a)",
        ),
        (
            "maximum: a NaN in the first one lost",
            ACTIVATIONS,
            "(a.real >= b.real) | np.isnan(a)",
            "a.real >= b.real",
        ),
        (
            "minimum: a NaN in the second one lost",
            ACTIVATIONS,
            "(a.real <= b.real) | np.isnan(a)",
            "(a.real <= b.real) | np.isnan(b)",
        ),
        (
            "relu: NaN becomes 0",
            ACTIVATIONS,
            "np.where(x.real <= ZERO, ZERO, x)",
            "np.where(x.real > ZERO, x, ZERO)",
        ),
        (
            "relu: -0 stays",
            ACTIVATIONS,
            "np.where(x.real <= ZERO, ZERO, x)",
            "np.where(x.real < ZERO, ZERO, x)",
        ),
        (
            "relu: no gradient at NaN",
            GRADIENT,
            'g.node("greater_equal", zero, n), zero, d)',
            'g.node("greater", n, zero), d, zero)',
        ),
        (
            "relu: a gradient at 0",
            GRADIENT,
            'g.node("greater_equal", zero, n), zero, d)',
            'g.node("greater", zero, n), zero, d)',
        ),
        (
            "relu: times a mask",
            GRADIENT,
            'Term(1, _where(g, g.node("greater_equal", zero, n), zero, d))',
            'Term(1, g.mul(d, _where(g, g.node("greater_equal", zero, n), zero, g.constant(1))))',
        ),
        ("absolute: -0 of 0", ACTIVATIONS, "x, ZERO - x)", "x, -x)"),
        (
            "absolute: a gradient at 0",
            GRADIENT,
            'g.node("greater", zero, x), g.neg(d), zero)',
            'g.node("greater_equal", zero, x), g.neg(d), zero)',
        ),
        (
            "maximum: the second one has the gradient of a tie",
            GRADIENT,
            'g.node("greater", n.args[1], n.args[0])',
            'g.node("greater_equal", n.args[1], n.args[0])',
        ),
        (
            "minimum: the second one has the gradient of a tie",
            GRADIENT,
            'g.node("greater", n.args[0], n.args[1])',
            'g.node("greater_equal", n.args[0], n.args[1])',
        ),
        (
            "where and maximum: times a mask",
            GRADIENT,
            "(b, Term(1, _where(g, second, d, zero)))",
            "(b, Term(1, g.mul(d, _where(g, second, g.constant(1), zero))))",
        ),
        (
            "where and maximum: both have the gradient",
            GRADIENT,
            "(a, Term(1, _where(g, second, zero, d)))",
            "(a, Term(1, d))",
        ),
        (
            "where: values times masks",
            ACTIVATIONS,
            '"where": np.where,',
            '"where": lambda c, a, b: c * a + ~c * b,',
        ),
        ("a >= b as a > b", SYMBOLS, '_both("greater_equal")', '_both("greater")'),
        (
            "a < b as a <= b",
            SYMBOLS,
            '__gt__, __lt__ = _both("greater")',
            '__gt__, __lt__ = _both("greater")[0], _both("greater_equal")[1]',
        ),
        (
            "a > b holds of NaN",
            ACTIVATIONS,
            '"greater": lambda a, b: a.real > b.real',
            '"greater": lambda a, b: ~(a.real <= b.real)',
        ),
        (
            "softplus: overflow",
            ACTIVATIONS,
            "np.log1p(np.exp(np.where(positive, -x, x)))",
            "np.log1p(np.exp(np.where(positive, x, x)))",
        ),
    ],
}

MISTAKES = [Mistake(name, kind, *change) for kind, mistakes in KINDS.items() for name, *change in mistakes]
