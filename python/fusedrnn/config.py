"""Settings of the calling thread: whether a graph is recorded, and whether dropout is active."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from fusedrnn.backends.arguments import check_bool


class Config(threading.local):
    """Settings of the calling thread."""

    enable_backprop = True  # record a graph
    train = True  # dropout is active


config = Config()


@contextlib.contextmanager
def using_config(name: str, value: bool) -> Iterator[None]:
    """Set ``enable_backprop`` or ``train`` within a ``with`` block.

    Raises:
        ValueError: ``name`` is neither of the two.
        TypeError: ``value`` is not True or False.
    """
    if name not in ("enable_backprop", "train"):
        raise ValueError(f"name: expected 'enable_backprop' or 'train', got {name!r}")
    check_bool("value", value)
    old = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, old)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Within the block, no graph is recorded and nothing is kept for a backward pass."""
    return using_config("enable_backprop", False)


def test_mode() -> contextlib.AbstractContextManager[None]:
    """Within the block, dropout does nothing and zoneout uses its mean, as in evaluation."""
    return using_config("train", False)
