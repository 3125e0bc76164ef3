"""Train a forecaster on several processes, which share each batch: torchrun, DDP, and our layer inside.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or a restart may hang, see docs/data_parallel.md
    torchrun --nnodes=1 --nproc-per-node=2 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 \\
        examples/torch/data_parallel.py

    python examples/torch/data_parallel.py  # one process; the loss is the mean of the losses of several

Every few steps there is a checkpoint. When a process dies, torchrun starts all of them again, and they go on
from there. docs/data_parallel.md tells more.
"""

import argparse
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusedrnn
from fusedrnn.programs.common import at_least
from fusedrnn.torch import LSTM


class Forecaster(nn.Module):
    """Says the next value at every step."""

    def __init__(self):
        super().__init__()
        self.lstm = LSTM(1, 32, batch_first=True)
        self.fc = nn.Linear(32, 1)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


def share_cores():
    """The processes of a machine divide its cores. torchrun's own choice is one thread for each process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))
    torch.set_num_threads(threads)
    fusedrnn.threads.set_num_threads(threads)


def waves(count, dtype):
    """Noisy sines of different periods and phases, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    period = 8 + 24 * torch.rand(count, 1, generator=draw)
    phase = torch.rand(count, 1, generator=draw)
    series = (2 * math.pi * (torch.arange(41) / period + phase)).sin()
    series = (series + 0.1 * torch.randn(series.shape, generator=draw)).to(dtype)[:, :, None]
    return TensorDataset(series[:, :-1], series[:, 1:])


def save(path, state):
    """Written under another name, then renamed: whoever is killed here leaves the last checkpoint whole."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def train(args):
    rank, processes = dist.get_rank(), dist.get_world_size()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = Forecaster().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    dataset = waves(args.size, dtype)
    sampler = DistributedSampler(dataset, seed=0, drop_last=True)  # each process has its part of every epoch
    loader = DataLoader(dataset, args.batch // processes, sampler=sampler, drop_last=True)

    step = 0
    if Path(args.checkpoint).exists():
        checkpoint = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        print(f"resumed from step {step}, process {rank} of {processes}", flush=True)

    parallel = DistributedDataParallel(model)  # backward() now averages the gradients over all processes
    while step < args.steps:
        epoch, begin = divmod(step, len(loader))
        sampler.set_epoch(epoch)  # another order in each epoch
        for i, (x, y) in enumerate(loader):
            if i < begin:
                continue  # was done before the checkpoint
            loss = nn.functional.mse_loss(parallel(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step} loss {loss.item()!r}", flush=True)  # of this process's part of the batch
            if rank == 0 and (step % args.every == 0 or step == args.steps):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                save(args.checkpoint, state)
            if step == args.steps:
                break


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--checkpoint", default="data_parallel.pt", help="default: %(default)s")
    options.add_argument("--every", type=at_least(1), default=20, help="steps between checkpoints")
    options.add_argument("--steps", type=at_least(1), default=200, help="default: %(default)s")
    options.add_argument("--batch", type=at_least(1), default=64, help="of all processes together")
    options.add_argument(
        "--size", type=at_least(1), default=1024, help="number of series (default: %(default)s)"
    )
    options.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = options.parse_args()

    # What torchrun tells each process. Without it this is the only one.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)
    share_cores()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # not half an hour, where something hangs
    if args.batch % dist.get_world_size():
        options.error(f"--batch {args.batch}: expected a multiple of the {dist.get_world_size()} processes")
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
