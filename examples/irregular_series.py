"""What irregular.py and torch/irregular.py share: series, a cell, forecasts without a network, the table.

A series is the sum of a slow, a fast and an oscillating process, each stationary and Gaussian, observed with
noise after random gaps. Asked for is the next observation; the gap to it is known. The processes are linear:
a Kalman filter that knows them gives the best possible prediction.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from fusedrnn.cells import cell, exp, gru, sigmoid, tanh
from fusedrnn.cells.zoo import cfc

STEPS, BATCH, HIDDEN, RATE, TEST = 64, 64, 32, 0.01, 512
LAST = 8  # what the linear regression sees; steps before it are not scored
AMPLITUDE, TAU, PERIOD = np.array([[0.7, 20, np.inf], [0.5, 1, np.inf], [0.7, 10, 6]]).T
NOISE, MEDIAN_GAP, GAP_SPREAD = 0.1, 0.5, 1.0  # gaps are log-normal


@cell
def decaying_gru(p, x, h, *, dt):
    """A GRU's step with what is observed; then each unit decays at its own rate until the next observation.

    The time constants start between a short gap and a whole series: e**-2 to e**4.
    """
    r, z = sigmoid(p.dense("r z", x, h))
    n = tanh(p.dense("n", x) + r * p.dense("n", h))
    return exp(-dt * exp(p.vector("log_rate", init=(-4, 2)))) * (n + z * (h - n))


# The cell, and whether the logarithm of the gap is an input.
NETWORKS = {
    "GRU without gaps": (gru, False),
    "GRU, gap as an input": (gru, True),
    "CfC, gap in the cell": (cfc, False),
    "decaying GRU, gap in the cell": (decaying_gru, False),
}


def draw(count, seed):
    """Values (STEPS + 1, count), and the gap after each but the last, (STEPS, count)."""
    random = np.random.default_rng(seed)
    gaps = MEDIAN_GAP * np.exp(GAP_SPREAD * random.standard_normal((STEPS, count)))
    state = random.standard_normal((count, 3)) + 1j * random.standard_normal((count, 3))
    states = [state]
    for dt in gaps:
        a = transition(dt)
        fresh = random.standard_normal((count, 3)) + 1j * random.standard_normal((count, 3))
        state = a * state + np.sqrt(1 - abs(a) ** 2) * fresh
        states.append(state)
    values = np.array(states).real @ AMPLITUDE
    return values + NOISE * random.standard_normal(values.shape), gaps


def transition(dt):
    """How each process goes on over gaps (B,), as complex factors (B, 3)."""
    return np.exp((-1 / TAU + 2j * np.pi / PERIOD) * dt[:, None])


def inputs(values, gaps, gap_is_input):
    """x (T, B, 1 or 2), the gaps and the targets (T, B, 1), in float32."""
    features = [values[:-1], np.log(gaps / MEDIAN_GAP)][: 1 + gap_is_input]
    arrays = np.stack(features, axis=2), gaps, values[1:, :, None]
    return [a.astype(np.float32) for a in arrays]


def linear_regression(training, values, gaps):
    """Of the last values and gaps, fitted by least squares; 0 for the steps before."""

    def features(values, gaps):
        rows = [np.stack([v[k : STEPS - LAST + 1 + k] for k in range(LAST)]) for v in (values, np.log(gaps))]
        return np.concatenate([*rows, np.ones((1, *rows[0].shape[1:]))])  # (2 * LAST + 1, steps, B)

    x, y = features(*training), training[0][LAST:]
    weights = np.linalg.lstsq(x.reshape(len(x), -1).T, y.ravel(), rcond=None)[0]
    return np.concatenate(
        [np.zeros((LAST - 1, values.shape[1])), np.tensordot(weights, features(values, gaps), 1)]
    )


def kalman_filter(values, gaps):
    """The best possible prediction, from the processes themselves; a state has two parts for each."""
    count = values.shape[1]
    observed = np.stack([AMPLITUDE, np.zeros(3)], axis=1).ravel()
    mean, covariance = np.zeros((count, 6)), np.tile(np.eye(6), (count, 1, 1))
    predictions = []
    for value, dt in zip(values[:-1], gaps, strict=True):
        shared = covariance @ observed
        gain = shared / (shared @ observed + NOISE**2)[:, None]
        mean = mean + gain * (value - mean @ observed)[:, None]
        covariance = covariance - gain[:, :, None] * shared[:, None]
        a, F = transition(dt), np.zeros((count, 6, 6))
        for k in range(3):
            F[:, 2 * k, 2 * k] = F[:, 2 * k + 1, 2 * k + 1] = a[:, k].real
            F[:, 2 * k + 1, 2 * k], F[:, 2 * k, 2 * k + 1] = a[:, k].imag, -a[:, k].imag
        mean = (F @ mean[:, :, None])[:, :, 0]
        fresh = np.repeat(1 - abs(a) ** 2, 2, axis=1)
        covariance = F @ covariance @ F.transpose(0, 2, 1) + fresh[:, :, None] * np.eye(6)
        predictions.append(mean @ observed)
    return np.array(predictions)


def rmse(predictions, values):
    return float(np.sqrt(np.mean((predictions - values[1:])[LAST - 1 :] ** 2)))


def arguments(text):
    """The options of both; ``text`` is the script's docstring."""
    options = argparse.ArgumentParser(description=text.partition("\n")[0])
    options.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    options.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    options.add_argument("--series", type=int, default=1024, help="of training (default: %(default)s)")
    options.add_argument("--json", metavar="FILE", help="where what was found goes")
    return options


def compare(train, args):
    """Every forecast's RMSE on held-out series, printed; ``train`` trains one network and predicts.

    Returns what was found, and the held-out series with each network's predictions of the first seed.
    """
    training, test = draw(args.series, seed=1), draw(TEST, seed=2)
    values = test[0]
    baselines = {
        "last value": rmse(values[:-1], values),
        f"linear regression, last {LAST} values and gaps": rmse(linear_regression(training, *test), values),
        "Kalman filter that knows the processes": rmse(kalman_filter(*test), values),
    }
    for name, score in baselines.items():
        print(f"{name:46} RMSE {score:.4f}")
    networks, predictions = {}, {}
    for name, (its_cell, gap_is_input) in NETWORKS.items():
        runs = []
        for seed in range(args.seeds):
            parameters, losses, predicted = train(its_cell, gap_is_input, training, test, seed, args.epochs)
            runs.append({"seed": seed, "rmse": rmse(predicted, values), "losses": losses})
            predictions.setdefault(name, predicted)
        networks[name] = {"parameters": parameters, "runs": runs}
        scores = [run["rmse"] for run in runs]
        spread = f"{np.mean(scores):.4f}, {min(scores):.4f} to {max(scores):.4f}"
        print(f"{name:46} RMSE {spread}; {parameters} parameters")
    found = {"series": args.series, "epochs": args.epochs, "baselines": baselines, "networks": networks}
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found, (*test, predictions)
