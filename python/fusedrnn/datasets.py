"""Data sets: pairs of input and target, by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Transform = Callable[[Any], Any]


class Dataset:
    """``prepare`` fills the arrays ``data`` and ``label``; sample k is ``(data[k], label[k])``.

    Without labels the second of the pair is None. An index past the end raises an IndexError, which ends an
    iteration.

    Args:
        train: For ``prepare``: True for the training set, False for the test set.
        transform: A function for each input; None: inputs do not change.
        target_transform: A function for each target; None: targets do not change.
    """

    def __init__(
        self,
        train: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        self.train = train
        self.transform = transform
        self.target_transform = target_transform
        self.data: Any = None
        self.label: Any = None
        self.prepare()

    def prepare(self) -> None:
        """Fill ``data`` and, if there are targets, ``label``."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x = self.data[index]
        t = None if self.label is None else self.label[index]
        return (
            x if self.transform is None else self.transform(x),
            t if self.target_transform is None else self.target_transform(t),
        )

    def __len__(self) -> int:
        return len(self.data)

    def is_plain(self) -> bool:
        """Whether indexing the two arrays gives the samples."""
        if type(self).__getitem__ is not Dataset.__getitem__:  # which then need not have arrays at all
            return False
        arrays = isinstance(self.data, np.ndarray) and isinstance(self.label, np.ndarray)
        return arrays and self.transform is None and self.target_transform is None


class Series(Dataset):
    """Existing arrays of inputs and targets: ``Series(x, t)``, both of length N."""

    def __init__(self, data: Any, label: Any) -> None:
        if len(data) != len(label):
            raise ValueError(f"label: expected {len(data)} rows, like data, got {len(label)}")
        self.rows = (data, label)
        super().__init__()

    def prepare(self) -> None:
        self.data, self.label = self.rows


class SinCurve(Dataset):
    """A noisy sine, or with ``train=False`` a clean cosine: 999 pairs (value k, value k + 1), each ``(1,)``.

    The curve has 1000 points over one period, the noise is uniform within ±0.05, drawn from NumPy's global
    generator. It is drawn for ``train=False`` too, so that what is drawn next does not depend on ``train``.
    """

    def prepare(self) -> None:
        x = np.linspace(0, 2 * np.pi, 1000)
        noise = np.random.uniform(-0.05, 0.05, size=x.shape)
        y = (np.sin(x) + noise if self.train else np.cos(x))[:, np.newaxis]
        self.data, self.label = y[:-1], y[1:]
