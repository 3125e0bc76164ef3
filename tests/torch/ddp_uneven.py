"""For test_torch_distributed: 2 processes with 3 and 5 batches; without torchrun the same in one."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusedrnn.torch import GRU

BATCHES = (3, 5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = GRU(2, 6, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(12, 1)

    def forward(self, x):
        return self.fc(self.gru(x)[0])


torch.set_num_threads(1)
torch.manual_seed(0)
model = Net().double()
x = torch.randn(2, max(BATCHES), 7, 4, 2, dtype=torch.float64)  # of each process, of each batch
y = torch.randn(2, max(BATCHES), 7, 4, 1, dtype=torch.float64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parallel = DistributedDataParallel(model)
    with parallel.join():
        for k in range(BATCHES[rank]):
            optimizer.zero_grad()
            nn.functional.mse_loss(parallel(x[rank, k]), y[rank, k]).backward()
            optimizer.step()
    dist.barrier()
    dist.destroy_process_group()
else:
    rank = "alone"
    for k in range(max(BATCHES)):
        optimizer.zero_grad()
        for r in range(2):
            if k < BATCHES[r]:
                (nn.functional.mse_loss(model(x[r, k]), y[r, k]) / 2).backward()
        optimizer.step()
torch.save(model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
