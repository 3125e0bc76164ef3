"""A noisy sine by truncated back-propagation, as a user writes it: 30 parallel time lines, step by step.

python examples/sine.py            the plot is sine.png; for the ready-made program: fusedrnn train sine
"""

import numpy as np

import fusedrnn
import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import Model, SeqDataLoader, plot

EPOCHS, HIDDEN, BATCH, TRUNCATION = 100, 100, 30, 30


class Net(Model):
    def __init__(self, hidden_size, out_size):
        super().__init__()
        self.rnn = L.LSTM(hidden_size)
        self.fc = L.Linear(out_size)

    def reset_state(self):
        self.rnn.reset_state()

    def forward(self, x):
        return self.fc(self.rnn(x))


np.random.seed(42)
train_set = fusedrnn.datasets.SinCurve(train=True)
loader = SeqDataLoader(train_set, batch_size=BATCH)
model = Net(HIDDEN, 1)
optimizer = fusedrnn.optimizers.Adam().setup(model)

for epoch in range(EPOCHS):
    model.reset_state()
    loss, count = 0, 0
    for x, t in loader:
        y = model(x)
        loss += F.mean_squared_error(y, t)
        count += 1
        if count % TRUNCATION == 0:
            model.cleargrads()
            loss.backward()
            loss.unchain_backward()  # the past stays as values, not as a graph
            optimizer.update()
    if (epoch + 1) % 10 == 0:
        print(f"epoch {epoch + 1}  loss {float(loss.data) / count:.6f}")

cosine = np.cos(np.linspace(0, 4 * np.pi, 1000))
model.reset_state()
with fusedrnn.no_grad():
    prediction = np.array([model(value.reshape(1, 1)).data.item() for value in cosine])

mse = np.mean((cosine - prediction) ** 2)
r2 = 1 - np.sum((cosine - prediction) ** 2) / np.sum((cosine - cosine.mean()) ** 2)
print(f"on a cosine: MSE {mse:.8f}  R2 {r2:.6f}; copying the input scores 0 and 1")

try:
    ax = plot.forecast(cosine, {"LSTM": prediction})
except ImportError as error:
    print("no plot:", error)
else:
    ax.figure.savefig("sine.png")
