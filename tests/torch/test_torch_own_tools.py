"""``Recurrent`` and ``RecurrentCell`` in PyTorch's tools: compiled, exported, on the meta device, frozen."""

from __future__ import annotations

import shutil
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fusedrnn.torch as ft  # noqa: E402
from fusedrnn.cells import cell, lstm, tanh  # noqa: E402
from fusedrnn.torch import keys, ops  # noqa: E402
from own_layers import (  # noqa: E402
    LENGTHS,
    RESET,
    B,
    H,
    I,
    T,
    assert_same,
    flat,
    hx_of,
    large,
    made,
    scalars,
    states,
    three,
)
from published import gru_d, lstmp, mgu  # noqa: E402
from rewritten import REFUSED, WARNED, mgu_of  # noqa: E402

# What PyTorch itself warns of while it compiles is no concern of these tests.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("quiet_fallbacks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.parametrize("cell", [three, gru_d], ids=lambda c: c.name)
def test_opcheck(cell):
    weights = [torch.randn(s, dtype=torch.float64) for s in cell.shapes(I, H, H).values()]
    state0 = [torch.rand(B, H, dtype=torch.float64) for _ in cell.states]
    numbers = [torch.rand(T, B, dtype=torch.float64) for _ in cell.scalars]
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor(LENGTHS)
    rest = lengths, torch.as_tensor(RESET), torch.tensor(7), keys.key_of(cell), True, False, 2
    call = ops.Call(x, state0, weights, numbers, *rest, [0.5, 0.25, 0.0], 3)
    torch.library.opcheck(torch.ops.fusedrnn.recurrence.default, (*call, True, call.tape_rows()))
    found, n = ops.run(call, True, call.tape_rows()), call.results(True)
    upstream, need = [torch.randn_like(t) for t in found[:n]], [False] + [True] * (len(call.learned()) - 1)
    arguments = (*call, found[0], found[n:], upstream, need)
    torch.library.opcheck(torch.ops.fusedrnn.recurrence_backward.default, arguments)


NEEDS_COMPILER = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("cell", "backend"),
    [(mgu, "aot_eager"), (gru_d, "aot_eager"), pytest.param(three, "inductor", marks=NEEDS_COMPILER)],
)
def test_compiled_without_a_graph_break(cell, backend):
    torch._dynamo.reset()
    layer, x = made(cell, num_layers=2, bidirectional=True, batch_first=True)
    x = x.detach().transpose(0, 1).requires_grad_()
    given, state0 = scalars(cell, (B, T)), states(layer)
    options = {"lengths": torch.tensor(LENGTHS), "return_states": True, **given}
    expected = flat(layer(x, hx_of(state0), **options))
    path = layer.last_path
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = flat(compiled(x, hx_of(state0), **options))
    assert_same(found, expected, [x, *state0, *given.values(), *layer.parameters()])
    assert layer.last_path == path
    step = ft.RecurrentCell(cell, I, H, dtype=torch.float64)
    now = {name: s[:, 0] for name, s in given.items()}
    after = torch.compile(step, fullgraph=True, backend=backend)(x[:, 0], **now)
    assert_same(flat((after,)), flat((step(x[:, 0], **now),)), [x, *step.parameters()])


