"""A whole PyTorch training step (layer, Linear head, loss, backward, Adam) with our LSTM kernels inside.

Beside it the same model with nn.LSTM. PyTorch's own threads run between our calls, as in real training.

    python bench/torch_step.py              all threads
    python bench/torch_step.py --threads 1
    python bench/torch_step.py --json FILE

Ours is timed three times: on our own pool of threads, on PyTorch's OpenMP team, on the caller's thread alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from fusedrnn import kernels, system
from fusedrnn.bench.report import BUSY
from fusedrnn.bench.timing import Others, ratio, same_threads, spread, time_blocks
from fusedrnn.cells import lstm
from fusedrnn.threads import set_num_threads, set_thread_pool

SHAPES = ((64, 16, 128, 128), (30, 30, 1, 100))  # T, B, I, H


class Fused(torch.autograd.Function):
    """The least that puts forward and backward under PyTorch: y of one layer from a zero state."""

    @staticmethod
    def forward(ctx, x, *parameters):
        weights = {name: p.detach().numpy() for name, p in zip(lstm.blocks, parameters, strict=True)}
        y, _, _, ctx.tape = kernels.forward(lstm, x.detach().numpy(), weights)
        return torch.from_numpy(y)

    @staticmethod
    def backward(ctx, dy):
        names = ("x", *lstm.blocks)
        need = [name for name, wanted in zip(names, ctx.needs_input_grad, strict=True) if wanted]
        dx, dweights, *_ = kernels.backward(ctx.tape, dy.contiguous().numpy(), need=need)
        return tuple(None if g is None else torch.from_numpy(g) for g in (dx, *dweights.values()))


class FusedLSTM(torch.nn.LSTM):
    """nn.LSTM, its forward replaced."""

    def forward(self, x):
        return Fused.apply(x, *self.parameters()), None


class Training:
    """One model and its optimizer; a call is a step, with ``threads`` threads of ``pool`` for our kernels."""

    def __init__(self, layer, shape, threads, pool="own"):
        T, B, I, H = shape
        torch.manual_seed(0)
        self.threads, self.pool = threads, pool
        self.rnn = layer(I, H)
        self.head = torch.nn.Linear(H, 1)
        self.optimizer = torch.optim.Adam([*self.rnn.parameters(), *self.head.parameters()])
        self.x, self.target = torch.randn(T, B, I), torch.randn(T, B, 1)

    def __call__(self):
        set_num_threads(self.threads)
        set_thread_pool(self.pool)
        self.optimizer.zero_grad()
        y, _ = self.rnn(self.x)
        loss = torch.nn.functional.mse_loss(self.head(y), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def measure(shape, threads, blocks=9, seconds=0.1):
    """Check that all learn the same, then time them, interleaved."""
    runs = {
        "nn.LSTM": Training(torch.nn.LSTM, shape, threads),
        "ours, own pool": Training(FusedLSTM, shape, threads),
        "ours, OpenMP team": Training(FusedLSTM, shape, threads, "openmp"),
        "ours, one thread": Training(FusedLSTM, shape, 1),
    }
    losses = {name: torch.tensor([run() for _ in range(5)]) for name, run in runs.items()}
    for name, found in losses.items():
        torch.testing.assert_close(
            found, losses["nn.LSTM"], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    samples = time_blocks(runs, blocks, seconds, limit=5.0)
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "spread": spread(values),
            "ratio": ratio(samples["nn.LSTM"], values),
        }
        for name, values in samples.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, help="for PyTorch and for our pool (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    rows = []
    with same_threads(args.threads) as threads:
        for shape in SHAPES:
            others = Others()
            found = measure(shape, threads)
            rows.append({"shape": shape, "libraries": found, "others": others.share()})
            for name, each in rows[-1]["libraries"].items():
                print(
                    f"{','.join(map(str, shape)):14}  {name:17}{each['ms']:8.3f} ms ±{each['spread']:.0%}  "
                    f"nn.LSTM / this {each['ratio']:.2f}"
                )
    print(f"{threads} thread(s), PyTorch {torch.__version__}")
    busy = max(row["others"] or 0.0 for row in rows)
    if busy > BUSY:
        print(f"other processes took up to {busy:.0%} of the cores: measure again for figures")
    if args.json:
        report = {"threads": threads, "environment": system.environment(), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
