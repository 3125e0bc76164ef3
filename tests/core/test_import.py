"""``import fusedrnn`` is quick, and loads NumPy and the compiled module only."""

from __future__ import annotations

import json

import pytest

import fusedrnn
from fusedrnn import system, threads
from interpreter import python

pytestmark = pytest.mark.quick

HEAVY = ("numba", "cupy", "torch", "matplotlib", "rich", "scipy", "safetensors", "mpmath", "hypothesis")

TIMED = """
import time, numpy
start = time.process_time()
import fusedrnn
print(time.process_time() - start)
"""

LOADED = f"""
import json, sys
import fusedrnn
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def test_import_takes_less_than_150_ms_on_top_of_numpy():
    """Processor time, which other load on the machine does not stretch; the first run fills disk caches."""
    assert min(float(python(TIMED)) for _ in range(6)) < 0.150


def test_import_loads_nothing_heavy():
    assert json.loads(python(LOADED)) == []


def test_version_and_threads_are_at_the_top():
    """The version is looked up at first access."""
    code = "import sys, fusedrnn; print('importlib.metadata' in sys.modules, fusedrnn.__version__)"
    loaded, version = python(code).split(maxsplit=1)
    assert (loaded, version.strip()) == ("False", system.version())
    assert fusedrnn.get_num_threads is threads.get_num_threads
    assert fusedrnn.set_num_threads is threads.set_num_threads
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fusedrnn.nothing  # noqa: B018
