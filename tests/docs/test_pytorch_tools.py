"""docs/pytorch_tools.md and docs/pytorch.md are right: their code is executed, and what they say of a model
without the recipes is tested."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch

import fusedrnn.torch as ft

# What the tools and PyTorch warn of is no concern of these tests; a fallback is an error.
pytestmark = [
    pytest.mark.usefixtures("no_fallback"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, *SECTIONS = re.split(r"^## ", (DOCS / "pytorch_tools.md").read_text(), flags=re.MULTILINE)
# What a section needs besides PyTorch.
PACKAGES = {"Opacus": ["opacus"], "thop and fvcore": ["thop"], "ONNX": ["onnxscript", "onnxruntime"]}


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def need(package: str):
    return pytest.importorskip(package, reason=f"nox -s thirdparty installs {package}")


def run(path: Path, code: list[str]):
    """Runs blocks one after the other, as a module with a file: TorchScript reads it, pickle imports it."""
    path.write_text("\n".join(code))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh():
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def page(tmp_path):
    """The first example of docs/pytorch_tools.md."""
    yield run(tmp_path / "page.py", blocks(BEGIN))
    del sys.modules["page"]


@pytest.mark.parametrize("section", SECTIONS, ids=[text.partition("\n")[0] for text in SECTIONS])
def test_section_of_the_page(section, page, tmp_path):
    for package in PACKAGES.get(section.partition("\n")[0], []):
        need(package)
    assert blocks(section)
    run(tmp_path / "page.py", blocks(BEGIN + section))


def test_the_table_has_every_section():
    titles = [text.partition("\n")[0] for text in SECTIONS]
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert anchors == set(re.findall(r"\]\(#([^)]+)\)", BEGIN))


def test_the_page_of_the_layers():
    code = blocks((DOCS / "pytorch.md").read_text())
    assert code
    exec(compile("\n".join(code), "docs/pytorch.md", "exec"), {"__name__": "page"})


# --- what happens without the recipe ------------------------------------------------------------------------


def test_opacus_finds_nothing_wrong_and_fails_in_backward(page, monkeypatch):
    need("opacus")
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    monkeypatch.setattr(ft.paths, "_errors", False)
    model, x = page.model.train(), page.x
    assert ModuleValidator.validate(model) == []
    assert type(ModuleValidator.fix(model).rnn) is ft.LSTM
    with pytest.raises(TypeError):
        GradSampleModule(model)(x).sum().backward()
    assert "DPLSTM" in str(ModuleValidator.validate(ft.to_torch(model).model))
    others = torch.nn.ModuleList([torch.nn.GRU(2, 3), torch.nn.RNN(2, 3), torch.nn.LSTMCell(2, 3)])
    kinds = [type(layer).__name__ for layer in ModuleValidator.fix(others)]
    assert kinds == ["DPGRU", "RNN", "LSTMCell"]


def test_fvcore_has_no_formula_for_either(page, monkeypatch):
    need("fvcore")
    from fvcore.nn import FlopCountAnalysis

    monkeypatch.setattr(ft.paths, "_errors", False)
    for model in (page.model, ft.to_torch(copy.deepcopy(page.model)).model):
        found = FlopCountAnalysis(model, page.x)
        assert dict(found.by_module()) == {"": 80 * 32, "rnn": 0, "head": 80 * 32}
        assert dict(found.unsupported_ops()) == {"aten::lstm": 1}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_says_what_it_takes(page, monkeypatch):
    model, x = page.model, page.x
    with pytest.raises(RuntimeError, match="TorchScript"):
        torch.jit.script(copy.deepcopy(model))
    monkeypatch.setattr(ft.paths, "_errors", False)
    changed = copy.deepcopy(model)
    with pytest.warns(ft.FallbackWarning, match="TorchScript"):
        scripted = torch.jit.script(changed)
    assert type(changed.rnn) is torch.nn.LSTM
    assert torch.allclose(scripted(x), model(x), atol=1e-6)
    with pytest.warns(ft.FallbackWarning, match=r"torch\.jit traces"):
        traced = torch.jit.trace(model, x)
    assert type(model.rnn) is ft.LSTM
    assert torch.allclose(traced(x), model(x), atol=1e-6)

    class Derived(ft.LSTM):
        pass

    for layer in (Derived(2, 3), ft.LSTM(2, 3, layer_norm=True), ft.LSTM(2, 3, zoneout_h=0.1)):
        with pytest.raises((RuntimeError, ValueError)):
            torch.jit.script(torch.nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="frozen"):
        torch.jit.script(ft.freeze(model))


ONLY_OURS = {"layer norm": {"layer_norm": True}, "zoneout": {"zoneout_h": 0.1}, "lengths": {}}


@pytest.mark.parametrize("options", ONLY_OURS.values(), ids=ONLY_OURS)
def test_onnx_has_nothing_that_torch_nn_lacks(options):
    need("onnxscript")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = ft.LSTM(3, 4, **options)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=None if options else lengths)

    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(
            Model().eval(), (torch.randn(5, 2, 3), torch.tensor([5, 1])), dynamo=True, verbose=False
        )


def test_the_compiler_leaves_the_layers_alone_as_it_does_pytorchs(page):
    """The function that calls one is not compiled; what that calls is."""
    from torch._dynamo.testing import CompileCounterWithBackend

    class Head(torch.nn.Module):
        def forward(self, y):
            return torch.relu(2 * y)

    model, x, frames = page.model, page.x, []
    model.head = Head()
    for each in (model, ft.to_torch(copy.deepcopy(model)).model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        assert torch.allclose(torch.compile(each, backend=counter)(x), model(x), atol=1e-6)
        frames.append((counter.frame_count, counter.op_count))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
            torch.compile(each, fullgraph=True, backend="eager")(x)
    assert frames == [(1, 2), (1, 2)]


# --- what docs/pytorch.md says ------------------------------------------------------------------------------


def test_an_output_that_is_changed_in_place_names_the_cure():
    layer = ft.LSTM(3, 4)
    y, _ = layer(torch.randn(5, 2, 3))
    torch.relu_(y)
    with pytest.raises(RuntimeError, match=r"torch\.relu for torch\.relu_, or clone"):
        y.sum().backward()


@torch.no_grad()
def test_what_a_frozen_layer_notices_and_what_not():
    layer, x = ft.LSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(RuntimeError, match="eval"):
        ft.freeze(layer)
    ft.freeze(layer.eval())
    before, _ = layer(x)
    refused = (
        layer.train,
        lambda: layer.load_state_dict(layer.state_dict()),
        lambda: layer.to(torch.float64),
        torch.enable_grad()(lambda: layer(x)),
        lambda: layer(x.double()),
        lambda: ft.to_torch(layer),
    )
    for call in refused:
        with pytest.raises(RuntimeError):
            call()
    copy.deepcopy(layer).train()
    layer.weight_hh_l0.data.mul_(2)
    assert torch.equal(layer(x)[0], before)
    layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="was changed"):
        layer(x)
    ft.unfreeze(layer)
    assert not torch.equal(layer(x)[0], before)
    layer.requires_grad_(False)
    ft.freeze(layer)
    assert not torch.enable_grad()(lambda: layer(x))()[0].requires_grad
    with pytest.raises(RuntimeError):
        torch.enable_grad()(lambda: layer(x.clone().requires_grad_()))()


def test_batched_gradients_run_the_kernels():
    layer, x = ft.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    y, _ = layer(x)
    upstream = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in upstream]
    assert torch.allclose(together, torch.stack(single))
    assert layer.last_path == "fused"


def test_saved_are_the_tensors_that_the_page_names():
    def saved(**options):
        found = []
        layer = ft.LSTM(3, 4, **options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            y, _ = layer(x, lengths=lengths)
        y.sum().backward()
        return [tuple(t.shape) for t in found]

    x, lengths = torch.randn(50, 2, 3), torch.tensor([50, 7])
    matrices, biases = [(16, 3), (16, 4)], [(16,), (16,)]
    *first, tape = saved()
    assert first == [(50, 2, 3), *matrices, (2,), (50, 2, 4)]
    assert tape[0] == 57  # of the valid steps alone
    assert saved(recompute=True)[:-1] == [(50, 2, 3), *matrices, *biases, (2,), (50, 2, 4)]
    assert torch.Size(saved(recompute=True)[-1]).numel() < torch.Size(tape).numel()
