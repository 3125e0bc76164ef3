"""Random programs of what is done with a model around its calls: with ``torch.nn``'s layers, and with ours.

Two models with the same parameters go through the same actions. After each, results, parameters and gradients
have to agree, or both have to have raised.

``python tests/torch/test_torch_stress.py 5000`` runs the programs of seeds 0 to 4999.
"""

import collections
import contextlib
import copy
import multiprocessing
import pickle
import random
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
import torch
from torch import nn
from torch.autograd import graph
from torch.nn.utils import clip_grad_norm_, parametrize, prune, rnn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import fusedrnn.torch as ft

pytestmark = [
    pytest.mark.usefixtures("no_fallback"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # of a checkpoint
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract"),
]
KINDS = ("LSTM", "GRU", "RNN", "RNN relu", "LSTM GRU", "RNN LSTM", "LSTM twice", "GRU twice", "RNN tied",
         "LSTM tied", "LSTMCell", "GRUCell", "RNNCell", "RNNCell relu", "GRUCell LSTMCell")  # fmt: skip
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # for rounding that steps of an optimizer add up
SIMPLE, FUSED = ("SGD", "ASGD"), ("SGD", "Adam", "AdamW", "Adagrad")
OPTIMIZERS = (*SIMPLE, *FUSED[1:], "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop")
PRUNE = (prune.is_pruned, partial(prune.l1_unstructured, amount=0.3), prune.remove)
WEIGHT_NORM = (parametrize.is_parametrized, weight_norm, parametrize.remove_parametrizations)
SEEDS = [*range(0, 100, 5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(100, 600, 5))]
THREAD = ThreadPoolExecutor(1)
# What one side may raise alone. Ours saves biases, and inputs and weights that no gradient needs, where
# PyTorch's layer saves none, or a copy. What is saved cannot be swapped; hooks or errors may keep it longer.
# After requires_grad_ PyTorch's layer saves other tensors in a checkpoint than before.
SWAPPED = ("Expected use_count", "_apply(): Couldn't swap")
OURS, THEIRS = ("modified by an inplace operation", *SWAPPED), ("torch.utils.checkpoint: ", *SWAPPED)
Call = collections.namedtuple("Call", "loss outputs leaves")  # leaves: the input and the initial state


def flat(state):
    return [] if state is None else list(state) if isinstance(state, tuple) else [state]


class Model(nn.Module):
    """Recurrent layers and a Linear. Returns its output, the last layer's and the final states of all."""

    def __init__(self, module, kind, dtype, r):
        super().__init__()
        names, again = kind.split(), kind.endswith(("twice", "tied"))
        self.cells, self.twice, H = "Cell" in kind, "twice" in names, r.randint(2, 9)
        self.batch_first = not self.cells and r.random() < 0.4
        self.input_size = I = H if again else r.randint(2, 4)
        self.layers = nn.ModuleList()
        for name in [name for name in names if name[0].isupper()] * (1 + ("tied" in names)):
            options = {"bias": r.random() < 0.8, "dtype": dtype}
            options |= {"nonlinearity": "relu"} if "relu" in names else {}
            if not self.cells:
                options |= {"batch_first": self.batch_first, "bidirectional": not again and r.random() < 0.4}
                options |= r.choice([{}, {}, {"num_layers": 2, "dropout": r.choice([0, 0.3])}])
            self.layers.append(getattr(module, name)(I, H, **options))
            I = H * (1 + options.get("bidirectional", False))
        if "tied" in names:
            self.layers[1].weight_hh_l0 = self.layers[0].weight_hh_l0
        self.head = nn.Linear(I, 3, dtype=dtype)

    def forward(self, x, hx=None, lengths=None):
        states = []
        if lengths is not None and not self.cells:
            x = rnn.pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        for layer in [*self.layers] * (1 + self.twice):
            if self.cells:
                steps = [hx := layer(x_t, hx) for x_t in x]
                x = torch.stack([flat(state)[0] for state in steps])
            else:
                x, hx = layer(x, hx)
            states, hx = states + flat(hx), None
        y = x.data if isinstance(x, rnn.PackedSequence) else x
        return (self.head(y), y, *states)


class Side:
    """One of the two models and what belongs to it; actions, some of them methods, take a random.Random."""

    def __init__(self, module, kind, dtype, folder, seed):
        torch.manual_seed(seed)
        self.model, self.dtype, self.folder = Model(module, kind, dtype, random.Random(seed)), dtype, folder
        self.waiting, self.tolerance = [], TOLERANCE[dtype]
        self.optimizer = torch.optim.SGD(self.parameters(), 0.01)

    def parameters(self, alone=False):
        """``alone``: for writes that PyTorch does not notice, before which nothing may wait for backward."""
        self.waiting = [] if alone else self.waiting
        return list(self.model.parameters())

    def draw(self, r, batched=False):
        """An input, with strides of several kinds, and an initial state or None; some require a gradient."""
        T, B, I, first = r.randint(1, 9), r.randint(1, 5), self.model.input_size, self.model.layers[0]
        rows = (B,) if batched or r.random() < 0.85 else ()
        x = torch.randn((B, T, I) if rows and self.model.batch_first else (T, *rows, I), dtype=self.dtype)
        x = r.choice([x, x, x.mT.contiguous().mT, torch.cat([x, x, x], -1)[..., I:-I], x[:1].expand(x.shape)])
        size = () if self.model.cells else (first.num_layers * (1 + first.bidirectional),)
        h, c = (torch.randn(*size, *rows, first.hidden_size, dtype=self.dtype) for _ in range(2))
        hx = r.choice([None, (h, c) if "LSTM" in type(first).__name__ else h])
        for t in [x, *flat(hx)]:
            t.requires_grad_(r.random() < 0.5)
        return x, hx

    def call(self, r, run=None, given=None, within=contextlib.nullcontext, wait=True):
        x, hx = given or self.draw(r)
        with within():
            outputs = (run or self.model)(x, hx)
        used = [t for t in outputs if r.random() < 0.7] or outputs[:1]
        loss = sum((t * (torch.arange(t.numel()) % 7 - 3).view(t.shape) + t * t).sum() for t in used)
        found = Call(loss, outputs, [x, *flat(hx)])
        self.waiting = [*self.waiting[-2:], found] if wait else self.waiting
        return found

    def take(self, r):
        return self.waiting.pop(r.randrange(len(self.waiting))) if self.waiting else self.call(r, wait=False)

    def backward(self, p, **options):
        p.loss.backward(**options)
        return p.loss, [t.grad.clone() for t in p.leaves if t.is_leaf and t.grad is not None]

    def gradients(self, p, wanted=None, **options):
        wanted = wanted or [t for t in (*self.parameters(), *p.leaves) if t.requires_grad]
        found = torch.autograd.grad(p.loss, wanted, allow_unused=True, **options)
        return p.outputs, [t if t is None else t.detach() for t in found]

    def write(self, r, of, alone=True):
        """To one element, a row, or all of what ``of`` makes of a parameter."""
        t = of(r.choice(self.parameters(alone)))
        part = r.choice([(0,) * t.ndim, 0, ...])
        t[part] = t[part] * 0.5 + 0.25

    def packed(self, r):
        given = self.draw(r, batched=True)
        B, T = given[0].shape[:2] if self.model.batch_first else given[0].shape[1::-1]
        lengths = torch.tensor([T, *(r.randint(1, T) for _ in range(B - 1))])
        return self.call(r, lambda x, hx: self.model(x, hx, lengths), given)

    def carried_state(self, r):
        """Two calls; the second begins where the first ended, in its graph or detached from it."""
        p, lstm, detach = self.call(r), "LSTM" in type(self.model.layers[0]).__name__, r.random() < 0.5
        state = tuple(t.detach() if detach else t for t in p.outputs[2 : 3 + lstm])
        return self.call(r, None, (torch.randn_like(p.leaves[0]), state if lstm else state[0]))

    def autocast(self, r):
        self.tolerance = 0.1 if self.dtype is torch.float32 else self.tolerance  # else it changes nothing
        with mock.patch.object(ft.paths, "_errors", False), warnings.catch_warnings(action="ignore"):
            p = self.call(r, within=lambda: torch.autocast("cpu", torch.bfloat16), wait=False)
        self.gradients(p)
        return [t.double() for t in p.outputs]

    def functional_call(self, r):
        other = {n: (torch.randn_like(p) / 2).requires_grad_() for n, p in self.model.named_parameters()}
        p = self.call(r, lambda *given: torch.func.functional_call(self.model, other, given), wait=False)
        return self.gradients(p, list(other.values()))

    def some_gradients(self, r):
        p, keep = self.take(r), r.random() < 0.5
        self.waiting += [p] * keep
        wanted = [t for t in (*self.parameters(), *p.leaves, p.outputs[1]) if t.requires_grad]
        wanted = r.sample(wanted, (len(wanted) + 1) // 2)
        return self.gradients(p, wanted, retain_graph=keep, create_graph=keep and r.random() < 0.5)

    def batched_gradients(self, r):
        y, wanted = self.call(r, wait=False).outputs[0], [p for p in self.parameters() if p.requires_grad]
        options = {"is_grads_batched": True, "allow_unused": True}
        return torch.autograd.grad(y, wanted, torch.randn(2, *y.shape).to(y), **options)

    def hooks(self, r):
        layer, w, seen, sums = r.choice(self.model.layers), r.choice(self.parameters()), [], []
        with (
            layer.register_forward_hook(lambda _, args, y: (y[0] * 2, *y[1:]) if type(y) is tuple else y * 2),
            layer.register_full_backward_hook(lambda _, dx, dy: seen.append((dx[0], dy[0]))),
            w.register_hook(lambda g: g * 2),
            w.register_post_accumulate_grad_hook(lambda w: sums.append(w.grad.clone())),
        ):
            p = self.call(r, wait=False)
            for t in [t for t in (p.leaves[0], p.outputs[1]) if t.requires_grad]:
                t.register_hook(lambda g: g if g is None else g * 2)
            return self.backward(p), seen, sums

    def file(self, what):
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            torch.save(what, file)
        return file.name

    def saved(self, r, pack, unpack):
        return self.call(r, within=lambda: graph.saved_tensors_hooks(pack, unpack))

    def saved_in_less_precision(self, r):
        """The large ones. The two models save other tensors, so their gradients agree loosely."""
        less, self.tolerance = (torch.float32, 1e-4) if self.dtype is torch.float64 else (torch.float16, 0.1)
        pair = (less, self.dtype)
        self.saved(r, *[lambda t, d=d: t.to(d) if t.dtype in pair and t.numel() > 4 else t for d in pair])
        return self.gradients(self.waiting.pop())

    def mutate_what_is_saved(self, r):
        with graph.allow_mutation_on_saved_tensors():
            p = self.call(r, wait=False)
            # Not what PyTorch saves views of, as of steps and states: of those it loses some.
            for t in (r.choice(self.parameters()), *p.leaves[: not self.model.cells]):
                t.detach().mul_(0.9)
            return self.gradients(p)

    def resize_storage(self, r):
        """Of a tensor that waits for backward, to nothing and back, as sharded training does."""
        storage = r.choice([*self.call(r).leaves, *self.parameters()]).untyped_storage()
        if not storage.is_shared():  # where PyTorch crashes
            kept = storage.clone()
            storage.resize_(0)
            other = kept.clone()  # perhaps where it was
            storage.resize_(kept.size())
            storage.copy_(other)

    def reuse_a_buffer(self, r):
        buffer = torch.randn(3, 2, self.model.input_size, dtype=self.dtype)
        with torch.no_grad():
            first = self.model(buffer)
            torch.cat([torch.randn_like(buffer) for _ in range(2)], out=buffer.resize_(0))
            return first, self.model(buffer)

    def write_in_a_process(self, r):
        self.model.share_memory()
        self.waiting = []
        child = multiprocessing.get_context("fork").Process(target=self.write, args=(r, lambda p: p.data))
        child.start()
        child.join()
        assert child.exitcode == 0

    def soft_updates(self, r):
        target, given, results = self.copy(r), self.draw(r), []
        for _ in range(3):
            results.append(target(*given))
            for q, p in zip(target.parameters(), self.parameters(), strict=True):
                q.data.mul_(0.9).add_(p.detach().sin(), alpha=0.1)
        return results

    def other_storage(self, r):
        """A parameter moves; where nothing waits, also to other values."""
        alone, use_set = r.random() < 0.5, r.random() < 0.5
        w = r.choice(self.parameters(alone))
        values = r.choice([w, w.t().contiguous().t()]).detach() * (0.9 if alone else 1)
        torch.no_grad()(w.set_)(values) if use_set else setattr(w, "data", values)

    def replace(self, r):
        """A parameter by another. PyTorch swaps none of its layers, to which there are weak references."""
        owner = r.choice([self.model.head, *self.model.layers])
        owner.to(self.dtype)  # else weak references may be to those of before
        name, w = r.choice([(name, p) for name, p in owner._parameters.items() if p is not None])
        new = nn.Parameter(torch.randn_like(w) / 2)
        torch.utils.swap_tensors(w, new) if r.random() < 0.6 else setattr(owner, name, new)

    def copy(self, r):
        with torch.no_grad():  # computed weights that PyTorch's layers hold on to have no graph then
            self.model.to(self.dtype)(*self.draw(r))
        return copy.deepcopy(self.model)

    def replace_the_model(self, r):
        self.waiting = []
        self.model = self.copy(r) if r.random() < 0.5 else pickle.loads(pickle.dumps(self.model))

    def load_state_dict(self, r):
        state = {name: torch.randn_like(t) / 2 for name, t in self.model.state_dict().items()}
        state = torch.load(self.file(state), mmap=True) if r.random() < 0.3 else state
        self.model.load_state_dict(state, assign=r.random() < 0.5)

    def convert(self, r):
        self.waiting, before, kept = [], self.dtype, copy.deepcopy(self.model.state_dict())
        self.model.zero_grad()
        (self.dtype,), self.tolerance = set(TOLERANCE) - {before}, TOLERANCE[torch.float32]
        torch.__future__.set_swap_module_params_on_conversion(r.random() < 0.5)
        try:
            self.model.to(self.dtype)
            return self.gradients(self.call(r, wait=False))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
            self.dtype = before
            self.model.to(before).load_state_dict(kept)

    def change_or_undo(self, r, changed, change, undo):
        self.waiting, layer = [], r.choice(self.model.layers)  # prune.remove writes to .data
        (undo if changed(layer) else change)(layer, "weight_hh" if self.model.cells else "weight_hh_l0")

    def new_optimizer(self, r):
        # But for SIMPLE they divide by the size of the gradient, also where that is rounding.
        name = r.choice(OPTIMIZERS if self.dtype is torch.float64 else SIMPLE)
        form = r.choice([{}, {"foreach": True}, {"foreach": False}, {"fused": True} if name in FUSED else {}])
        self.optimizer = getattr(torch.optim, name)(self.parameters(), lr=0.01, **form)

    def step(self, r):
        self.optimizer.param_groups[0]["params"] = self.parameters()
        if r.random() < 0.7:
            self.optimizer.zero_grad()
            self.backward(self.call(r, wait=False))
        self.optimizer.step()


ACTIONS = {
    "forward": Side.call,
    "no_grad": lambda s, r: s.call(r, within=torch.no_grad, wait=False),
    "inference_mode": lambda s, r: s.call(r, within=torch.inference_mode, wait=False),
    "forward in autocast": Side.autocast,
    "forward in a thread": lambda s, r: THREAD.submit(s.call, r).result(),
    "forward of a PackedSequence": Side.packed,
    "forward with a carried state": Side.carried_state,
    "functional_call": Side.functional_call,
    "checkpoint": lambda s, r: s.call(r, partial(checkpoint, s.model, use_reentrant=r.random() < 0.5)),
    "save_on_cpu": lambda s, r: s.call(r, within=graph.save_on_cpu),
    "saved tensors detached": lambda s, r: s.saved(r, torch.detach, torch.detach),
    "saved tensors cloned": lambda s, r: s.saved(r, torch.clone, torch.clone),
    "saved tensors on disk": lambda s, r: s.saved(r, s.file, torch.load),
    "saved tensors in less precision": Side.saved_in_less_precision,
    "saved tensors mutated": Side.mutate_what_is_saved,
    "backward": lambda s, r: s.backward(s.take(r)),
    "backward of all, graphs retained": lambda s, r: [s.backward(p, retain_graph=True) for p in s.waiting],
    "backward twice": lambda s, r: [s.backward(p, retain_graph=r.random() < 0.6) for p in [s.take(r)] * 2],
    "backward of a sum": lambda s, r: s.backward(Call(s.call(r).loss + s.take(r).loss, (), [])),
    "backward in a thread": lambda s, r: THREAD.submit(s.backward, s.take(r)).result(),
    "autograd.grad of some": Side.some_gradients,
    "autograd.grad of a batch": Side.batched_gradients,
    "detect_anomaly": lambda s, r: s.gradients(s.call(r, within=torch.autograd.detect_anomaly, wait=False)),
    "hooks": Side.hooks,
    "write to an input": lambda s, r: r.choice(s.call(r).leaves).detach().mul_(0.9),
    "write to a parameter": lambda s, r: s.write(r, torch.Tensor.detach, alone=False),
    "write to .data": lambda s, r: s.write(r, lambda p: p.data),
    "write through NumPy": lambda s, r: s.write(r, lambda p: p.detach().numpy()),
    "write in a thread": lambda s, r: THREAD.submit(s.write, r, lambda p: p.data).result(),
    "write in a process": Side.write_in_a_process,
    "soft updates": Side.soft_updates,
    "share_memory_ of inputs": lambda s, r: [t.detach().share_memory_() for t in s.call(r).leaves],
    "share_memory of the model": lambda s, r: s.model.share_memory(),
    "storage.resize_": Side.resize_storage,
    "cat to an input": Side.reuse_a_buffer,
    "vector_to_parameters": lambda s, r: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(s.parameters(alone=True)).detach() * 0.9, s.parameters()
    ),
    "set_ or .data =": Side.other_storage,
    "swap_tensors or another Parameter": Side.replace,
    "reset_parameters": lambda s, r: r.choice(s.model.layers).reset_parameters(),
    "flatten_parameters": lambda s, r: [m.flatten_parameters() for m in s.model.layers if not s.model.cells],
    "deepcopy or pickle": Side.replace_the_model,
    "load_state_dict": Side.load_state_dict,
    "double or float": Side.convert,
    "train or eval": lambda s, r: s.model.train(r.random() < 0.5),
    "requires_grad_": lambda s, r: [p.requires_grad_(r.random() < 0.8) for p in s.parameters()],
    "zero_grad": lambda s, r: s.model.zero_grad(set_to_none=r.random() < 0.5),
    "clip_grad_norm_": lambda s, r: clip_grad_norm_(s.parameters(), 0.1, foreach=r.choice([None, True])),
    "prune or remove": lambda s, r: s.change_or_undo(r, *PRUNE),
    "weight_norm or remove": lambda s, r: s.change_or_undo(r, *WEIGHT_NORM),
    "new optimizer": Side.new_optimizer,
    "step": Side.step,
}
WITH_PROCESSES = ("forward", "write in a process", "forward", "step", "write in a process", "forward")
OFTEN = {"forward": 10, "backward": 10, "step": 5, "new optimizer": 3, "write in a process": 0}


def act(side, name, seed):
    """What the action raised; what it returned and what is there after it."""
    r, error, results = random.Random(seed), None, []
    torch.manual_seed(r.getrandbits(32))
    try:
        results.append(ACTIONS[name](side, r))
        if r.random() < 0.5:
            results.append(torch.no_grad()(side.model.__call__)(*side.draw(r)))
    except Exception as e:
        error = e.with_traceback(None)
        side.waiting, results = [], []
        side.model.zero_grad()  # an error in backward leaves some
    return error, {
        "results": [t for t in results if isinstance(t, (torch.Tensor, tuple, list))],
        "requires_grad": [[t.requires_grad for t in p.outputs] for p in side.waiting],
        "parameters": dict(side.model.named_parameters()),
        "gradients": {name: p.grad for name, p in side.model.named_parameters()},
    }


def run(seed, names=None):
    """Run a program; the names of its actions, each with what both raised."""
    r, done = random.Random(seed), []
    kind, dtype = r.choice(KINDS), r.choice([torch.float64] * 4 + [torch.float32])
    names = names or r.choices(list(ACTIONS), [OFTEN.get(n, 1) for n in ACTIONS], k=r.randint(8, 15))
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(module, kind, dtype, folder, seed) for module in (nn, ft)]
        sides[1].model.load_state_dict(sides[0].model.state_dict())
        for i, name in enumerate(names):
            (wanted, expected), (error, got) = [act(side, name, f"{seed} {i}") for side in sides]
            if not (error and wanted) and any(t in str(error or wanted) for t in (OURS if error else THEIRS)):
                return [*done, (name, "refused")]
            done.append((name, type(wanted).__name__ if wanted else "returned"))
            at, t = f"seed {seed}, {kind}, {dtype}, after {done}", sides[0].tolerance
            alike = type(error) is type(wanted) or all(isinstance(e, RuntimeError) for e in (error, wanted))
            assert alike, f"{at}: raised {error!r}, expected {wanted!r}"
            torch.testing.assert_close(
                got, expected, rtol=t, atol=t, equal_nan=True, msg=f"{at}: {{}}".format
            )
            sides[0].tolerance = TOLERANCE[dtype]
            del wanted, expected, error, got  # they hold graphs
    return done


@pytest.mark.kernel
@pytest.mark.parametrize("seed", SEEDS)
def test_five_programs(seed):
    for k in range(5):
        run(seed + k)


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("seed", range(3))
def test_writes_of_another_process(seed):
    run(seed, WITH_PROCESSES)


if __name__ == "__main__":
    ft.set_fallback_errors(True)
    done, failed = collections.Counter(), []
    for seed in range(int(sys.argv[1])):
        try:
            done.update(run(seed))
            done.update(run(seed, WITH_PROCESSES) if seed % 50 == 0 else ())
        except AssertionError as error:
            print(error)
            failed.append(seed)
    for name in ACTIONS:
        print(f"{name:34}", {how: n for (of, how), n in sorted(done.items()) if of == name})
    print(f"{sys.argv[1]} programs, failed: {failed}")
