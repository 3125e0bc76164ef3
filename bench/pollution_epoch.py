"""An epoch of ``fusedrnn train pollution`` (128 time lines, chunks of 30 steps) beside the same in PyTorch.

    python bench/pollution_epoch.py [--threads N] [--json bench/results/pollution_epoch.json]

Random rows in place of the data file, which changes no time. Both start from the same weights, and the losses
of the first epochs are compared before anything is timed. Epochs are run in turn; the ratio is the median
over the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from fusedrnn import system
from fusedrnn.bench.timing import same_threads
from fusedrnn.datasets import Series
from fusedrnn.programs import pollution
from fusedrnn.programs.common import Forecaster

ROWS = 30_660  # of the training part
EPOCHS = 15


class Theirs:
    """The program as one writes it in PyTorch: the state is detached between chunks."""

    def __init__(self, part: Series, model: Forecaster) -> None:
        self.x, self.t = torch.from_numpy(part.data), torch.from_numpy(part.label)
        self.rnn = torch.nn.LSTM(len(pollution.INPUTS), pollution.HIDDEN)
        self.fc = torch.nn.Linear(pollution.HIDDEN, 1)
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
        starts = torch.arange(batch) * (n // batch)
        steps = -(-n // batch)
        state, total = None, 0.0
        for begin in range(0, steps, pollution.TRUNCATION):
            times = torch.arange(begin, min(begin + pollution.TRUNCATION, steps))
            index = (starts + times[:, None]) % n
            y, state = self.rnn(self.x[index], state)
            state = tuple(s.detach() for s in state)
            loss = ((self.fc(y) - self.t[index]) ** 2).sum() / batch
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return total / steps


def milliseconds(call, *arguments) -> float:
    start = time.perf_counter()
    call(*arguments)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((ROWS, len(pollution.INPUTS))).astype(np.float32)
    part = Series(rows, rows[:, :1])
    model = pollution.build("lstm", 0)
    with same_threads(args.threads) as threads:
        theirs, ours = Theirs(part, model), pollution.Training(model, part, None, float("inf"))
        for k in range(3):
            expected = theirs.epoch()
            ours.run(k + 1, lambda _: None)
            np.testing.assert_allclose(ours.losses[k], expected, rtol=1e-4)
        times: dict[str, list[float]] = {"fusedrnn": [], "torch": []}
        for k in range(EPOCHS):
            time.sleep(0.05)  # the threads of the other fall asleep
            times["fusedrnn"].append(milliseconds(ours.run, k + 4, lambda _: None))
            time.sleep(0.05)
            times["torch"].append(milliseconds(theirs.epoch))
    ratio = statistics.median(b / a for a, b in zip(times["fusedrnn"], times["torch"], strict=True))
    ms = {name: statistics.median(each) for name, each in times.items()}
    print(
        f"{threads} thread(s): ours {ms['fusedrnn']:.1f} ms, PyTorch {ms['torch']:.1f} ms, ratio {ratio:.2f}"
    )
    if args.json:
        report = {"threads": threads, "environment": system.environment(), "ms": ms, "ratio": ratio}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
