"""Losses with a mask. Their gradients are in test_autograd.py, with those of every function."""

import numpy as np
import pytest

import fusedrnn.functions as F
from fusedrnn import Variable

pytestmark = pytest.mark.quick

MASK = np.arange(5)[:, None] < [5, 2, 0]  # of rows of these lengths
LABELS = np.arange(15).reshape(5, 3) % 4


def test_masked_losses_are_means_over_what_is_left():
    rng = np.random.default_rng(2)
    y, t = rng.standard_normal((2, 5, 3, 2))
    np.testing.assert_allclose(F.mean_squared_error(y, t, MASK).data, ((y - t) ** 2)[MASK].mean(), rtol=1e-14)
    each = rng.random((5, 3, 2)) < 0.5
    np.testing.assert_allclose(
        F.mean_squared_error(y, t, each.astype(int)).data, ((y - t) ** 2)[each].mean(), rtol=1e-14
    )
    rows = F.mean_squared_error(y[0], t[0], [1, 0, 1])
    np.testing.assert_allclose(rows.data, ((y[0] - t[0]) ** 2)[[0, 2]].mean(), rtol=1e-14)
    x = rng.standard_normal((5, 3, 4))
    kept = F.softmax_cross_entropy(x[MASK], LABELS[MASK])
    np.testing.assert_allclose(F.softmax_cross_entropy(x, LABELS, MASK).data, kept.data, rtol=1e-14)
    whole = F.softmax_cross_entropy(x.reshape(15, 4), LABELS.ravel())
    for mask in (None, np.ones((5, 3), bool)):
        np.testing.assert_allclose(F.softmax_cross_entropy(x, LABELS, mask).data, whole.data, rtol=1e-14)


def test_what_is_masked_does_no_harm():
    rng = np.random.default_rng(3)
    for dtype in (np.float32, np.float64):
        y, t = rng.standard_normal((2, 5, 3, 2)).astype(dtype)
        x, labels = rng.standard_normal((5, 3, 4)).astype(dtype), LABELS.copy()
        expected = [F.mean_squared_error(y, t, MASK), F.softmax_cross_entropy(x, labels, MASK)]
        y[~MASK], t[~MASK], x[~MASK], labels[~MASK] = np.inf, np.nan, np.nan, -100
        a, b = Variable(y), Variable(x)
        found = [F.mean_squared_error(a, t, MASK), F.softmax_cross_entropy(b, labels, MASK)]
        for loss, same, v in zip(found, expected, (a, b), strict=True):
            assert loss.dtype == dtype
            assert loss.data == same.data
            loss.backward()
            assert np.isfinite(v.grad.data).all()
            assert (v.grad.data[~MASK] == 0).all()
            assert (v.grad.data[MASK] != 0).all()
        nothing = F.mean_squared_error(a, t, np.zeros((5, 3), bool))
        assert nothing.data == 0
        a.cleargrad()
        nothing.backward()
        assert (a.grad.data == 0).all()
        assert F.softmax_cross_entropy(b, labels, np.zeros((5, 3), bool)).data == 0


def test_wrong_masks_are_named():
    y, x = np.ones((5, 3, 2)), np.ones((5, 3, 4))
    for call, words in (
        (lambda: F.mean_squared_error(y, y, MASK.T), r"mask: expected shape \(5, 3\) or \(5, 3, 2\), got"),
        (
            lambda: F.softmax_cross_entropy(x, LABELS, x > 0),
            r"mask: expected shape \(5, 3\), got \(5, 3, 4\)",
        ),
        (lambda: F.mean_squared_error(y, y, 0.5 * MASK), r"mask: expected booleans, or 0 and 1, got 0\.5"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
