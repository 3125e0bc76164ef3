"""How time is taken on a GPU: by events of the stream, the libraries interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Run = Callable[[], Any]
WARM = 2  # calls before the first that counts: compilation, memory, choices that libraries make


class Timer(Protocol):
    """A clock for work that may go on after the call that asked for it has returned."""

    def __call__(self, run: Run, count: int) -> float:
        """Seconds that so many calls take, one after the other, to the end of their work."""


def by_events(run: Run, count: int) -> float:
    """On PyTorch's current stream. Where calls wait for the CPU, that is part of it, as for a user."""
    import torch

    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def by_clock(run: Run, count: int) -> float:
    """Of work that is done when its call returns."""
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - begin


def rounds(
    runs: Mapping[str, Run], timer: Timer, count: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a call of each in every round, and why there are none of those that failed.

    Each begins the round once in turn; its share of a round is about ``seconds``, at least one call.
    """
    calls: dict[str, int] = {}
    failed: dict[str, str] = {}
    samples: dict[str, list[float]] = {}

    def take(name: str, number: int) -> float | None:
        try:
            return timer(runs[name], number)
        except Exception as error:  # of many libraries; the others go on
            failed[name] = reason(error)
            samples.pop(name, None)
            return None

    for name in runs:
        if take(name, WARM) is not None and (once := take(name, 1)) is not None:
            calls[name] = max(1, round(seconds / max(once, 1e-9)))
            samples[name] = []
    for number in range(count):
        names = list(samples)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if (taken := take(name, calls[name])) is not None:
                samples[name].append(taken / calls[name])
    return samples, failed


def reason(error: BaseException) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
