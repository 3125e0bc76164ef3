"""Which of two noisy processes made a sequence? Variable lengths, best model kept, early stopping (PyTorch).

    python examples/torch/classify.py --compare

Both processes are x[t] = a x[t-1] + noise, with a = -0.4 or a = 0.4, and of the same mean and variance: only
the order of the values tells them apart. Where a is known, the likelihood ratio is the best there is.
"""

import copy
import time

import side_by_side
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fusedrnn.programs.common import at_least

COEFFICIENTS, SHORTEST, LONGEST, BATCH = (-0.4, 0.4), 10, 50, 64
DEVIATION = 0.5  # at 1, Adam with 0.01 is so near to instability that rounding errors grow within 20 steps


class Net(nn.Module):
    def __init__(self, lstm_class):
        super().__init__()
        self.lstm = lstm_class(1, 64, batch_first=True)
        self.fc = nn.Linear(64, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.fc(h[-1])  # the state after each sequence's own last step


def build(layers):
    if layers == "torch":
        from torch.nn import LSTM
    else:
        from fusedrnn.torch import LSTM  # all that differs
    return Net(LSTM)


def draw(count):
    """Sequences x (count, 50, 1) padded with zeros, lengths, and which process it was."""
    label = torch.randint(2, (count,))
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,))
    a = torch.tensor(COEFFICIENTS)[label]
    steps = [torch.randn(count)]
    for _ in range(LONGEST - 1):
        steps.append(a * steps[-1] + (1 - a * a).sqrt() * torch.randn(count))
    x = DEVIATION * torch.stack(steps, 1) * (torch.arange(LONGEST) < lengths[:, None])
    return x[:, :, None], lengths, label


def likelihood_ratio(x, lengths):
    """The best possible answer, from the processes themselves."""
    x = x[:, :, 0]
    valid = torch.arange(1, LONGEST) < lengths[:, None]
    scores = []
    for a in COEFFICIENTS:
        variance = DEVIATION**2 * (1 - a * a)
        error = (x[:, 1:] - a * x[:, :-1]).square() / variance
        scores.append(-(valid * (error + torch.tensor(variance).log())).sum(1))
    return torch.stack(scores, 1).argmax(1)


@torch.no_grad()
def validate(model, x, lengths, label):
    return nn.functional.cross_entropy(model(x, lengths), label).item()


def train(args, training, validation):
    """Returns the best model by the validation loss, the loss of every step, and the seconds."""
    torch.manual_seed(args.seed)
    model = build(args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, lengths, label = training
    best, best_loss, waited = copy.deepcopy(model.state_dict()), float("inf"), 0
    losses, start = [], time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[rows], lengths[rows]), label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found = validate(model, *validation)
        print(f"epoch {epoch:2}  validation loss {found:.4f}")
        waited += 1
        if found < best_loss:
            best, best_loss, waited = copy.deepcopy(model.state_dict()), found, 0
        if waited == args.patience:
            print(f"no better for {waited} epochs: stopped")
            break
    seconds = time.perf_counter() - start
    model.load_state_dict(best)
    return model, losses, seconds


def report(name, predicted, label):
    """Accuracy; precision, recall and F1 of process 1."""
    hits = (predicted & label).sum().item()
    precision = hits / max(1, predicted.sum().item())
    recall = hits / max(1, label.sum().item())
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    accuracy = (predicted == label).float().mean().item()
    print(f"{name:32} {accuracy:8.4f} {precision:9.4f} {recall:6.4f} {f1:6.4f}")
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": f1}


def program(args):
    torch.manual_seed(args.seed)
    training, validation, test = draw(args.size), draw(args.size // 4), draw(2000)
    model, losses, seconds = train(args, training, validation)
    x, lengths, label = test
    with torch.no_grad():
        predicted = model(x, lengths).argmax(1)
    print(f"{'test: 2000 sequences':32} accuracy precision recall     F1")
    scores = {"LSTM": report("LSTM", predicted, label)}
    report("always process 1", torch.ones_like(label), label)
    report("likelihood ratio (a is known)", likelihood_ratio(x, lengths), label)
    return losses, seconds, scores


def arguments():
    options = side_by_side.parser(__doc__, epochs=30)
    options.add_argument(
        "--size", type=at_least(4), default=4000, help="training sequences (default: %(default)s)"
    )
    options.add_argument("--patience", type=at_least(1), default=6, help="epochs without a better one")
    return options


if __name__ == "__main__":
    side_by_side.main(arguments().parse_args(), program)
