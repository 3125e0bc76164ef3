"""A model of the time of forward + backward on any number of cores, from figures measured on one and two.

It adds up what takes time, as if nothing overlapped but products and what they read from the second cache,
and is meant for questions such as "are 32 cores worth it?", not for per cent. What it assumes about more
cores than were measured stands in docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK = 16  # units that are computed together
ELEMENT = 4  # bytes of a float32
GATES = 4  # the LSTM's, of which each saves as many values and c for backward
MANY_WEIGHTS = 1e5  # from here on packing runs on all threads


class Split(NamedTuple):
    """What ``_core.testing.split`` returns."""

    threads: int
    by_rows: bool
    chunks: int  # of steps, in backward

    def __str__(self) -> str:
        return "1" if self.threads == 1 else f"{self.threads} by {'rows' if self.by_rows else 'units'}"


@dataclass(frozen=True)
class Machine:
    """Measured figures: seconds, bytes, and operations or bytes a second."""

    rate: float  # operations of one core in a large matrix product
    l1: float  # bytes that a core keeps in its first cache
    l2: float  # and in its second
    l3: float  # and all of them together
    l2_read: float  # of one core
    l3_read: float  # of one core while all read
    memory_read: float  # of one core
    memory_read_all: float  # of all the measured cores together
    cores: int  # how many those were
    barrier: float  # of two threads
    transfer: float  # of a cache line from one core to another and its being seen there
    region: float  # to begin and end a region of two threads, awake
    wake: float  # the same where the second slept
    call: float  # forward + backward with hardly any arithmetic, one thread
    step: float  # what each further step adds to that
    unit: float  # the cell of one unit, row and step, beyond its products
    weight: float  # packing one weight

    def barrier_of(self, threads: int) -> float:
        """Every further thread takes the counter's line to count itself and the gate's line to be let out."""
        return self.barrier + 2 * self.transfer * (threads - 2) if threads > 1 else 0.0

    def region_of(self, threads: int) -> float:
        """The caller starts and awaits one worker after the other."""
        return self.region * (threads - 1)

    def memory(self, threads: int, grows: bool) -> float:
        """Bytes a second of so many cores together. Beyond those measured it stays, or grows with them."""
        if threads <= self.cores:
            return min(threads * self.memory_read, self.memory_read_all)
        return self.memory_read_all * (threads / self.cores if grows else 1)


def beyond(machine: Machine, own: float, together: float, threads: int, memory: float) -> float:
    """Seconds in which every thread reads ``own`` bytes, of ``together`` in all, from beyond its caches."""
    if own <= machine.l2:
        return 0.0
    return own / machine.l3_read if together <= machine.l3 else own * threads / memory


def parts(
    machine: Machine,
    shape: Sequence[int],
    split: Split,
    cores: int,
    grows: bool = False,
    asleep: bool = False,
) -> dict[str, float]:
    """Seconds of each part of forward + backward of a float32 LSTM, for the thread with the most to do.

    Args:
        machine: The measured figures.
        shape: T, B, I, H.
        split: What the kernels do with ``cores`` threads, or another that is to be compared.
        cores: How many threads packing may take.
        grows: Whether the bandwidth of the memory grows with the cores, or stays as measured.
        asleep: Whether the workers have to be woken, forward and backward: so it is in a program that does
            something else in between. All wake at the same time.
    """
    T, B, I, H = shape
    n = split.threads
    padded = BLOCK * math.ceil(H / BLOCK)
    rows = math.ceil(B / n) if split.by_rows else B
    units = padded if split.by_rows else BLOCK * math.ceil(padded // BLOCK / n)
    others = (n - 1) / n  # of what all threads made, the share of the others
    columns = I + H
    memory = machine.memory(n, grows)

    # Steps: the forward product, and backward's chain; chunks: dx and the weight gradients, evenly shared.
    in_steps = 2 * T * rows * GATES * units * (columns + H) / machine.rate
    in_chunks = 2 * T * B * GATES * (padded * columns + H * BLOCK * math.ceil(I / BLOCK)) / n / machine.rate

    near = far = 0.0  # seconds of reading weights: from a core's second cache, and from beyond
    for k in (columns, H):  # forward, backward
        own = GATES * ELEMENT * units * k
        if machine.l1 < own <= machine.l2:
            near += T * own / machine.l2_read
        else:
            far += T * beyond(machine, own, GATES * ELEMENT * padded * k, n, memory)
    gradients = GATES * ELEMENT * padded * columns  # every chunk adds to them: read and written
    far += 2 * split.chunks * beyond(machine, gradients / n, gradients, n, memory)

    # Written once and read once: the gates and c; y, dy, x twice, dx.
    tape = T * B * ELEMENT * (2 * (GATES + 1) * padded + 3 * H + 3 * I)
    saved = T * B * ELEMENT * (GATES + 1) * padded

    # By units, each step reads all rows of h and of da; weight gradients read whole columns of the chunk.
    per_step = 0 if split.by_rows else T * B * (H + GATES * H)
    per_chunk = T * B * (columns + GATES * H / n)

    regions = 4 if GATES * H * columns > MANY_WEIGHTS else 2
    meetings = 1 + 2 * split.chunks + (0 if split.by_rows else 2 * T)
    packers = cores if GATES * H * columns > MANY_WEIGHTS else 1
    return {
        "products": in_steps + in_chunks,
        "cells": T * rows * units * machine.unit,
        "weights": max(0.0, near - in_steps) + far,
        "memory": tape / memory if saved > machine.l3 else 0.0,
        "exchange": (per_step + per_chunk) * ELEMENT * others / machine.l3_read,
        "barriers": meetings * machine.barrier_of(n),
        "fixed": machine.call
        + T * machine.step
        + 3 * GATES * H * columns * machine.weight / packers  # packed, packed transposed, unpacked
        + (regions * machine.region_of(n) + 2 * asleep * machine.wake if n > 1 else 0.0),
    }


def seconds(machine: Machine, shape: Sequence[int], split: Split, cores: int, **options: bool) -> float:
    """The sum of the parts."""
    return sum(parts(machine, shape, split, cores, **options).values())


def alternatives(shape: Sequence[int], cores: int, chunks: int) -> Iterator[Split]:
    """Every split of a shape that has something to do for all its threads."""
    _, B, _, H = shape
    for by_rows, most in ((True, B), (False, math.ceil(H / BLOCK))):
        for threads in range(1, min(cores, most) + 1):
            yield Split(threads, by_rows, chunks)


def best(machine: Machine, shape: Sequence[int], cores: int, chunks: int, **options: bool) -> Split:
    """The fastest of them by the model."""

    def time(split: Split) -> float:
        return seconds(machine, shape, split, cores, **options)

    return min(alternatives(shape, cores, chunks), key=time)


class Fit(NamedTuple):
    """``time = factor * value ** exponent``."""

    exponent: float
    factor: float
    worst: float  # the largest distance of a point from the line, relative to it

    def at(self, values: Sequence[float]) -> np.ndarray:
        return self.factor * np.asarray(values, float) ** self.exponent


def fit(values: Sequence[float], times: Sequence[float]) -> Fit:
    """The straight line through the logarithms, by least squares."""
    exponent, factor = np.polyfit(np.log(values), np.log(times), 1)
    line = Fit(float(exponent), math.exp(factor), 0.0)
    return line._replace(worst=float(np.max(np.abs(np.asarray(times) / line.at(values) - 1))))


def upper_half(values: Sequence[float]) -> slice:
    """The larger values, the middle one included: fixed costs no longer bend the line there."""
    return slice(len(values) // 2, None)


def machine_of(measured: Mapping[str, float]) -> Machine:
    """The figures as a file holds them."""
    return Machine(**{key: measured[key] for key in Machine.__dataclass_fields__})
