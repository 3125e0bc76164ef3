"""ONNX's own node cases for LSTM, GRU and RNN, and small random models beside ONNX Runtime.

The adapter reads a node with its inputs as an ONNX backend would and runs ``fusedrnn.kernels``.
docs/third_party.md says what is covered.
"""

from __future__ import annotations

import functools
import importlib
import itertools

import numpy as np
import pytest

from fusedrnn.bench.libraries import TOLERANCE
from fusedrnn.bench.peer_onnx import GATES, IR, OPSET
from fusedrnn.cells import gru, lstm, rnn
from fusedrnn.cells.zoo import peephole_lstm
from fusedrnn.kernels import forward

onnx = pytest.importorskip("onnx")
BACKENDS = ("cpu", "reference")

# --- the adapter ------------------------------------------------------------------------------------------

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
REVERSE = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


def cell_of(op, attributes, peepholes):
    """The cell that a node asks for; NotImplementedError where we have none."""
    directions = len(REVERSE[attributes.get("direction", "forward")])
    for name, usual in (("clip", None), ("input_forget", 0)):
        if attributes.get(name, usual) != usual:
            raise NotImplementedError(name)
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[op]
    activations = attributes.get("activations", usual * directions)
    if op == "RNN" and activations == ["Relu"] * directions:
        return rnn.with_options(relu=True)
    if activations != usual * directions:
        raise NotImplementedError(f"activations {activations}")
    if op == "GRU":
        return gru.with_options(reset_after=bool(attributes.get("linear_before_reset", 0)))
    return {"LSTM": peephole_lstm if peepholes else lstm, "RNN": rnn}[op]


def from_onnx(cell, rows):
    """Rows (G*H, ...) in our order of gates."""
    order = GATES["lstm" if cell is peephole_lstm else cell.name]
    blocks = rows.reshape(cell.blocks["weight_ih"], -1, *rows.shape[1:])
    return np.ascontiguousarray(blocks[np.argsort(order)].reshape(rows.shape))


def run(node, arrays, backend):
    """What a recurrent node computes: Y, Y_h and for the LSTM Y_c, as its attributes lay them out.

    Args:
        node: The ONNX node.
        arrays: Its inputs, by the names of the ONNX operator.
        backend: Name of the backend.
    """
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {
        k: v.decode() if isinstance(v, bytes) else [s.decode() for s in v] if k == "activations" else v
        for k, v in attributes.items()
    }
    cell = cell_of(node.op_type, attributes, "P" in arrays)
    batch_first = attributes.get("layout", 0) == 1
    x = arrays["X"].swapaxes(0, 1) if batch_first else arrays["X"]
    states = [arrays[k].swapaxes(0, 1) if batch_first else arrays[k] for k in INPUTS[5:7] if k in arrays]
    lengths = arrays["sequence_lens"].astype(np.int64) if "sequence_lens" in arrays else None
    found = []
    for d, reverse in enumerate(REVERSE[attributes.get("direction", "forward")]):
        given = {"weight_ih": arrays["W"][d], "weight_hh": arrays["R"][d]}
        if "B" in arrays:
            given["bias_ih"], given["bias_hh"] = np.split(arrays["B"][d], 2)
        weights = {n: from_onnx(cell, w) for n, w in given.items()}
        if "P" in arrays:
            weights |= zip(("pi", "po", "pf"), np.split(arrays["P"][d], 3), strict=True)
        begin = tuple(np.ascontiguousarray(s[d]) for s in states) or None
        out = forward(cell, x, weights, begin, lengths=lengths, reverse=reverse, save=None, backend=backend)
        found.append((out.y, *out.stateT))
    y, *finals = (np.stack(a) for a in zip(*found, strict=True))
    if batch_first:
        return [y.transpose(2, 1, 0, 3), *(s.swapaxes(0, 1) for s in finals)]
    return [y.swapaxes(0, 1), *finals]


# --- the node cases of the onnx package -------------------------------------------------------------------

CASES = {
    "LSTM": ("defaults", "with_initial_bias", "with_peepholes", "batchwise", "reverse", "bidirectional"),
    "GRU": ("defaults", "with_initial_bias", "seq_length", "batchwise", "reverse", "bidirectional"),
    "RNN": ("defaults", "with_initial_bias", "seq_length", "batchwise", "reverse", "bidirectional"),
}


def name_of(op, case):
    prefix = "simple_rnn" if op == "RNN" and case != "seq_length" else op.lower()
    return f"test_{prefix}_{case}"


