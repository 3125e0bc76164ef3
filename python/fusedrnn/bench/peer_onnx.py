"""ONNX Runtime, forward only: a model of one node per layer, its weights initialisers, so that it packs them
once when the session is made.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fusedrnn.backends.protocol import Array, Weights
from fusedrnn.bench.libraries import Results, named, not_installed
from fusedrnn.cells import Cell
from fusedrnn.problems import Case, Data

GATES = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}  # ONNX: i o f c; z r h
OPSET, IR = 17, 9  # old enough for every ONNX Runtime that is around


def reorder(cell: Cell, rows: Array) -> Array:
    """Rows (G*H, ...) in ONNX's order of gates."""
    blocks = rows.reshape(cell.blocks["weight_ih"], -1, *rows.shape[1:])
    return blocks[GATES[cell.name]].reshape(rows.shape)


def initialisers(cell: Cell, directions: tuple[Weights, ...]) -> tuple[Array, Array, Array]:
    """W (D, G*H, I), R (D, G*H, H) and B (D, 2*G*H) of one layer."""
    biases = [
        [
            reorder(cell, w[b]) if b in w else np.zeros(len(w["weight_ih"]), w["weight_ih"].dtype)
            for b in ("bias_ih", "bias_hh")
        ]
        for w in directions
    ]
    return (
        np.stack([reorder(cell, w["weight_ih"]) for w in directions]),
        np.stack([reorder(cell, w["weight_hh"]) for w in directions]),
        np.stack([np.concatenate(pair) for pair in biases]),
    )


def model(data: Data) -> bytes:
    """The case as an ONNX model: inputs X, lengths, h, c; outputs y and the final states of each layer."""
    onnx: Any = importlib.import_module("onnx")
    importlib.import_module("onnx.helper")
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    case, D = data.case, data.case.directions
    T, B, I, H = case.shape
    attributes: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if case.bidirectional else "forward",
    }
    if case.cell.name == "gru":
        attributes["linear_before_reset"] = int(case.cell.options["reset_after"])
    if case.cell.name == "rnn":
        attributes["activations"] = ["Relu" if case.cell.options["relu"] else "Tanh"] * D
    inputs = [make.make_tensor_value_info("X", float32, [T, B, I])]
    merged = onnx.numpy_helper.from_array(np.array([0, 0, -1], np.int64), "merged")
    constants = [merged] if case.layers > 1 or D > 1 else []
    nodes, outputs = [], []
    if data.lengths is not None:
        inputs.append(make.make_tensor_value_info("lengths", onnx.TensorProto.INT32, [B]))
    if data.state0 is not None:
        inputs += [make.make_tensor_value_info(k, float32, [D, B, H]) for k in case.cell.states]
    x = "X"
    for layer in range(case.layers):
        names = [f"{name}{layer}" for name in "WRB"]
        values = initialisers(case.cell, data.weights[layer * D : layer * D + D])
        constants += [onnx.numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True)]
        operands = [x, *names, "lengths" if data.lengths is not None else ""]
        operands += case.cell.states if data.state0 is not None else []
        states = [f"{state}_after{layer}" for state in case.cell.states]
        nodes.append(make.make_node(case.cell.name.upper(), operands, [f"y{layer}", *states], **attributes))
        outputs += [make.make_tensor_value_info(state, float32, [D, B, H]) for state in states]
        x = f"y{layer}"
        if layer + 1 < case.layers or D > 1:  # (T, D, B, H) -> (T, B, D*H)
            nodes.append(make.make_node("Transpose", [x], [f"{x}_turned"], perm=[0, 2, 1, 3]))
            nodes.append(make.make_node("Reshape", [f"{x}_turned", "merged"], [f"{x}_merged"]))
            x = f"{x}_merged"
    outputs.insert(0, make.make_tensor_value_info(x, float32, None))
    graph = make.make_graph(nodes, "case", inputs, outputs, constants)
    made = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
    return bytes(made.SerializeToString())


class OnnxRuntime:
    """An inference session with as many threads as everybody."""

    path = "CPU execution provider, weights packed with the session"

    def __init__(self, data: Data, threads: int) -> None:
        ort: Any = importlib.import_module("onnxruntime")
        self.data = data
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(model(data), options, providers=["CPUExecutionProvider"])
        self.inputs = {"X": data.x}
        if data.lengths is not None:
            self.inputs["lengths"] = data.lengths.astype(np.int32)
        if data.state0 is not None:
            self.inputs |= dict(zip(data.case.cell.states, data.state0, strict=True))

    @classmethod
    def missing(cls) -> str | None:
        return not_installed("ONNX Runtime", "onnx", "onnxruntime")

    @classmethod
    def refuses(cls, case: Case, dtype: str) -> str | None:
        if case.kind in ("training", "update"):
            return "it runs forward only"
        if case.resets:
            return "it knows no resets"
        if case.kind == "step" and case.layers > 1:
            return "initial states are given to one layer only"
        return None if dtype == "float32" else "its recurrent layers are float32 only"

    def __call__(self) -> Any:
        return self.session.run(None, self.inputs)

    def results(self) -> Results:
        y, *states = self()
        count = len(self.data.case.cell.states)
        return named(self.data, y, [np.concatenate(states[k::count]) for k in range(count)])
