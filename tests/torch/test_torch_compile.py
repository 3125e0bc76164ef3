"""torch.compile: models compiled without a graph break, and exported ones."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch")
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fusedrnn.torch as ours
from bfloat16 import needs_bfloat16
from fusedrnn.torch import compilable
from interpreter import python

# What PyTorch itself warns of while it compiles is no concern of these tests.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.usefixtures("compiles_anew"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),  # on Python 3.13.0
]

LAYERS = {
    "LSTM": (compilable.LSTM, {}),
    "GRU": (compilable.GRU, {}),
    "RNN_TANH": (compilable.RNN, {}),
    "RNN_RELU": (compilable.RNN, {"nonlinearity": "relu"}),
}
# Each compiles for seconds, and relu is the same layer as tanh.
compiled_layers = pytest.mark.parametrize(
    "mode", [*list(LAYERS)[:3], pytest.param("RNN_RELU", marks=pytest.mark.slow)]
)
T, B, I, H = 5, 3, 2, 4

COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
INDUCTOR = pytest.param(  # compiles C++ for seconds
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")]
)
BACKENDS = ["aot_eager", INDUCTOR]


@pytest.fixture
def allow_rnn():
    before, torch._dynamo.config.allow_rnn = torch._dynamo.config.allow_rnn, True
    yield
    torch._dynamo.config.allow_rnn = before


COLD = """
import torch, fusedrnn.torch as ft
from fusedrnn.torch import compilable
from interpreter import python
for layer in (ft.GRUCell(5, 7), compilable.LSTM(5, 7)):
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(3, 5))
"""


def test_an_import_leaves_the_compiler_out():
    """It takes a second to import."""
    there = "print('torch._dynamo' in sys.modules)"
    before, after = python(f"import sys, torch; {there}; import fusedrnn.torch; {there}").split()
    assert before == after


def test_the_first_call_of_a_process_compiles():
    """Nothing about the cell was asked for before."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COLD], check=True)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_one_tensor_in_two_places(kind):
    layer = getattr(ours, kind)(H, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, z = torch.randn(B, H, requires_grad=True), torch.zeros(B, H)
    for given in ((x, (z, z)), (x, (x, x))) if kind == "LSTMCell" else ((x, x),):
        grads = []
        for each in (layer, compiled):
            result = each(*given)
            grads.append(torch.autograd.grad(sum(t.square().sum() for t in result), [x, *layer.parameters()]))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def breaks(model, *args, **options) -> int:
    return torch._dynamo.explain(model)(*args, **options).graph_break_count


# --- the layers ---------------------------------------------------------------------------------------------


class Tagger(torch.nn.Module):
    """Something around the layer, for the compiler to work on."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed = torch.nn.Linear(I, I)
        self.rnn = kind(I, H, **options)
        self.head = torch.nn.Linear(H * (2 if self.rnn.bidirectional else 1), 1)

    def forward(self, x, hx=None):
        y, end = self.rnn(torch.tanh(self.embed(x)), hx)
        return self.head(y).relu(), end


def same(model, compiled, x, *args):
    """Outputs and gradients, eager and compiled."""
    results = []
    for f in (model, compiled):
        model.zero_grad()
        given = x.clone().requires_grad_()
        y, end = f(given, *args)
        end = end if isinstance(end, tuple) else (end,)
        (y.sum() + sum((s * s).sum() for s in end)).backward()
        results.append([y, *end, given.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@compiled_layers
def test_compiled_equals_eager(mode, backend):
    kind, options = LAYERS[mode]
    model = Tagger(kind, num_layers=2, bidirectional=True, batch_first=True, **options)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same(model, compiled, torch.randn(B, T, I))
    same(model.double(), compiled, torch.randn(B, T, I).double())
    assert model.rnn.last_path == "fused"


@needs_bfloat16
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"proj_size": 3}], ids=str)
def test_bfloat16(options):
    """The bits of an eager call, with one graph."""
    model = compilable.LSTM(I, H, bidirectional=True, dtype=torch.bfloat16, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for f in (model, compiled):
        x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y, (h, c) = f(x, lengths=torch.tensor([T, 0, 3]))
        grads = torch.autograd.grad([y, h, c], [x, *model.parameters()], [y + 1, h - 1, c * 2])
        results.append([y, h, c, *grads])
    assert all(a.dtype is torch.bfloat16 and torch.equal(a, b) for a, b in zip(*results, strict=True))


@compiled_layers
def test_no_graph_break(mode):
    kind, options = LAYERS[mode]
    model = Tagger(kind, **options)
    assert breaks(model, torch.randn(T, B, I)) == 0
    state = torch.randn(1, B, H)
    assert breaks(model, torch.randn(T, B, I), (state, state) if mode == "LSTM" else state) == 0
    state = state[:, 0]
    assert breaks(model, torch.randn(T, I), (state, state) if mode == "LSTM" else state) == 0
    with torch.no_grad():
        assert breaks(model, torch.randn(T, B, I)) == 0


@compiled_layers
def test_state_frozen_weights_and_no_bias(mode):
    kind, options = LAYERS[mode]
    model = Tagger(kind, bias=False, **options)
    model.embed.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    model.rnn.weight_ih_l0.requires_grad_(False)
    for f in (model, compiled):
        model.zero_grad()
        state = [torch.ones(1, B, H, requires_grad=True) for _ in range(2 if mode == "LSTM" else 1)]
        f(torch.ones(T, B, I), tuple(state) if mode == "LSTM" else state[0])[0].sum().backward()
        assert model.rnn.weight_ih_l0.grad is None
        grads.append([model.rnn.weight_hh_l0.grad.clone(), *(s.grad for s in state)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_steps(backend):
    """Adam, a carried and detached state: the same losses."""
    losses = []
    first = Tagger(compilable.LSTM)
    x, target = torch.randn(4, T, B, I), torch.rand(T, B, 1)
    for compiling in (False, True):
        model = copy.deepcopy(first)
        step = torch.compile(model, fullgraph=True, backend=backend) if compiling else model
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        state, found = tuple(torch.zeros(1, B, H) for _ in range(2)), []
        for batch in x.repeat(3, 1, 1, 1):
            y, state = step(batch, tuple(s.detach() for s in state))
            loss = torch.nn.functional.mse_loss(y, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_detach_every_with_dynamic_shapes():
    """Compiled anew for another number of steps, not for another sequence."""
    model = compilable.LSTM(I, H)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for t, every in ((5, 2), (9, 2), (9, 3)):
        x = torch.randn(t, B, I)
        grads = []
        for f in (model, compiled):
            model.zero_grad()
            f(x, detach_every=every)[0].sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_dynamic_shapes(mode, backend):
    """One graph for every T and B; sizes alike to inductor, which tells small ones apart."""
    model = Tagger(LAYERS[mode][0])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for t, b in ((5, 7), (12, 3), (9, 4)):
        same(model, compiled, torch.randn(t, b, I))
    assert counter.frame_count == 1


def test_compiled_on_another_backend(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", "reference")
    layer, x = compilable.LSTM(I, H), torch.randn(T, B, I)
    grads = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        call(x)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_lengths_reset_detach_every_and_states():
    for name, kind in (("LSTM", compilable.LSTM), ("GRU", compilable.GRU)):
        model = kind(I, H, num_layers=2, bidirectional=True, batch_first=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x, lengths, reset = torch.randn(B, T, I), torch.tensor([T, 2, 0]), torch.rand(B, T) < 0.3
        every = {"lengths": lengths, "reset": reset, "detach_every": 2}
        single = ({"lengths": lengths}, {"reset": reset.float()}, {"detach_every": 2})
        for options in (*(single if name == "LSTM" else ()), every):
            results = []
            for f in (model, compiled):
                model.zero_grad()
                y, end, states = f(x, return_states=True, **options)
                flat = [y, *(end if name == "LSTM" else (end,)), *(states if name == "LSTM" else (states,))]
                sum((t * t).sum() for t in flat).backward()
                results.append([*flat, *(p.grad.clone() for p in model.parameters())])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_dropout_and_recompute():
    model = compilable.GRU(I, H, num_layers=2, dropout=0.5, recompute=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I)
    compiled(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(1)
    a = model(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x)[0], a)
    model.eval()
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_what_is_wrong_is_said():
    model = compilable.LSTM(I, H)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(T, B, I)
    with pytest.raises(ValueError, match="lengths"):
        compiled(x, lengths=torch.tensor([T, T + 1, 0]))
    with pytest.raises(ValueError, match="lengths"):
        compiled(x, lengths=torch.tensor([T]))
    with pytest.raises(TypeError, match="lengths"):
        compiled(x, lengths=torch.ones(B))
    with pytest.raises(ValueError, match="reset"):
        compiled(x, reset=torch.full((T, B), 2))
    with pytest.raises(ValueError, match="reset"):
        compiled(x, reset=torch.ones(B, T + 1))
    with pytest.raises(TypeError, match="detach_every"):
        compiled(x, detach_every=2.0)
    with pytest.raises(ValueError, match="detach_every"):
        compiled(x, detach_every=0)
    with pytest.raises(RuntimeError, match="input"):
        compiled(torch.randn(T, B, I + 1))
    with pytest.raises(RuntimeError, match="hidden"):
        compiled(x, (torch.zeros(1, B, H + 1), torch.zeros(1, B, H + 1)))


def test_what_the_kernels_cannot_take_breaks_the_graph():
    model = compilable.LSTM(I, H).half()
    x = torch.randn(T, B, I).half()
    y = torch.compile(model, backend="aot_eager")(x)[0]
    assert model.last_path == "fallback: the dtype is torch.float16"
    torch.testing.assert_close(y, model(x)[0])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM does not compile here: the dtype"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    model.float()
    packed = torch.nn.utils.rnn.pack_padded_sequence(x.float(), [T, 2, 1])
    data = torch.compile(model, backend="aot_eager")(packed)[0].data
    assert model.last_path == "fused"
    torch.testing.assert_close(data, model(packed)[0].data)


def test_a_second_derivative_of_a_compiled_model_is_an_error():
    """PyTorch's own: compiled models have none."""
    compiled = torch.compile(compilable.GRU(I, H), fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()
    eager = compilable.GRU(I, H)
    (dx,) = torch.autograd.grad(eager(x)[0].sum(), x, create_graph=True)
    dx.sum().backward()


@pytest.mark.parametrize("kind", [ours.LSTMCell, ours.GRUCell, ours.RNNCell], ids=lambda kind: kind.__name__)
def test_cells(kind):
    model = kind(I, H)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(B, I), torch.randn(I)):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x, model(x)), model(x, model(x)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_the_subclass_with_the_switch(name, allow_rnn):
    model = Tagger(getattr(ours, name))
    assert breaks(model, torch.randn(T, B, I)) == 0
    same(model, torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(T, B, I))


def test_the_subclass_without_the_switch_still_runs():
    model = Tagger(ours.LSTM)
    same(model, torch.compile(model, backend="aot_eager"), torch.randn(T, B, I))
    assert model.rnn.last_path == "fused"


# --- as modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LAYERS)
def test_the_base_of_torch(mode):
    """Parameters, initial values, state_dict, repr, and both implementations' results."""
    kind, options = LAYERS[mode]
    theirs = getattr(torch.nn, kind.__name__)
    for args in ((I, H), (I, H, 2), (I, H, 1, "relu") if "RNN" in mode else (I, H, 1, False)):
        given = {} if len(args) > 3 else {"bidirectional": True, **options}
        torch.manual_seed(3)
        own = kind(*args, **given)
        torch.manual_seed(3)
        other = theirs(*args, **given)
        assert repr(own) == repr(other)
        assert list(own.state_dict()) == list(other.state_dict())
        for a, b in zip(own.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        x = torch.randn(T, B, I)
        torch.testing.assert_close(own(x), other(x))
        with ours.fallback():
            torch.testing.assert_close(own(x), other(x), rtol=0, atol=0)
        own.load_state_dict(other.state_dict())
        assert not isinstance(own, theirs)
        assert isinstance(own, torch.nn.RNNBase)
        torch.testing.assert_close(copy.deepcopy(own)(x), other(x))
    if kind is not compilable.LSTM:
        with pytest.raises(ValueError, match="proj_size"):
            kind(I, H, proj_size=2)
    with pytest.raises(ValueError, match="num_layers"):
        kind(I, H, 0)


def test_convert_to_compilable_and_back():
    model = torch.nn.ModuleDict({"a": torch.nn.LSTM(I, H), "b": ours.GRU(I, H), "c": torch.nn.GRUCell(I, H)})
    kinds = ours.convert(model, compilable=True).converted
    assert set(kinds) == {"a", "b", "c"}
    assert type(model["a"]) is compilable.LSTM
    assert type(model["b"]) is compilable.GRU
    assert type(model["c"]) is ours.GRUCell
    assert not ours.convert(model, compilable=True).converted
    assert not ours.convert(model).converted
    assert breaks(model["a"], torch.randn(T, B, I)) == 0
    ours.to_torch(model)
    assert type(model["a"]) is torch.nn.LSTM
    model["a"](torch.randn(T, B, I))


# --- torch.export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict, tmp_path):
    """With T and B left open, saved and loaded."""
    model = Tagger(compilable.LSTM).eval()
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    x = torch.randn(T, B, I)
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for given in (x, torch.randn(9, 2, I)):
        torch.testing.assert_close(loaded(given), model(given))


def test_export_of_what_the_kernels_cannot_take_says_so():
    model = compilable.LSTM(I, H).half()
    with pytest.raises(RuntimeError, match="does not compile here: the dtype"):
        torch.export.export(model, (torch.randn(T, B, I).half(),), strict=False)


def test_the_page():
    """docs/compile.md is right."""
    page = (Path(__file__).parents[2] / "docs" / "compile.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/compile.md", "exec"), {"__name__": "page"})
