"""Cells as programs: what Python plans, and what the compiled module refuses of it."""

from __future__ import annotations

import numpy as np
import pytest

import published
from problems import PROJECTED, name, problem
from test_machine import NORMED, PEEPHOLE, PROGRAMS, everywhere, norms

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core
from fusedrnn.backends import machine
from fusedrnn.backends.cpu import CpuBackend
from fusedrnn.cells import program

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poison")]

CPU = CpuBackend()


def made(plan, numbers=None):
    numbers = plan.numbers() if numbers is None else numbers
    return _core.machine_plan(np.array(numbers, np.int32), plan.start, plan.constants)


def test_operations_are_the_same_in_both_languages():
    assert program.OPERATIONS == _core.MACHINE_OPERATIONS


@pytest.mark.quick
@pytest.mark.parametrize("cell", PROGRAMS, ids=name)
def test_plans(cell):
    """The same every time; every value is in a register before it is read, and registers are used again."""
    for options in ((), (True, [s for s in cell.states if s in "hc"])):
        plan = program.plan(cell, *options)
        assert plan == program.plan(cell, *options)
        for direction in (plan.forward, plan.backward):
            for k, r in enumerate(direction):
                first = r.first[0] if direction is plan.forward else len(r.first) if k else len(plan.start)
                there = set(range(first))
                for op, d, *operands in r.code:
                    if op in ("store", "add_to"):
                        assert d in there
                    elif op not in ("constant", "vector", "scalar", "load"):
                        count = {"fma": 3, "fnma": 3, "where": 3, "normalise_gradient": 2}.get(op, 1)
                        assert set(operands[:count]) <= there
                    there |= set(range(d, d + 1 + (operands[2] if op == "load" else 0)))
                assert max(there, default=0) < 40  # an LSTM with layer norm has 16 gains and biases at once


def run_plan(plan, numbers, save=1):
    """Run a plan that may be wrong, if it is accepted: it must not read or write beside its call's memory."""
    try:
        core = made(plan, numbers)
    except ValueError:
        return False
    H, I, T, B = 17, 3, 2, 3
    P = 5 if plan.projects else H
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    weights = [
        array(n * H, *columns) if n else None
        for n, columns in zip(plan.blocks, ((I,), (P,), (), ()), strict=True)
    ]
    weights += [array(n * H) for n in plan.parameters.values()]
    weights += [array(P, H)] * plan.projects
    widths = [P, *[H] * (len(plan.start) - 1)]
    try:
        packed = _core.pack(core, tuple(weights))
        state0, scalars = tuple(array(B, width) for width in widths), (array(T, B),) * plan.scalars
        options = None, None, False, 0, (0.5, 0.5, 0.5, 1, 0), True, save
        results = _core.forward(packed, core, array(T, B, I), state0, scalars, *options)
        dstates = tuple(array(T, B, width) for width in widths)
        need = [True] * (len(weights) + 2 + plan.scalars)
        _core.backward(results[3], array(T, B, P), state0, dstates, need)
    except ValueError:  # weights of other shapes
        return False
    return True


@pytest.mark.parametrize(
    "cell",
    [PEEPHOLE, published.mgu, published.gru_d, published.co_rnn, everywhere, norms, NORMED[0], PROJECTED],
    ids=name,
)
def test_broken_plans_are_refused_or_do_no_harm(cell):
    plan = program.plan(cell, True, [s for s in cell.states if s in "hc"])
    numbers = plan.numbers()
    assert run_plan(plan, numbers)
    for at, n in enumerate(numbers):
        for other in (n - 1, n + 1, -1, 255, 2**31 - 1, -(2**31)):
            run_plan(plan, [*numbers[:at], other, *numbers[at + 1 :]], save=1 + at % 2)
    for count in range(len(numbers)):
        with pytest.raises(ValueError, match="program: "):
            made(plan, numbers[:count])
    with pytest.raises(ValueError, match="program: end: expected no more numbers, got 1"):
        made(plan, [*numbers, 0])
    for start, constants in (([], plan.constants), (plan.start, [*plan.constants, 1.0])):
        with pytest.raises(ValueError, match="program: start and constants"):
            _core.machine_plan(np.array(numbers, np.int32), start, constants)


