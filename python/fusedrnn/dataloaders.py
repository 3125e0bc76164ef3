"""Batches of a data set: in random order, or as parallel sequences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusedrnn import cuda
from fusedrnn.backends.arguments import check_bools, check_sized, check_whole
from fusedrnn.datasets import Dataset

Batch = tuple[Any, Any]


class DataLoader:
    """Batches ``(x, t)`` of ``batch_size`` samples, in a new order every epoch. The last one may be smaller.

    The loader is its own iterator. An interrupted epoch continues where it stopped, until ``reset()``, also
    after a checkpoint was loaded. The order is drawn from NumPy's global generator, at the start and after
    each epoch.

    Args:
        dataset: An object with a length that returns a pair (input, target) for an index, such as a
            ``Dataset``.
        batch_size: The number of samples in a batch, at least 1.
        shuffle: False: keep the order of the data set.
        gpu: True: batches are CuPy arrays. The data set keeps NumPy arrays.

    Attributes:
        index: The order of the samples.
        iteration: The number of batches returned in this epoch.
        max_iter: The number of batches in an epoch.
        data_size: The number of samples.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        RuntimeError: ``gpu`` is True and there is no GPU.
    """

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool = True, gpu: bool = False) -> None:
        batch_size = check_whole("batch_size", batch_size)
        check_bools(shuffle=shuffle, gpu=gpu)
        if gpu:
            cuda.require_gpu("gpu=True")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.gpu = gpu
        self.data_size = check_sized("dataset", dataset)
        self.max_iter = math.ceil(self.data_size / batch_size)
        self.reset()

    def reset(self) -> None:
        """Start a new epoch."""
        self.iteration = 0
        self.index = np.random.permutation(self.data_size) if self.shuffle else np.arange(self.data_size)

    def __iter__(self) -> DataLoader:
        return self

    def __next__(self) -> Batch:
        if self.iteration >= self.max_iter:
            self.reset()
            raise StopIteration
        x, t = self.batch(self.iteration)
        self.iteration += 1
        return (cuda.as_cupy(x), cuda.as_cupy(t)) if self.gpu else (x, t)

    next = __next__

    def batch(self, k: int) -> Batch:
        """Batch k of this epoch."""
        return self.samples(self.index[k * self.batch_size : (k + 1) * self.batch_size])

    def samples(self, index: Any) -> Batch:
        """The samples at an array of indices, in arrays of the same leading shape.

        Raises:
            ValueError: The samples are not pairs of the same shapes.
        """
        dataset = self.dataset
        if isinstance(dataset, Dataset) and dataset.is_plain():
            return dataset.data[index], dataset.label[index]  # the same, without a loop over the samples
        pairs = [dataset[int(k)] for k in index.ravel()]
        try:
            x, t = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"dataset: expected pairs (input, target), all of the same shapes, got others: {error}"
            ) from error
        return x.reshape(index.shape + x.shape[1:]), t.reshape(index.shape + t.shape[1:])

    def to_cpu(self) -> None:
        """From now on, batches are NumPy arrays."""
        self.gpu = False

    def to_gpu(self) -> None:
        """From now on, batches are CuPy arrays.

        Raises:
            RuntimeError: There is no GPU, or something is missing; the message says what.
        """
        cuda.require_gpu("DataLoader.to_gpu")
        self.gpu = True


class SeqDataLoader(DataLoader):
    """The data set cut into ``batch_size`` parallel sequences, returned step by step in order.

    With ``jump = len(dataset) // batch_size``, row i of step s is the sample ``(i * jump + s) %
    len(dataset)``. An epoch has ``ceil(len(dataset) / batch_size)`` steps. A layer may keep its state from
    batch to batch.

    Args:
        dataset, gpu: As in ``DataLoader``.
        batch_size: The number of sequences, at most ``len(dataset)``.
        steps: None: a batch is one step, ``(B, ...)``. n: a batch has n steps, ``(n, B, ...)``; the last one
            of an epoch may be shorter.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        RuntimeError: ``gpu`` is True and there is no GPU.
    """

    def __init__(self, dataset: Any, batch_size: int, gpu: bool = False, *, steps: int | None = None) -> None:
        steps = None if steps is None else check_whole("steps", steps)
        super().__init__(dataset, batch_size, shuffle=False, gpu=gpu)
        if batch_size > self.data_size:
            raise ValueError(
                f"batch_size: expected at most len(dataset) = {self.data_size}, got {batch_size}"
            )
        self.steps = steps
        self.round = self.max_iter  # time steps in an epoch
        if steps is not None:
            self.max_iter = math.ceil(self.round / steps)

    def batch(self, k: int) -> Batch:
        starts = np.arange(self.batch_size) * (self.data_size // self.batch_size)
        if self.steps is None:
            return self.samples((starts + k) % self.data_size)
        times = np.arange(k * self.steps, min((k + 1) * self.steps, self.round))
        return self.samples((starts + times[:, np.newaxis]) % self.data_size)
