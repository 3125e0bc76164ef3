"""Forecasts of runoff without a network: the season, ridge regression, a bucket model, boosted trees.

Each is fitted to the measured runoff of the days from the second year to day n, and gives the runoff of all
days, ``(days, C)``. The first year is for what a fit needs to know of the past.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fusedrnn.autograd import Array
from fusedrnn.programs.catchments import YEAR

LAGS, WINDOWS = 10, (3, 7, 15, 30, 60, 90, 180, 365)  # days
PENALTIES = 10.0 ** np.arange(-1, 6)
DRAWS, ROUNDS = 50, 6
# Of the bucket model: mm of melt for each degree and day, mm that the soil holds, the share of water that
# runs off fast, and the shares of the two stores that run off in a day.
LOW, HIGH = np.array([[1, 8], [30, 800], [0.05, 0.95], [0.1, 0.9], [0.003, 0.1]]).T


def efficiency(forecast: Array, truth: Array) -> Array:
    """Of each catchment ``(C,)``: 1 is perfect, 0 as good as the mean (Nash and Sutcliffe 1970)."""
    error = np.sum((forecast - truth) ** 2, axis=0)
    found: Array = 1 - error / np.sum((truth - truth.mean(axis=0)) ** 2, axis=0)
    return found


def climatology(runoff: Array, n: int) -> Array:
    """The mean of the day of the year, over the years and the 15 days before and after it."""
    mean = runoff[YEAR:n].reshape(-1, YEAR, runoff.shape[1]).mean(axis=0)
    around = np.concatenate([mean[-15:], mean, mean[:15]])
    smooth = np.lib.stride_tricks.sliding_window_view(around, 31, axis=0).mean(axis=-1)
    return np.tile(smooth, (len(runoff) // YEAR, 1))


def features(forcing: Array) -> Array:
    """Of one catchment's weather ``(days, 3)``: ``(days, F)``, from the days up to each day.

    Rain, snow and degrees above zero of ten days one by one; means of them and of the potential evaporation
    over up to a year; rain on wet ground, warmth on snow; the season.
    """
    precipitation, temperature, potential = forcing.T
    rain = np.where(temperature > 0, precipitation, 0)
    snow, warmth = precipitation - rain, np.maximum(temperature, 0)
    day = 2 * np.pi * np.arange(len(forcing)) / YEAR

    def mean(values: Array, window: int) -> Array:
        total = np.cumsum(np.concatenate([np.zeros(window), values]))
        found: Array = (total[window:] - total[:-window]) / window
        return found

    columns = [
        np.concatenate([np.zeros(lag), values[: len(values) - lag]])
        for values in (rain, snow, warmth)
        for lag in range(LAGS)
    ]
    columns += [mean(values, w) for values in (rain, snow, warmth, potential) for w in WINDOWS]
    columns += [mean(rain, 3) * mean(precipitation - potential, w) for w in (30, 90, 180)]
    columns += [mean(warmth, w) * mean(snow, 180) for w in (1, 7, 30)]
    return np.stack([*columns, np.sin(day), np.cos(day)], axis=1)


def fit_ridge(x: Array, y: Array, penalty: float) -> tuple[Array, float]:
    """Weights and intercept."""
    middle, level = x.mean(axis=0), float(y.mean())
    centred = x - middle
    square = centred.T @ centred + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(square, centred.T @ (y - level))
    return weights, level - float(middle @ weights)


def ridge(forcing: Array, runoff: Array, n: int) -> Array:
    """One for each catchment."""
    each = [ridge_of_one(features(forcing[:, c]), y, n) for c, y in enumerate(runoff.T)]
    return np.stack(each, axis=1)


def ridge_of_one(x: Array, y: Array, n: int) -> Array:
    """From features ``(days, F)`` and runoff ``(days,)``. The penalty serves the last quarter of the training
    days best.
    """
    x = x / (x[YEAR:n].std(axis=0) + 1e-9)
    known = n - (n - YEAR) // 4

    def error(penalty: float) -> float:
        weights, level = fit_ridge(x[YEAR:known], y[YEAR:known], penalty)
        return float(np.sum((x[known:n] @ weights + level - y[known:n]) ** 2))

    weights, level = fit_ridge(x[YEAR:n], y[YEAR:n], min(PENALTIES, key=error))
    runoff: Array = np.maximum(x @ weights + level, 0)
    return runoff


def bucket_days(forcing: Array, parameters: Array) -> Iterator[Array]:
    """The runoff of one day after the other, ``(C, D)``, of parameters ``(5, C, D)``."""
    factor, capacity, share, fast, slow = parameters
    snow, soil, quick, base = np.zeros((4, *factor.shape))
    for precipitation, temperature, potential in np.swapaxes(forcing, 1, 2)[..., np.newaxis]:
        rain = np.where(temperature > 0, precipitation, 0)
        melt = np.minimum(snow, factor * np.maximum(temperature, 0))
        snow += precipitation - rain - melt
        liquid = rain + melt
        passed = liquid * (soil / capacity) ** 2
        soil += liquid - passed
        passed += np.maximum(soil - capacity, 0)
        soil = np.minimum(soil, capacity)
        soil -= np.minimum(potential / capacity, 1) * soil
        quick += share * passed
        base += (1 - share) * passed
        runoff = fast * quick + slow * base
        quick -= fast * quick
        base -= slow * base
        yield runoff


def bucket(forcing: Array, runoff: Array, n: int) -> Array:
    """Calibrated for each catchment: three rounds of random parameters, three more around the best."""
    rng = np.random.default_rng(0)
    count = runoff.shape[1]
    best, least = np.full((5, count, 1), 0.5), np.full((count, 1), np.inf)
    low, ratio = (a[:, np.newaxis, np.newaxis] for a in (LOW, HIGH / LOW))
    for k in range(ROUNDS):
        u = rng.random((5, count, DRAWS))
        if k >= ROUNDS // 2:
            u = np.clip(best + 0.2 / 2 ** (k - ROUNDS // 2) * (2 * u - 1), 0, 1)
        error = np.zeros((count, DRAWS))
        for t, found in enumerate(bucket_days(forcing[:n], low * ratio**u)):
            if t >= YEAR:
                error += (found - runoff[t, :, np.newaxis]) ** 2
        first = error.argmin(axis=1)[:, np.newaxis]
        error = np.take_along_axis(error, first, 1)
        better = error < least
        best = np.where(better, np.take_along_axis(u, first[np.newaxis], 2), best)
        least = np.minimum(error, least)
    return np.concatenate(list(bucket_days(forcing, low * ratio**best)), axis=1).T


def trees(forcing: Array, runoff: Array, attributes: Array, n: int, seen: int) -> Array:
    """One for all: fitted to the first ``seen`` catchments, which it tells apart by their attributes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    days, count = runoff.shape
    x = np.concatenate(
        [np.hstack([features(forcing[:, c]), np.tile(attributes[c], (days, 1))]) for c in range(count)],
        dtype=np.float32,
    ).reshape(count, days, -1)
    deviation = runoff[YEAR:n, :seen].std(axis=0)
    weight = np.repeat(1 / (deviation + 0.1) ** 2, n - YEAR)  # as in the network's loss
    model = HistGradientBoostingRegressor(max_iter=400, early_stopping=True, random_state=0)
    model.fit(x[:seen, YEAR:n].reshape(-1, x.shape[2]), runoff[YEAR:n, :seen].T.ravel(), weight)
    found: Array = np.maximum(model.predict(x.reshape(-1, x.shape[2])), 0)
    return found.reshape(count, days).T
