"""What every test shares: where helper modules lie, and settings put back as they were.

Not in tests/: its folders ``torch`` and ``numba`` would then be importable, as empty packages of these names.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

# Seeded: a failure is the same on every run. Deadlines would measure the machine.
settings.register_profile(
    "fusedrnn", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("fusedrnn")


# Tests import from each other, from tests/support and from tools, in child processes too.
FOLDERS = [
    str(Path(__file__).parent / name)
    for name in ("tools", *(f"tests/{name}" for name in ("support", "core", "cpu", "cells", "cuda", "torch")))
]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

if other := os.environ.get(
    "FUSEDRNN_TEST_CORE"
):  # a compiled module in place of the installed one: a mutant's
    spec = importlib.util.spec_from_file_location("fusedrnn._core", other)
    sys.modules["fusedrnn._core"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fusedrnn._core"])


def pytest_configure(config):
    config.addinivalue_line("markers", "mutation: the small fast selection that has to kill every mutant")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A slow case of a quick test is only slow; of two workers one compiles for Numba, and it begins so."""
    items.sort(key=lambda item: "numba" not in item.nodeid)
    for item in items:
        if item.get_closest_marker("slow"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "quick"]
            assert not item.get_closest_marker("quick"), f"{item.nodeid}: slow, but its module is quick"


def pytest_collection_finish(session):
    """Importing fusedrnn.torch puts the kernels on PyTorch's threads; tests begin on our own thread pool."""
    if "fusedrnn.torch" in sys.modules:
        sys.modules["fusedrnn.threads"].set_thread_pool("own")
    # Hypothesis makes a generator for its first test; on Python 3.14 `freeze` would hide who owns it.
    given(strategies.none())(lambda nothing: None)()
    gc.collect()
    gc.freeze()  # modules live to the end; a test that collects garbage would walk through them for seconds


@pytest.fixture(autouse=True)
def no_thresholds(request):
    """Kernels do with the small problems of tests what only large ones are worth: all threads, for one."""
    if not request.node.get_closest_marker("kernel"):
        yield
        return
    testing = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built").testing
    testing.thresholds(False)
    yield
    testing.thresholds(True)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back after the test, and our own thread pool."""
    from fusedrnn.threads import get_num_threads, set_num_threads, set_thread_pool

    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)
    set_thread_pool("own")


@pytest.fixture
def openmp_pool():
    """PyTorch's threads run the kernels, as after ``import fusedrnn.torch``; afterwards our own again."""
    from fusedrnn.threads import set_thread_pool

    with contextlib.suppress(RuntimeError):  # where there is no OpenMP, they stay on our own
        set_thread_pool("openmp")
    yield
    set_thread_pool("own")


@pytest.fixture
def poison():
    """Every buffer of the kernels starts as NaN: what is read before it is written shows."""
    from fusedrnn._core import testing

    testing.poison(True)
    yield
    testing.poison(False)


@pytest.fixture
def compiles_anew():
    """PyTorch forgets what it has compiled, and a seed."""
    import torch

    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def quiet_fallbacks():
    """A fallback does not warn, and a seed."""
    import torch

    from fusedrnn.torch import FallbackWarning

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@pytest.fixture
def no_fallback(monkeypatch):
    """No warning was given before, a fallback that a test does not expect is an error, and a seed."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    from fusedrnn.torch import paths

    monkeypatch.setattr(paths, "_told", set())
    monkeypatch.setattr(paths, "_errors", True)
    torch.manual_seed(0)


@pytest.fixture
def warned(no_fallback, monkeypatch):
    """Fallbacks warn, as they do by themselves."""
    from fusedrnn.torch import paths

    monkeypatch.setattr(paths, "_errors", False)
