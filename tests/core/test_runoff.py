"""Rainfall and runoff: the generated catchments, the forecasts without a network, the program."""

import argparse
import sys
import types

import numpy as np
import pytest

from fusedrnn import terminal
from fusedrnn.programs import catchments, runoff, simple_runoff, speed
from fusedrnn.programs.catchments import YEAR


def constant(days, precipitation, temperature, potential, count=3):
    return np.broadcast_to([precipitation, temperature, potential], (days, count, 3)).astype(float)


@pytest.fixture
def small(monkeypatch):
    """Two years of training, one of test; little calibration, and no timing to speak of."""
    for module, name, value in (
        (runoff, "TRAINING", 2),
        (runoff, "TEST", 1),
        (simple_runoff, "ROUNDS", 2),
        (speed, "TIMED", 1),
    ):
        monkeypatch.setattr(module, name, value)


# --- the catchments ---------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_seed_gives_the_same_catchments():
    one, same, other = (catchments.draw(seed, 3, 1) for seed in (5, 5, 6))
    for a, b, c in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    assert one.forcing.shape == (YEAR, 3, 3)
    assert one.runoff.shape == one.exact.shape == (YEAR, 3)
    assert one.site.shape == (3, 6)


def made(count=3):
    rng = np.random.default_rng(0)
    site = catchments.Site(*rng.uniform(0.2, 0.9, (6, count)))._replace(relief=np.linspace(0, 600, count))
    return rng, site, catchments.draw_parameters(rng, site)


@pytest.mark.quick
def test_no_water_is_lost_or_made():
    rng, site, parameters = made()
    forcing = catchments.draw_weather(rng, site._replace(elevation=np.array([200, 900, 1800])), 2 * YEAR)
    assert (forcing[:, :, 1] < 0).mean() > 0.1  # there is snow
    water = catchments.flow(forcing, site.relief, parameters)
    total = np.cumsum(forcing[:, :, 0] - water.runoff - water.evaporation, axis=0)
    np.testing.assert_allclose(water.storage, total, rtol=1e-9, atol=1e-6)
    assert water.runoff.min() >= 0
    assert water.storage.min() >= -1e-9
    assert np.all(water.evaporation >= 0)
    assert np.all(water.evaporation <= forcing[:, :, 2])


@pytest.mark.quick
def test_runoff_in_a_steady_state_and_in_frost():
    _, site, parameters = made()
    water = catchments.flow(constant(4 * YEAR, 4, 12, 1), site.relief, parameters)
    np.testing.assert_allclose(water.runoff[-1], 4 - water.evaporation[-1], rtol=1e-3)
    assert np.all(water.evaporation[-1] > 0.5)
    frozen = catchments.flow(constant(YEAR, 4, -20, 0), site.relief, parameters)
    assert not frozen.runoff.any()
    np.testing.assert_allclose(frozen.storage[-1], 4 * YEAR)


@pytest.mark.quick
def test_routing_delays_and_keeps_the_volume():
    pulse = np.zeros((10, 2))
    pulse[0] = 1
    out = catchments.route(pulse, np.array([1.0, 4.0]))
    np.testing.assert_allclose(out[:, 0], pulse[:, 0], atol=1e-12)
    np.testing.assert_allclose(out[:5, 1], [0.125, 0.375, 0.375, 0.125, 0], atol=1e-12)


# --- without a network ------------------------------------------------------------------------------------


def weather(days, count=2, temperature=10.0):
    rng = np.random.default_rng(1)
    forcing = constant(days, 0, temperature, 1, count).copy()
    forcing[:, :, 0] = rng.gamma(0.5, 8, (days, count))
    return forcing


@pytest.mark.quick
def test_climatology_knows_a_season():
    season = 2 + np.sin(2 * np.pi * np.arange(4 * YEAR) / YEAR)[:, np.newaxis]
    found = simple_runoff.climatology(season, 3 * YEAR)
    assert simple_runoff.efficiency(found[3 * YEAR :], season[3 * YEAR :]) > 0.999
    assert simple_runoff.efficiency(np.full_like(season, season.mean()), season) == pytest.approx(0)


@pytest.mark.quick
def test_ridge_finds_what_is_linear_in_the_lags():
    forcing, n = weather(4 * YEAR), 3 * YEAR
    rain = forcing[:, :, 0]
    q = 1 + 0.4 * rain
    q[9:] += 0.3 * rain[:-9]
    q[90:] += np.cumsum(rain, axis=0)[90:] / 90 - np.cumsum(rain, axis=0)[:-90] / 90
    found = simple_runoff.ridge(forcing, q, n)
    assert simple_runoff.efficiency(found[n:], q[n:]).min() > 0.999
    unrelated = simple_runoff.ridge(forcing, weather(4 * YEAR)[::-1, :, 0], n)
    assert unrelated[n:].std(axis=0).max() < 2  # of 5.7


@pytest.mark.quick
def test_features_know_no_later_day():
    forcing = weather(2 * YEAR)[:, 0]
    changed = forcing.copy()
    changed[500:] += 5
    a, b = simple_runoff.features(forcing), simple_runoff.features(changed)
    np.testing.assert_allclose(a[:500], b[:500], atol=1e-9)
    assert np.abs(a[500] - b[500]).max() > 1


