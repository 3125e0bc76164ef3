"""PyTorch's own samples for its recurrent layers (ModuleInfo), on ours.

The samples, their references and their errors come from ``torch.testing._internal.common_modules``; the
checks are the generic ones of PyTorch's ``test/test_modules.py``, written anew and named alike. Those that
need an accelerator, and ``test_check_inplace``, which has no recurrent layer to check, are left out.
docs/third_party.md explains each deviation.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="PyTorch's test helpers need expecttest")

with warnings.catch_warnings():  # PyTorch's own, while it imports
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

# The import above forbids plain assignment to torch.backends' flags, in PyTorch's own tests only.
torch.backends.__dict__["__allow_nonbracketed_mutation_flag"] = True

from fusedrnn.torch.convert import REPLACEMENTS  # noqa: E402

INFOS = [info for info in module_db if info.module_cls in REPLACEMENTS]
DTYPES = (torch.float32, torch.float64)
# What is left of rounding between two orders of summation; PyTorch's own checks allow 1e-5 in both dtypes.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}


# PyTorch says of an LSTM with projections that it leaves oneDNN.
pytestmark = [
    pytest.mark.usefixtures("openmp_pool"),
    pytest.mark.filterwarnings("ignore::fusedrnn.torch.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def entries(dtypes=DTYPES, every=False):
    """Each module with each dtype, and both modes where they may differ: as PyTorch's ``@modules`` does.

    Both dtypes in both modes are slow, unless ``every`` says otherwise.
    """
    return pytest.mark.parametrize(
        ("info", "dtype", "training"),
        [
            pytest.param(
                info,
                d,
                training,
                id=f"{info.name}-{str(d)[6:]}-{'train' if training else 'eval'}",
                marks=[] if every or usual else pytest.mark.slow,
            )
            for info in INFOS
            for d in dtypes
            for training in ((True, False) if info.train_and_eval_differ else (True,))
            for usual in [not info.train_and_eval_differ or training == (d is torch.float32)]
        ],
    )


def samples(info, dtype, training, requires_grad=False, **options):
    """Our layer, its inputs, and the sample it was made from."""
    torch.manual_seed(0)
    for number, sample in enumerate(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **options
        )
    ):
        torch.manual_seed(number)
        layer = make(REPLACEMENTS[info.module_cls], sample, dtype, training)
        yield layer, sample.forward_input.args, sample


def make(kind, sample, dtype, training):
    arguments = sample.constructor_input
    return kind(*arguments.args, **arguments.kwargs).to(dtype).train(training)


def tensors(tree):
    """The tensors with values in an input or output, however nested."""
    if isinstance(tree, torch.nn.utils.rnn.PackedSequence):
        return [tree.data]
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for branch in tree or () for t in tensors(branch)]


def same(found, expected, dtype):
    torch.testing.assert_close(tensors(found), tensors(expected), **TOLERANCE[dtype])


def rebuilt(args, change):
    """The inputs with ``change`` applied to each tensor."""
    if isinstance(args, torch.Tensor):
        return change(args)
    if isinstance(args, torch.nn.utils.rnn.PackedSequence):
        return args._replace(data=change(args.data))
    return tuple(rebuilt(a, change) for a in args)


def copied(t):
    return t.detach().clone()


def leaves(args, change=copied):
    """The inputs as new leaves of the graph."""
    return rebuilt(args, lambda t: change(t).requires_grad_(t.requires_grad))


def gradients(layer, args):
    """One forward and backward: outputs, then the gradients of the inputs and parameters."""
    layer.zero_grad()
    outputs = tensors(layer(*args))
    torch.manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    wanted = [*tensors(args), *layer.parameters()]
    return [o.detach() for o in outputs], [t.grad for t in wanted]


def test_the_entries_are_all_there():
    """Six modules, 87 samples; 48 more with packed sequences."""
    assert {info.module_cls for info in INFOS} == set(REPLACEMENTS)
    count = {info.name: len(list(samples(info, torch.float32, True))) for info in INFOS}
    packed = [len(list(samples(i, torch.float32, True, with_packed_sequence=True))) for i in INFOS]
    assert sum(packed) - sum(count.values()) == 48
    assert count == {
        "nn.RNNCell": 3,
        "nn.GRUCell": 2,
        "nn.LSTMCell": 2,
        "nn.RNN": 32,
        "nn.GRU": 16,
        "nn.LSTM": 32,
    }


# --- beside torch.nn --------------------------------------------------------------------------------------


@entries()
def test_the_kernels_run(info, dtype, training):
    """No fallback: else the checks below would be PyTorch against itself."""
    for layer, args, _ in samples(info, dtype, training, with_packed_sequence=True):
        layer(*args)
        assert layer.last_path == "fused"


@pytest.mark.quick
@entries(every=True)
def test_outputs_and_gradients_are_those_of_torch_nn(info, dtype, training):
    for layer, args, sample in samples(info, dtype, training, requires_grad=True, with_packed_sequence=True):
        original = make(info.module_cls, sample, dtype, training)
        layer.load_state_dict(original.state_dict())
        found, expected = gradients(layer, leaves(args)), gradients(original, leaves(args))
        same(found[0], expected[0], dtype)
        same(found[1], expected[1], dtype)


@entries()
def test_the_same_seed_gives_the_same_weights(info, dtype, training):
    for number, (layer, _, sample) in enumerate(samples(info, dtype, training)):
        torch.manual_seed(number)
        original = make(info.module_cls, sample, dtype, training)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), original.parameters(), strict=True))
        assert list(layer.state_dict()) == list(original.state_dict())


@entries()
def test_a_repeat_gives_the_same_bits(info, dtype, training):
    for layer, args, _ in samples(info, dtype, training, requires_grad=True):
        first, second = gradients(layer, leaves(args)), gradients(copy.deepcopy(layer), leaves(args))
        assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


# --- the checks of test_modules.py ------------------------------------------------------------------------


@entries()
def test_forward(info, dtype, training):
    """The references that come with the samples: unbatched input is a batch of one."""
    for layer, args, sample in samples(info, dtype, training):
        expected = sample.reference_fn(layer, *args, **sample.forward_input.kwargs)
        same(layer(*args), expected, dtype)


@entries()
def test_factory_kwargs(info, dtype, training):
    for _, _, sample in samples(info, dtype, training):
        arguments = sample.constructor_input
        kind = REPLACEMENTS[info.module_cls]
        for device in ("cpu", "meta"):
            layer = kind(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in layer.parameters()} == {(device, dtype)}


@entries()
def test_repr(info, dtype, training):
    for layer, _, sample in samples(info, dtype, training):
        assert repr(layer) == str(layer) == repr(make(info.module_cls, sample, dtype, training))


@entries()
def test_pickle(info, dtype, training):
    """Before the first call and after it, when packed weights are there."""
    for layer, args, _ in samples(info, dtype, training):
        before = pickle.loads(pickle.dumps(layer))
        expected = layer(*args)
        same(before(*args), expected, dtype)
        same(pickle.loads(pickle.dumps(layer))(*args), expected, dtype)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        same(torch.load(file, weights_only=False)(*args), expected, dtype)


@entries()
def test_save_load(info, dtype, training):
    """A state_dict goes to PyTorch's and back, through a file, after the layer has packed other weights."""
    for layer, args, sample in samples(info, dtype, training):
        original = make(info.module_cls, sample, dtype, training)
        expected = original(*args)
        layer(*args)
        file = io.BytesIO()
        torch.save(original.state_dict(), file)
        file.seek(0)
        layer.load_state_dict(torch.load(file, weights_only=True))
        same(layer(*args), expected, dtype)
        original.load_state_dict(layer.state_dict())
        same(original(*args), expected, dtype)


