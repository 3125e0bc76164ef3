"""A plugin for pytest, of test_mutants.py: the collected tests for each mutant of a module in turn, in a
fork, up to the first that fails. So Python starts and the tests are collected once for many mutants.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import pytest

LIMIT = 300  # seconds a mutant, on a busy machine; what takes longer hangs


def pytest_addoption(parser):
    parser.addoption("--mutants", help="their numbers, with commas in between")
    parser.addoption("--exit-codes", help="the file for the exit code of each, in JSON")


def in_a_fork(session, number):
    """The exit code with this mutant on: 1 a test failed, 0 all passed, 3 none failed but one was skipped,
    below 0 a signal ended it.
    """
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            switch = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["FUSEDRNN_TEST_CORE"]), "fusedrnn_mutant")
            switch.value = number
            for item, after in zip(session.items, [*session.items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if session.testsfailed:
                    break
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            code = 1 if session.testsfailed else 3 if reporter.stats.get("skipped") else 0
            if code == 1 and number == 0:
                reporter.summary_failures()
        finally:
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    assert len(session.items) > 20
    numbers = map(int, session.config.getoption("--mutants").split(","))
    codes = {number: in_a_fork(session, number) for number in numbers}
    Path(session.config.getoption("--exit-codes")).write_text(json.dumps(codes))
    return True