@functools.cache
def collected():
    """Every recurrent node case of the installed package, by name."""
    from onnx.backend.test.case import node

    for op in CASES:  # ``collect_testcases`` computes those of every operator, which takes ten seconds
        importlib.import_module(f"{node.__name__}.{op.lower()}")
    cases = node._NodeTestCases
    return {
        case.name: case
        for case in cases
        if case.model is not None
        and [n.op_type for n in case.model.graph.node] in (["LSTM"], ["GRU"], ["RNN"])
    }


def arrays_of(node, values):
    given = iter(values)
    return {slot: np.asarray(next(given)) for slot, name in zip(INPUTS, node.input, strict=False) if name}


def test_no_case_is_left_out():
    """18 in onnx 1.23; what a later package adds belongs on the list above."""
    assert set(collected()) <= {name_of(op, case) for op, names in CASES.items() for case in names}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name_of(op, case) for op, names in CASES.items() for case in names])
def test_node_case(name, backend):
    if name not in collected():
        pytest.skip(f"onnx {onnx.__version__} has no {name}")
    case = collected()[name]
    (node,) = case.model.graph.node
    for inputs, outputs in case.data_sets:
        results = run(node, arrays_of(node, inputs), backend)
        found = [a for a, output in zip(results, node.output, strict=False) if output]
        assert len(found) == len(outputs)
        for a, expected in zip(found, outputs, strict=True):
            assert a.shape == expected.shape
            np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)  # the case itself asks for 1e-3


def test_the_case_that_tells_the_two_gru_apart_does():
    """``test_gru_seq_length`` with the reset after the product gives another result: the check can fail."""
    case = collected()["test_gru_seq_length"]
    node = onnx.NodeProto.FromString(case.model.graph.node[0].SerializeToString())
    node.attribute.append(onnx.helper.make_attribute("linear_before_reset", 1))
    ((inputs, (expected,)),) = case.data_sets
    found = run(node, arrays_of(node, inputs), "reference")[1]
    assert np.abs(found - expected).max() > 1e-3


# --- beside ONNX Runtime ----------------------------------------------------------------------------------

KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM with peepholes": ("LSTM", {}),
    "GRU reset before": ("GRU", {"linear_before_reset": 0}),
    "GRU reset after": ("GRU", {"linear_before_reset": 1}),
    "RNN tanh": ("RNN", {"activations": ["Tanh"]}),
    "RNN relu": ("RNN", {"activations": ["Relu"]}),
}


def random_model(op, attributes, direction, ragged, begins, peepholes, sizes, seed):
    """A model of one node, and its inputs by name."""
    T, B, I, H = sizes
    D, G = len(REVERSE[direction]), {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.uniform(-1, 1, shape).astype(np.float32)

    arrays = {"X": draw(T, B, I), "W": draw(D, G * H, I) / 2, "R": draw(D, G * H, H) / 2}
    arrays["B"] = draw(D, 2 * G * H)
    if ragged:
        arrays["sequence_lens"] = rng.permutation(np.linspace(1, T, B).astype(np.int32))
    if begins:
        arrays |= {k: draw(D, B, H) for k in INPUTS[5 : 7 if op == "LSTM" else 6]}
    if peepholes:
        arrays["P"] = draw(D, 3 * H)
    attributes = {"hidden_size": H, "direction": direction} | attributes
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * D
    make = onnx.helper
    slots = INPUTS[: 8 if op == "LSTM" else 6]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    node = make.make_node(op, [k if k in arrays else "" for k in slots], outputs, **attributes)
    kinds = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int32): onnx.TensorProto.INT32}
    graph = make.make_graph(
        [node],
        "case",
        [make.make_tensor_value_info(k, kinds[a.dtype], a.shape) for k, a in arrays.items()],
        [
            make.make_tensor_value_info(k, onnx.TensorProto.FLOAT, [T, D, B, H] if k == "Y" else [D, B, H])
            for k in outputs
        ],
    )
    return make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR), arrays


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("begins", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("direction", REVERSE)
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_agrees(kind, direction, ragged, begins, backend):
    ort = pytest.importorskip("onnxruntime")
    op, attributes = KINDS[kind]
    for seed, sizes in itertools.product(range(2), ((7, 5, 3, 11), (1, 3, 4, 8), (23, 2, 16, 33))):
        peepholes = kind == "LSTM with peepholes"
        model, arrays = random_model(op, attributes, direction, ragged, begins, peepholes, sizes, seed)
        onnx.checker.check_model(model)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = session.run(None, arrays)
        found = run(model.graph.node[0], arrays, backend)
        for a, e in zip(found, expected, strict=True):
            assert a.shape == e.shape
            np.testing.assert_allclose(a, e, rtol=0, atol=TOLERANCE["float32"] * np.abs(e).max())