def spaced(t):
    """The same values with gaps between them in memory."""
    wide = torch.zeros(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t.detach()
    return wide[..., 0]


@entries()
def test_non_contiguous_tensors(info, dtype, training):
    """Inputs, parameters, and both, whose memory has gaps."""
    for layer, args, _ in samples(info, dtype, training, requires_grad=True):
        expected = gradients(layer, leaves(args))
        apart = copy.deepcopy(layer)
        for parameter in apart.parameters():
            parameter.data = spaced(parameter)
        assert not any(p.is_contiguous() for p in apart.parameters() if p.numel() > 1)
        for other, inputs in ((layer, spaced), (apart, copied), (apart, spaced)):
            found = gradients(other, leaves(args, inputs))
            same(found[0], expected[0], dtype)
            same(found[1], expected[1], dtype)


def function_of(layer, args):
    """The layer as a function of its inputs and of its own parameters, and their values."""

    def call(*values):
        given = iter(values)
        return tuple(tensors(layer(*rebuilt(args, lambda _: next(given)))))

    return call, (*leaves(tensors(args)), *layer.parameters())


@entries((torch.float64,))
def test_grad(info, dtype, training):
    """PyTorch's gradcheck over inputs, states and parameters, which it moves through ``.data``; as PyTorch
    does by itself, along random directions."""
    for layer, args, _ in samples(info, dtype, training, requires_grad=True):
        assert torch.autograd.gradcheck(*function_of(layer, args), fast_mode=True)


@pytest.mark.slow
@entries((torch.float64,))
def test_gradgrad(info, dtype, training):
    for layer, args, _ in samples(info, dtype, training, requires_grad=True):
        assert torch.autograd.gradgradcheck(*function_of(layer, args), fast_mode=True)


@entries()
def test_memory_format(info, dtype, training):
    """No recurrent input has the four dimensions of one: the request changes nothing."""
    for layer, args, _ in samples(info, dtype, training):
        expected = layer(*args)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            changed = copy.deepcopy(layer).to(memory_format=memory_format)
            found = changed(*args)
            same(found, expected, dtype)
            assert all(t.is_contiguous() for t in tensors(found)[1:])


@entries()
def test_if_train_and_eval_modes_differ(info, dtype, training):
    """Only a module that says so looks at its mode."""
    for layer, args, _ in samples(info, dtype, training):
        del layer.training
        with (
            contextlib.nullcontext()
            if not info.train_and_eval_differ
            else contextlib.suppress(AttributeError)
        ):
            layer(*args)


@entries()
def test_errors(info, dtype, training):
    """Wrong arguments get PyTorch's errors."""
    kind = REPLACEMENTS[info.module_cls]
    wrong = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    for entry in wrong:
        sample = entry.module_error_input
        arguments = sample.constructor_input
        if entry.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                kind(*arguments.args, **arguments.kwargs)
        else:
            layer = kind(*arguments.args, **arguments.kwargs)
            with pytest.raises(entry.error_type, match=entry.error_regex):
                layer(*sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.fixture(params=["data", "swap"])
def conversion(request):
    """PyTorch's two ways to convert a module: new data in the old parameter, or the tensors swapped."""
    torch.__future__.set_swap_module_params_on_conversion(request.param == "swap")
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@entries()
def test_to(info, dtype, training, conversion):
    """To the other dtype and back, after a call."""
    other = DTYPES[1 - DTYPES.index(dtype)]
    for layer, args, _ in samples(info, dtype, training):
        with torch.no_grad():  # PyTorch swaps no parameter that a graph needs
            before, parameters = layer(*args), list(layer.parameters())
        layer.to(other)
        assert {p.dtype for p in layer.parameters()} == {other}
        with torch.no_grad():
            found = tensors(layer(*rebuilt(args, lambda t: t.to(other))))
        same([t.to(dtype) for t in found], before, DTYPES[0])
        layer.to(dtype)
        assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
        same(layer(*args), before, DTYPES[0])


@entries()
def test_to_empty(info, dtype, training):
    """From the meta device, whose tensors have no memory, to one with."""
    for layer, args, sample in samples(info, dtype, training):
        arguments = sample.constructor_input
        empty = REPLACEMENTS[info.module_cls](*arguments.args, **arguments.kwargs, device="meta", dtype=dtype)
        empty = empty.to_empty(device="cpu").train(training)
        empty.load_state_dict(layer.state_dict())
        same(empty(*args), layer(*args), dtype)
