"""Which of two noisy processes made a sequence? Different lengths, early stopping, the best model kept.

    pip install "fusedrnn[examples]" && python examples/classify.py

Both processes are x[t] = a x[t-1] + noise, with a = -0.4 or a = 0.4. Nothing can be right in more than about
96 % of the cases. For the ready-made program: fusedrnn train classify
"""

import numpy as np
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import fusedrnn.functions as F
import fusedrnn.layers as L
from fusedrnn import DataLoader, Model, datasets, no_grad, optimizers

EPOCHS, HIDDEN, BATCH, PATIENCE = 30, 64, 64, 6
SHORTEST, LONGEST = 10, 50


def draw(count):
    """Sequences (count, 50, 1) padded with zeros; of each its length and its process (count, 2)."""
    process = np.random.randint(2, size=count)
    lengths = np.random.randint(SHORTEST, LONGEST + 1, size=count)
    a = np.array([-0.4, 0.4])[process]
    steps = [np.random.randn(count)]
    for _ in range(LONGEST - 1):
        steps.append(a * steps[-1] + np.sqrt(1 - a * a) * np.random.randn(count))
    x = 0.5 * np.stack(steps, axis=1) * (np.arange(LONGEST) < lengths[:, np.newaxis])
    return x[:, :, np.newaxis].astype(np.float32), np.stack([lengths, process], axis=1)


class Net(Model):
    def __init__(self):
        super().__init__()
        self.rnn = L.LSTM(HIDDEN, in_size=1)
        self.fc = L.Linear(2, in_size=HIDDEN)

    def forward(self, x, lengths):
        self.reset_state()
        self.rnn(np.swapaxes(x, 0, 1), lengths=lengths)
        return self.fc(self.rnn.h)  # of each sequence after its own last step


def loss_of(model, x, t):
    lengths, process = t.T
    return F.softmax_cross_entropy(model(x, lengths), process)


np.random.seed(0)
training, validation, test = draw(4000), draw(1000), draw(2000)
model = Net()
optimizer = optimizers.Adam(0.01).setup(model)
loader = DataLoader(datasets.Series(*training), BATCH)
best, waited = np.inf, 0
for epoch in range(1, EPOCHS + 1):
    for x, t in loader:
        loss = loss_of(model, x, t)
        model.cleargrads()
        loss.backward()
        optimizer.update()
    with no_grad():
        found = float(loss_of(model, *validation))
    print(f"epoch {epoch}  validation loss {found:.4f}")
    waited += 1
    if found < best:
        best, waited = found, 0
        model.save_weights("classify.npz")
    if waited == PATIENCE:
        print(f"no better for {waited} epochs: stopped")
        break
model.load_weights("classify.npz")  # the best

x, t = test
lengths, process = t.T
with no_grad():
    answers = {"LSTM": model(x, lengths).data.argmax(axis=1), "always process 1": np.ones_like(process)}
for name, answer in answers.items():
    precision, recall, f1, _ = precision_recall_fscore_support(process, answer, average="binary")
    accuracy = accuracy_score(process, answer)
    print(f"{name:17} accuracy {accuracy:.4f}  precision {precision:.4f}  recall {recall:.4f}  F1 {f1:.4f}")