GRADIENTS, SAVED = (program.Memory("load", place) for place in (program.GRADIENTS, program.SAVED))
WRONG_NORMS = {
    "eps": ("forward", 1, [1, 255], [SAVED], "constant: expected 0 to 1, got 255"),
    "centred": ("forward", 1, [2, 0], [SAVED], "centred: expected 0 to 1, got 2"),
    "no values": ("forward", 1, [1, 0], [], "values of a norm: expected 1 to 64, got 0"),
    "many values": ("forward", 1, [1, 0], [SAVED] * 65, "values of a norm: expected 1 to 64, got 65"),
    "place": ("forward", 1, [1, 0], [GRADIENTS], "place: expected one to load from, got 2"),
    "mask": ("forward", 1, [1, 0], [program.Memory("load", program.DROPOUT)], "place: .* got 5"),
    "value": ("forward", 1, [1, 0], [SAVED._replace(b=2)], "value of a place: expected 0 to 1, got 2"),
    "norm": ("backward", 1, [2], [SAVED, SAVED], "norm: expected 0 to 1, got 2"),
    "gradients": ("backward", 1, [0], [SAVED] * 4, "values of a norm: expected 0 to 1, got 2"),
    "gradient's place": ("backward", 1, [0], [SAVED, GRADIENTS], "place: expected one to load from, got 2"),
    "first round": ("backward", 0, [0], [SAVED, SAVED], "norms: expected none in the first round backward"),
}


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("wrong", WRONG_NORMS.values(), ids=WRONG_NORMS)
def test_wrong_norms_are_refused(wrong):
    direction, number, of, values, message = wrong
    plan = program.plan(NORMED[0])
    norms = getattr(plan, direction)[number].norms
    norms[:1] = [program.RowNumbers(of, values)]
    with pytest.raises(ValueError, match=f"program: {message}"):
        made(plan)


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize(("direction", "op"), [("forward", "normalise"), ("backward", "normalise_gradient")])
def test_wrong_numbers_of_norms_are_refused(direction, op):
    plan = program.plan(NORMED[0])
    code = getattr(plan, direction)[1].code
    at = next(k for k, instruction in enumerate(code) if instruction.op == op)
    number = {"normalise": "b", "normalise_gradient": "c"}[op]
    code[at] = code[at]._replace(**{number: 2})
    with pytest.raises(ValueError, match=r"program: norm.*: expected less than 2, got 2"):
        made(plan)


# Of `everywhere`: places of three states before, after and direct, then of operands.
BEFORE = program.STATES
AFTER, DIRECT, OPERANDS = BEFORE + 3, BEFORE + 6, BEFORE + 9
NOWHERE = "value of a place: expected less than 0"
WRONG_CODE = {
    "constant": ("forward", "constant", 0, 200, "constant: expected less than .*, got 200"),
    "vector": ("forward", "vector", 0, 1, "vector: expected less than 1, got 1"),
    "row scalar": ("backward", "scalar", 0, 0, "row scalar: expected less than 0, got 0"),
    "place": ("forward", "load", 0, 200, "place: expected less than .*, got 200"),
    "mask": ("forward", "store", 0, program.DROPOUT, NOWHERE),
    "numbers of norms": ("forward", "load", 0, program.DROPOUT + 3, NOWHERE),
    "saved value": ("forward", "store", 0, program.SAVED, 200, "value of a place: .*, got 200"),
    "saved values": ("backward", "load", 0, program.SAVED, 0, 200, "value of a place: .*, got 200"),
    "registers": ("forward", "load", 254, BEFORE, 0, 1, "register: expected less than 255, got 255"),
    "what is saved": ("backward", "store", 0, program.SAVED, NOWHERE),
    "gradients": ("forward", "store", 0, program.GRADIENTS, NOWHERE),
    "sums": ("forward", "add_to", 0, program.SUMS, NOWHERE),
    "sums are not stored": ("backward", "store", 0, program.SUMS, NOWHERE),
    "state before": ("forward", "store", 0, BEFORE, NOWHERE),
    "new state": ("backward", "store", 0, AFTER, NOWHERE),
    "direct": ("backward", "store", 0, DIRECT, NOWHERE),
    "direct forward": ("forward", "store", 0, DIRECT + 1, NOWHERE),
    "operand": ("forward", "store", 0, OPERANDS, NOWHERE),
}


@pytest.mark.quick
@pytest.mark.mutation
@pytest.mark.parametrize("wrong", WRONG_CODE.values(), ids=WRONG_CODE)
def test_wrong_instructions_are_refused(wrong):
    plan = program.plan(everywhere)
    assert (plan.direct, plan.operands[0]) == ([False, True, True], 0)
    direction, op, *numbers, message = wrong
    getattr(plan, direction)[1].code.append(program.Instruction(op, *numbers))
    with pytest.raises(ValueError, match=f"program: {message}"):
        made(plan)


