"""Air pollution one hour ahead, as a user writes it: chunks in one fused node, a carried state, checkpoints.

python examples/pollution.py FILE.csv     Stopped at any time, it goes on from pollution.ckpt.

The file is public: Beijing PM2.5 by Song Chen, UCI Machine Learning Repository, CC BY 4.0, in the arrangement
known as "LSTM-Multivariate pollution", which python -m fusedrnn.programs.uci_pollution makes from UCI's file.
For the published task and its plots: fusedrnn train pollution
"""

import sys
from pathlib import Path

import numpy as np

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import SeqDataLoader, checkpoint, models, no_grad, optimizers
from fusedrnn.datasets import Series, read_csv

EPOCHS = 20

if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
    sys.exit(__doc__)

columns = ["pollution", "dew", "temp", "press", "wnd_spd", "snow", "rain"]
rows = read_csv(sys.argv[1], columns, hours=1).astype(np.float32)
n = int(0.7 * len(rows))
x = (rows - rows[:n].mean(axis=0)) / np.maximum(rows[:n].std(axis=0), 1e-3)
change = np.diff(rows[:, :1], axis=0)  # until the next hour
scale = change[: n - 1].std()

np.random.seed(0)
rnn = L.LSTM(100, in_size=7)
model = models.Sequential(rnn, L.Linear(1))
optimizer = optimizers.Adam().setup(model)
loader = SeqDataLoader(Series(x[: n - 1], change[: n - 1] / scale), batch_size=128, steps=30)

epoch = 0
if Path("pollution.ckpt").exists():
    epoch = checkpoint.load("pollution.ckpt", model, optimizer, loader)["epoch"]
while epoch < EPOCHS:
    rnn.reset_state()
    total = 0.0
    for chunk, target in loader:  # (30, 128, 7) and (30, 128, 1)
        loss = F.mean_squared_error(model(chunk), target)
        model.cleargrads()
        loss.backward()
        loss.unchain_backward()
        optimizer.update()
        total += float(loss.data)
    epoch += 1
    checkpoint.save("pollution.ckpt", model, optimizer, loader, epoch=epoch)
    print(f"epoch {epoch}  loss {total / loader.round:.5f}")

rnn.reset_state()
with no_grad():
    forecast = model(x[n:-1, np.newaxis]).data[:, 0] * scale  # the whole test part, batch 1
now, truth = rows[n:-1, :1], rows[n + 1 :, :1]
for name, error in (("LSTM", now + forecast - truth), ("persistence: as now", now - truth)):
    print(f"{name:20} MSE {np.mean(error**2):.1f}  MAE {np.mean(np.abs(error)):.2f}")