@pytest.mark.quick
def test_bucket_is_calibrated_to_a_bucket():
    days, n = np.arange(3 * YEAR), 2 * YEAR
    forcing = weather(3 * YEAR)
    forcing[:, :, 1] = -10 * np.cos(2 * np.pi * (days - 260) / YEAR)[:, np.newaxis] - 1
    known = np.array([[3, 5], [200, 90], [0.3, 0.7], [0.5, 0.3], [0.01, 0.03]])[:, :, np.newaxis]
    q = np.stack(list(simple_runoff.bucket_days(forcing, known)))[:, :, 0]
    found = simple_runoff.bucket(forcing, q, n)
    assert simple_runoff.efficiency(found[n:], q[n:]).min() > 0.95
    stored = forcing[:, :, 0].sum(axis=0) - q.sum(axis=0)
    assert np.all(stored > 0)


@pytest.mark.quick
def test_trees_are_fitted_to_training_days_of_catchments_seen(monkeypatch):
    """With something in their place that predicts today's rain plus twice the attribute."""
    forcing, n = weather(3 * YEAR, count=3), 2 * YEAR
    attributes = np.array([[0.0], [1.0], [-1.0]])
    q = forcing[:, :, 0] + 2 * attributes.T
    fits = []

    class Regressor:
        def __init__(self, **options):
            pass

        def fit(self, x, y, weight):
            fits.append((x, y, weight))

        def predict(self, x):
            return x[:, 0] + 2 * x[:, -1]

    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    ensemble = types.SimpleNamespace(HistGradientBoostingRegressor=Regressor)
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", ensemble)
    found = simple_runoff.trees(forcing, q, attributes, n, seen=2)
    np.testing.assert_allclose(found, np.maximum(q, 0), atol=1e-5)
    ((x, y, weight),) = fits
    assert len(x) == 2 * YEAR
    np.testing.assert_allclose(y, x[:, 0] + 2 * x[:, -1], atol=1e-5)
    np.testing.assert_allclose(weight[[0, -1]], 1 / (q[YEAR:n, :2].std(axis=0) + 0.1) ** 2)


# --- the program ------------------------------------------------------------------------------------------


def run(*given):
    parser = argparse.ArgumentParser()
    runoff.add_arguments(parser)
    lines, tables = [], []

    class Report(terminal.Report):
        def line(self, text):
            lines.append(text)

        def table(self, title, columns, rows):
            tables.append((columns, rows))

    given = ["--catchments", "4", "--no-plot", *given]
    return runoff.run(parser.parse_args(given), Report()), lines, tables


@pytest.mark.quick
def test_the_program(small):
    result, lines, ((columns, rows),) = run("--epochs", "3")
    assert len(result.losses) == 3
    assert result.losses[-1] < result.losses[0]
    assert columns == ("", "median", "worst tenth", "best of 4", "never seen: median")
    medians = [float(row[1]) for row in rows]
    assert medians == sorted(medians, reverse=True)
    assert sum(int(row[3]) for row in rows) == 4
    assert "LSTM, this library" in [row[0] for row in rows if row[4]]
    assert any(line.startswith("By median, LSTM, this library ") for line in lines)
    assert any(line.startswith("Speed: ") for line in lines)


@pytest.mark.quick
def test_without_scikit_learn_it_says_so_before_the_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'fusedrnn\[examples\]'"):
        run("--trees")


def test_the_test_years_are_never_seen(small, monkeypatch):
    """Measure other runoff in them, and on the catchments never seen: no forecast moves."""
    found = []
    judge = runoff.judge
    monkeypatch.setattr(runoff, "judge", lambda f, *rest: found.append(f) or judge(f, *rest))
    run("--epochs", "1")
    draw = catchments.draw

    def changed(seed, count, years):
        data = draw(seed, count, years)
        data.runoff[3 * YEAR :] *= 2
        data.runoff[:, 4:] *= 3
        return data

    monkeypatch.setattr(catchments, "draw", changed)
    run("--epochs", "1")
    before, after = found
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.quick
def test_a_year_carries_its_state_to_the_next():
    """A training's chunks, one after the other, are what the prediction computes in one call."""
    data = catchments.draw(0, 5, 2)
    inputs = runoff.prepare(data, 4, 2 * YEAR)
    np.random.seed(0)
    model = runoff.build(inputs.x.shape[2])
    trained = runoff.train(model, inputs.part, 4, 1)
    chunks = [model(x).data[:, :, 0] for x, _ in trained.loader]
    whole = runoff.predict(model, inputs)[:, :4]
    np.testing.assert_allclose(
        np.maximum(np.concatenate(chunks), 0) * inputs.scale, whole, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(inputs.part.label.reshape(4, -1, 2)[:, :YEAR, 1], 0)


@pytest.mark.quick
def test_sketch():
    assert runoff.sketch(np.repeat([0.0, 1.0, 8.0], 5), 8.0) in ("▁▂█", "_.#")
