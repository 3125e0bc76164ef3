"""Data sets and loaders."""

import numpy as np
import pytest

from fusedrnn import DataLoader, Dataset, SeqDataLoader
from fusedrnn.datasets import Series, SinCurve

pytestmark = pytest.mark.quick


class Numbers(Dataset):
    """0, 1, 2, ... and ten times as much."""

    N = 23

    def prepare(self):
        self.data = np.arange(self.N, dtype=float)[:, np.newaxis]
        self.label = 10 * self.data


class Listed(Numbers):
    """The same in lists."""

    def prepare(self):
        super().prepare()
        self.data, self.label = list(self.data), list(self.label)


class Overridden(Numbers):
    def __getitem__(self, index):
        x, t = super().__getitem__(index)
        return x, t


class Own(Dataset):
    """All of its own, as with PyTorch's: no array, and no call of Dataset's constructor."""

    def __init__(self):
        self.numbers = Numbers()

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return self.numbers[index]


kinds = pytest.mark.parametrize("kind", [Numbers, Listed, Overridden, Own])


def test_dataset_protocol():
    data = Numbers()
    assert len(data) == 23
    assert data[3][0].item() == 3
    assert data[-1][1].item() == 220
    assert [x.item() for x, _ in data] == list(range(23))  # ends by IndexError
    with pytest.raises(IndexError):
        data[23]
    x, t = Numbers(transform=lambda x: -x, target_transform=lambda t: t + 1)[2]
    assert (x.item(), t.item()) == (-2, 21)

    class Unlabelled(Dataset):
        def prepare(self):
            self.data = np.zeros((2, 1))

    assert Unlabelled()[0][1] is None
    with pytest.raises(ValueError, match=r"label: expected 3 .* 2"):
        Series(np.zeros(3), np.zeros(2))


def test_sine_curve():
    np.random.seed(1)
    data = SinCurve()
    np.random.seed(1)
    x = np.linspace(0, 2 * np.pi, 1000)
    noisy = np.sin(x) + np.random.uniform(-0.05, 0.05, 1000)
    assert len(data) == 999
    assert data[0][0].shape == (1,)
    assert data[0][0].dtype == np.float64
    np.testing.assert_array_equal(data.data[:, 0], noisy[:-1])
    np.testing.assert_array_equal(data.label[:, 0], noisy[1:])
    np.testing.assert_array_equal(SinCurve(train=False).data[:, 0], np.cos(x)[:-1])


@kinds
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_again_and_again(kind, shuffle):
    np.random.seed(3)
    loader = DataLoader(kind(), 5, shuffle=shuffle)
    assert (loader.max_iter, loader.data_size, loader.iteration) == (5, 23, 0)
    orders = []
    for _ in range(2):
        expected = loader.index.copy()
        batches = list(loader)
        assert [len(x) for x, _ in batches] == [5, 5, 5, 5, 3]
        x = np.concatenate([x for x, _ in batches])
        assert x.shape == (23, 1)
        np.testing.assert_array_equal(np.concatenate([t for _, t in batches]), 10 * x)
        np.testing.assert_array_equal(x[:, 0], expected)
        assert sorted(x[:, 0]) == list(range(23))
        orders.append(list(x[:, 0]))
    assert (orders[0] != orders[1]) == shuffle


def test_order_is_drawn_from_the_global_generator():
    np.random.seed(3)
    loader = DataLoader(Numbers(), 5)
    np.random.seed(3)
    np.testing.assert_array_equal(loader.index, np.random.permutation(23))


def test_a_round_broken_off_goes_on_until_reset():
    loader = DataLoader(Numbers(), 5, shuffle=False)
    for _ in loader:
        break
    assert loader.iteration == 1
    assert loader.next()[0][0].item() == 5
    loader.reset()
    assert next(loader)[0][0].item() == 0


@kinds
def test_parallel_time_lines(kind):
    loader = SeqDataLoader(kind(), 4)  # jump 5, 6 steps; the last line runs on from the start
    assert loader.max_iter == 6
    for _ in range(2):
        steps = [x[:, 0] for x, t in loader if np.array_equal(t, 10 * x)]
        assert len(steps) == 6
        for s, x in enumerate(steps):
            assert list(x) == [(i * 5 + s) % 23 for i in range(4)]


@kinds
@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_chunks_are_the_steps_stacked(kind, steps):
    single = list(SeqDataLoader(kind(), 4))
    loader = SeqDataLoader(kind(), 4, steps=steps)
    chunks = list(loader)
    assert len(chunks) == loader.max_iter == -(-6 // steps)
    assert all(x.shape == t.shape == (len(x), 4, 1) and len(x) <= steps for x, t in chunks)
    for k in (0, 1):
        joined = np.concatenate([chunk[k] for chunk in chunks])
        np.testing.assert_array_equal(joined, np.stack([step[k] for step in single]))


def test_wrong_arguments_are_named():
    for call, message in (
        (lambda: DataLoader(Numbers(), 0), "batch_size: expected at least 1, got 0"),
        (lambda: SeqDataLoader(Numbers(), 24), r"batch_size: expected at most len\(dataset\) = 23, got 24"),
        (lambda: SeqDataLoader(Numbers(), 4, steps=0), "steps: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