def test_a_cell_that_nothing_asked_before_is_compiled():
    """Python 3.11 derives under a lock, which no compiler enters."""

    @cell
    def fresh(p, x, h):
        return tanh(p.dense("n", x, h))

    torch._dynamo.reset()
    layer, x = made(fresh)
    y = torch.compile(layer, fullgraph=True, backend="eager")(x)[0]
    assert torch.equal(y, layer(x)[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_export_flop_counter_and_fx():
    layer, x = made(three)
    exported = torch.export.export(layer, (x.detach(),)).module()
    assert torch.equal(exported(x)[0], layer(x)[0])
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    forward, backward = 2 * T * B * (3 * H * I + 4 * H * H), 2 * T * B * 2 * (3 * H * I + 4 * H * H)
    assert list(counter.get_flop_counts()["Global"].values()) == [forward, backward]
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    assert torch.equal(traced(x)[0], layer(x)[0])


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("kind", "cell"), [(ft.Recurrent, mgu), (ft.Recurrent, lstm), (ft.RecurrentCell, mgu)]
)
def test_onnx_export_is_refused_in_one_line(kind, cell, dynamo):
    pytest.importorskip("onnxscript")
    model, x = torch.nn.Sequential(kind(cell, I, H)).eval(), torch.zeros(T, B, I)
    line = f"ONNX export knows no {kind.__name__}; it takes torch.nn's layers"
    for each in (model, model[0]):
        with pytest.raises(RuntimeError) as caught:
            torch.onnx.export(each, (x if kind is ft.Recurrent else x[0],), dynamo=dynamo, verbose=False)
        assert str(caught.value.__cause__ if dynamo else caught.value) == line
        assert line in str(caught.value)  # PyTorch's exporter tells what it tried, and ends with this


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (lstm, {"bidirectional": True, "recurrent_dropout": 0.1, "zoneout_c": 0.1}),
        (gru_d, {"num_layers": 2, "dropout": 0.1, "batch_first": True}),
        (lstmp, {"proj_size": 2}),
    ],
    ids=["lstm", "gru_d", "lstmp"],
)
def test_shapes_come_out_on_the_device_meta(cell, options):
    def shapes(device, x, given):
        layer = ft.Recurrent(cell, I, H, device=device, **options)
        given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        y, state = layer(x.to(device), **given)
        y = y if isinstance(y, torch.Tensor) else y.data
        y.sum().backward()
        results = flat((y, state, *(p.grad for p in layer.parameters())))
        assert {t.device.type for t in results} == {device}
        return [t.shape for t in results]

    rows, lengths = (2, 3), [3, 1]  # B, T
    rows = rows if options.get("batch_first") else rows[::-1]
    x, numbers = torch.zeros(*rows, I), {name: torch.ones(rows) for name in cell.scalars}
    packed = pack_padded_sequence(x, lengths, options.get("batch_first", False))
    for x_or_packed, given in (
        (x, numbers),
        (x, numbers | {"lengths": lengths, "reset": torch.zeros(rows)}),
        (x, numbers | {"lengths": torch.tensor(lengths)}),
        (packed, {name: torch.ones(sum(lengths)) for name in cell.scalars}),
    ):
        assert shapes("meta", x_or_packed, given) == shapes("cpu", x_or_packed, given)
    if not cell.projects:
        step = ft.RecurrentCell(cell, I, H, device="meta")
        now = {name: torch.ones(B, device="meta") for name in cell.scalars}
        assert {s.shape for s in flat((step(torch.zeros(B, I, device="meta"), **now),))} == {(B, H)}


def test_frozen_layers():
    layer, x = made(three, bidirectional=True)
    step = ft.RecurrentCell(mgu, I, H, dtype=torch.float64)
    model = torch.nn.ModuleList([layer, step]).eval()
    with torch.no_grad():
        expected = layer(x)[0], step(x[0])
        ft.freeze(model)
        assert torch.equal(layer(x)[0], expected[0])
        assert torch.equal(step(x[0]), expected[1])
        layer.decay_l0 += 1
        with pytest.raises(RuntimeError, match="decay_l0 was changed"):
            layer(x)
    ft.unfreeze(model)
    with pytest.raises(RuntimeError, match="the kernels cannot run it: cell: large"):
        ft.freeze(ft.Recurrent(large, I, H).eval())


# --- files of weights ---------------------------------------------------------------------------------------


def model_of(kind, change=""):
    return torch.nn.Sequential(kind(mgu_of(change), I, H))


def saved_by(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


kinds = pytest.mark.parametrize("kind", [ft.Recurrent, ft.RecurrentCell])


@kinds
@pytest.mark.parametrize("change", REFUSED)
def test_a_cell_with_other_gates_or_states_loads_no_state_dict(tmp_path, kind, change):
    state = saved_by(model_of(kind), tmp_path / "w.pt")
    model = model_of(kind, change)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"0: .*{REFUSED[change]}"):
        model.load_state_dict(state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    model.load_state_dict(dict(state))  # without PyTorch's metadata nothing is compared
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


@kinds
def test_a_cell_that_computes_something_else_loads_a_state_dict_with_a_warning(tmp_path, kind):
    state = saved_by(model_of(kind), tmp_path / "w.pt")
    for change in ("arithmetic", ""):  # the last is the same cell, defined again
        model = model_of(kind, change)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model.load_state_dict(state)
        assert [str(w.message) for w in found] == [WARNED] * bool(change)
        assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_state_dicts_have_no_new_keys():
    layer = ft.Recurrent(mgu_of(), I, H)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    for named in (ft.LSTM(I, H), ft.GRU(I, H), ft.RNN(I, H), ft.LSTMCell(I, H), ft.Recurrent(lstm, I, H)):
        assert named.state_dict()._metadata == {"": {"version": 1}}
