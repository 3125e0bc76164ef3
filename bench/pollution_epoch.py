"""An epoch of ``fusedrnn train pollution`` (128 time lines, chunks of 30 steps) beside the same in PyTorch.

    python bench/pollution_epoch.py [--threads N] [--device cuda] [--json FILE]

On a GPU also beside DeZero, which the program was written for, if it is installed: single
steps are all it has. Random rows in place of the data file, which changes no time. All start from the same
weights, and the losses of the first epochs are compared before anything is timed. Epochs are interleaved; a
ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedrnn import system
from fusedrnn.bench import peer_dezero
from fusedrnn.bench.cuda import MODES, use
from fusedrnn.bench.timing import same_threads
from fusedrnn.datasets import Series
from fusedrnn.programs import pollution
from fusedrnn.programs.common import Forecaster

ROWS = 30_660  # of the training part
EPOCHS = 15


class Theirs:
    """The program as one writes it in PyTorch: the state is detached between chunks."""

    def __init__(self, part: Series, model: Forecaster, device: str) -> None:
        self.device = device
        self.x, self.t = (torch.from_numpy(a).to(device) for a in (part.data, part.label))
        self.rnn = torch.nn.LSTM(len(pollution.INPUTS), pollution.HIDDEN, device=device)
        self.fc = torch.nn.Linear(pollution.HIDDEN, 1, device=device)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih"):
                getattr(self.rnn, f"{name}_l0").copy_(torch.from_numpy(getattr(model.rnn, name).data))
            self.rnn.bias_hh_l0.zero_().requires_grad_(False)
            self.fc.weight.copy_(torch.from_numpy(model.fc.W.data.T))
            self.fc.bias.copy_(torch.from_numpy(model.fc.b.data))
        parameters = [p for m in (self.rnn, self.fc) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters)

    def epoch(self) -> float:
        """The mean loss of a step."""
        n, batch = len(self.x), pollution.BATCH
        starts = torch.arange(batch, device=self.device) * (n // batch)
        steps = -(-n // batch)
        state, total = None, 0.0
        for begin in range(0, steps, pollution.TRUNCATION):
            times = torch.arange(begin, min(begin + pollution.TRUNCATION, steps), device=self.device)
            index = (starts + times[:, None]) % n
            y, state = self.rnn(self.x[index], state)
            state = tuple(s.detach() for s in state)
            loss = ((self.fc(y) - self.t[index]) ** 2).sum() / batch
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / steps


class DeZero:
    """The program in DeZero."""

    def __init__(self, part: Series, model: Forecaster, device: str) -> None:
        self.dezero = dezero = peer_dezero.load()

        class Net(dezero.Model):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.rnn = dezero.layers.LSTM(pollution.HIDDEN, in_size=len(pollution.INPUTS))
                self.fc = dezero.layers.Linear(1, in_size=pollution.HIDDEN)

            def forward(self, x: Any) -> Any:
                return self.fc(self.rnn(x))

        self.net = Net()
        H = pollution.HIDDEN
        for k, gate in enumerate(peer_dezero.GATES["lstm"]):
            rows = slice(k * H, k * H + H)
            inputs, hidden = getattr(self.net.rnn, f"x2{gate}"), getattr(self.net.rnn, f"h2{gate}")
            inputs.W.data = model.rnn.weight_ih.data[rows].T.copy()
            inputs.b.data = model.rnn.bias_ih.data[rows].copy()
            hidden.W.data = model.rnn.weight_hh.data[rows].T.copy()
        self.net.fc.W.data, self.net.fc.b.data = model.fc.W.data.copy(), model.fc.b.data.copy()
        n = len(part.data)
        self.steps = -(-n // pollution.BATCH)
        index = (np.arange(pollution.BATCH) * (n // pollution.BATCH) + np.arange(self.steps)[:, None]) % n
        self.x, self.t = part.data[index], part.label[index]
        if device != "cpu":
            self.net.to_gpu()
            self.x, self.t = dezero.cuda.as_cupy(self.x), dezero.cuda.as_cupy(self.t)
        self.optimizer = dezero.optimizers.Adam().setup(self.net)

    def epoch(self) -> float:
        """The mean loss of a step."""
        self.net.rnn.reset_state()
        loss, total = 0, 0.0
        for count, (x, t) in enumerate(zip(self.x, self.t, strict=True), 1):
            loss += self.dezero.functions.mean_squared_error(self.net(x), t)
            if count % pollution.TRUNCATION == 0 or count == self.steps:
                self.net.cleargrads()
                loss.backward()
                loss.unchain_backward()
                self.optimizer.update()
                total += float(loss.data)
                loss = 0
        return total / self.steps


def milliseconds(call, *arguments) -> float:
    start = time.perf_counter()
    call(*arguments)
    return 1e3 * (time.perf_counter() - start)


def measure(device: str = "cpu") -> dict[str, Any]:
    """Median milliseconds of an epoch of each, and the medians of their ratios to ours.

    All take every chunk's loss to the CPU, so that an epoch has ended when its call returns.
    """
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((ROWS, len(pollution.INPUTS))).astype(np.float32)
    part = Series(rows, rows[:, :1])
    model = pollution.build("lstm", 0)
    with contextlib.ExitStack() as after:
        rounding = 1e-4
        if device != "cpu":
            after.enter_context(use(MODES["tf32"]))  # PyTorch's default there, and so ours as well
            rounding = 1e-2
        return _measure(part, model, device, rounding)


def _measure(part: Series, model: Forecaster, device: str, rounding: float) -> dict[str, Any]:
    theirs: dict[str, Any] = {"torch": Theirs(part, model, device)}
    if device != "cpu" and peer_dezero.DeZero.missing() is None:
        theirs["dezero"] = DeZero(part, model, device)
    ours = pollution.training(model, part)
    if device != "cpu":
        model.to_gpu()
        ours.loader.to_gpu()
    for k in range(2):
        ours.run(k + 1, lambda _: None)
        for each in theirs.values():
            np.testing.assert_allclose(ours.losses[k], each.epoch(), rtol=rounding)
    times: dict[str, list[float]] = {name: [] for name in ("fusedrnn", *theirs)}
    for k in range(EPOCHS):
        time.sleep(0.05)  # the threads of the others fall asleep
        times["fusedrnn"].append(milliseconds(ours.run, k + 3, lambda _: None))
        for name, each in theirs.items():
            if k < EPOCHS // 3 or name == "torch":  # DeZero's are long
                time.sleep(0.05)
                times[name].append(milliseconds(each.epoch))
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["fusedrnn"], times[name], strict=False))
        for name in theirs
    }
    found = {"ms": {name: statistics.median(each) for name, each in times.items()}, "ratio": ratios["torch"]}
    return found if "dezero" not in ratios else found | {"ratio to dezero": ratios["dezero"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with same_threads(args.threads) as threads:
        found = measure(args.device)
    ms = found["ms"]
    print(
        f"{threads} thread(s): ours {ms['fusedrnn']:.1f} ms, PyTorch {ms['torch']:.1f} ms, "
        f"ratio {found['ratio']:.2f}"
    )
    if "dezero" in ms:
        print(f"DeZero {ms['dezero']:.1f} ms, ratio {found['ratio to dezero']:.2f}")
    if args.json:
        report = {"threads": threads, "environment": system.environment(), **found}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