@pytest.mark.quick
@pytest.mark.mutation
def test_wrong_counts_are_refused():
    plan = program.plan(everywhere)
    for numbers, message in (
        ([-1, *plan.numbers()[1:]], "states: expected 1 to 16, got -1"),
        (plan.numbers()[:-1], "register: expected a number, got the end"),
        ([*plan.numbers(), 0], "end: expected no more numbers, got 1"),
    ):
        with pytest.raises(ValueError, match=f"program: {message}"):
            made(plan, numbers)
    count = sum(r.first[0] for r in plan.forward)
    plan.products[0] = plan.products[0]._replace(accumulator=count)
    with pytest.raises(ValueError, match=f"program: accumulator: expected less than {count}"):
        made(plan)
    plan.forward = [program.Round([0], [], [])]
    with pytest.raises(ValueError, match="program: accumulators: expected at least 1, got 0"):
        made(plan)


def test_vectors_are_biases_or_other_parameters():
    plan = program.plan(NORMED[0])
    for parameter, expected in ((1, "2 to 5, got 1"), (6, "2 to 5, got 6")):
        plan.vectors[0] = parameter, 0
        with pytest.raises(ValueError, match=f"program: parameter: expected {expected}"):
            made(plan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cell", [everywhere, norms, PROJECTED], ids=name)
def test_random_numbers_are_refused_or_do_no_harm(cell, seed):
    plan = program.plan(cell)
    numbers, rng = plan.numbers(), np.random.default_rng(seed)
    for _ in range(500):
        with pytest.raises(ValueError, match="program: "):
            made(plan, np.frombuffer(rng.bytes(4 * len(numbers)), np.int32))
        changed = np.array(numbers)
        some = rng.integers(0, len(numbers), 4)
        changed[some] = rng.integers(-1, 12, 4)
        run_plan(plan, changed)


@pytest.mark.quick
@pytest.mark.mutation
def test_plans_of_another_cell_or_with_masks_that_a_call_does_not_draw():
    cell = published.mgu
    p = problem(cell, 2, 1, 3, 4)
    packed = CPU.pack(cell, p.weights).core

    def forward(packed, plan, masks=None, save=1, scalars=(), x=p.x):
        return _core.forward(packed, plan, x, (), scalars, None, None, False, 0, masks, False, save)

    for plan, masks, message in (
        (machine.plan(published.janet), None, "cell: expected that of the packed weights"),
        (machine.plan(cell, True), (0.0, 0.5, 0.0, 1, 0), "cell: expected one without this mask"),
        (machine.plan(cell, False, ("h",)), None, "cell: expected one without this mask"),
        (machine.plan(cell, False, ("h",)), (0.5, 0.0, 0.0, 1, 0), "cell: expected one without this mask"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(packed, plan, masks)
    other = [program.plan(everywhere) for _ in range(3)]
    other[0].products[0] = other[0].products[0]._replace(weight=other[0].products[1].weight)
    other[1].operands[0] = 1
    other[2].start[2] = 3.0
    q = problem(everywhere, 2, 1, 3, 4)
    of_everywhere = CPU.pack(everywhere, q.weights).core
    for plan in map(made, other):
        with pytest.raises(ValueError, match="cell: expected that of the packed weights"):
            forward(of_everywhere, plan, x=q.x)
    with pytest.raises(ValueError, match="save: expected 0"):
        forward(packed, machine.plan(cell), save=3)
    with pytest.raises(TypeError, match="packed: expected what pack returned, got"):
        forward(1, machine.plan(cell))
    with pytest.raises(ValueError, match="scalars: expected 0 entries, got 1"):
        forward(packed, machine.plan(cell), scalars=(p.x,))


def test_numbers_of_another_kind():
    plan = program.plan(PEEPHOLE)
    numbers = np.array(plan.numbers())
    with pytest.raises(TypeError, match="numbers: expected int32"):
        _core.machine_plan(numbers, plan.start, plan.constants)
    with pytest.raises(ValueError, match="numbers: expected one axis"):
        _core.machine_plan(numbers[None].astype(np.int32), plan.start, plan.constants)
    with pytest.raises(TypeError, match="numbers: expected an array"):
        _core.machine_plan(plan.numbers(), plan.start, plan.constants)
