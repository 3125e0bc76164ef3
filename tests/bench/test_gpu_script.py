"""bench/gpu.sh without a GPU: what it runs and writes, its limits, its checks on the emulated device."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

test_bench_cuda = pytest.importorskip("test_bench_cuda", reason="PyTorch is not installed")

from emulated import COMPILER, EmulatedDevice  # noqa: E402
from fusedrnn import problems  # noqa: E402
from fusedrnn.backends.cuda import CudaBackend, cupy_device  # noqa: E402
from fusedrnn.backends.cuda.nvrtc import KERNELS  # noqa: E402
from fusedrnn.bench import cuda  # noqa: E402
from fusedrnn.bench.peer_torch import Place  # noqa: E402
from fusedrnn.cells import CELLS, lstm  # noqa: E402
from test_cuda_compile import needs_nvrtc  # noqa: E402

emulated, modules = test_bench_cuda.emulated, test_bench_cuda.modules
ROOT = Path(__file__).parents[2]
PRETENDS = """#!/usr/bin/env bash
case $1 in
  -m) echo "no CMake today"; [[ -e broken ]] && exit 1; sleep 2 ;;
  bench/gpu.py)
    echo "this is $3, PYTHONPATH is $PYTHONPATH"
    [[ $3 == promises ]] && sleep 300
    [[ $3 != checks ]] ;;
esac
"""
INSTALLS_NOTHING = f'#!/usr/bin/env bash\n[[ $1 == -m ]] && exit\nexec {sys.executable} "$@"\n'
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU coreutils")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """bench/gpu.py, with an empty folder of compiled code."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    return __import__("gpu")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs gpu.sh in a checkout with next to nothing in it, by a Python that only pretends."""
    monkeypatch.delenv("OUT", raising=False)
    for folder in ("bench", "csrc", "src", "python/fusedrnn"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "python/fusedrnn/layers.py"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")

    def run(*arguments, python=PRETENDS, **places):
        command, file = [tmp_path / "bench" / "gpu.sh", *arguments], tmp_path / "python.sh"
        file.write_text(python)
        file.chmod(0o700)
        places = os.environ | {"PYTHON": str(file)} | places
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=places)

    return run


def test_without_arguments_it_says_what_there_is_and_a_wrong_command_runs_nothing(script, gpu):
    done = script()
    assert done.returncode == 0
    assert re.findall(r"^  (\w+) +\d+ s  ", done.stdout, re.MULTILINE) == list(gpu.PARTS)
    for arguments, error in {
        "first frist": "expected parts out of first checks .*, got 'frist'",
        "first=soon": "first: expected whole seconds, got 'soon'",
        "compile": "compile: expected an architecture such as sm_90, got ''",
        "compile sm_90 frist": "expected parts out of .*, got 'frist'",
    }.items():
        done = script(*arguments.split())
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"bench/gpu.sh: {error}.*\n", done.stderr), done.stderr


def test_parts_one_after_the_other_each_within_its_limit(script, tmp_path):
    """One that fails and one that hangs stop no other; what each printed is in the file."""
    done = script("checks", "promises=1", "goals", OUT=str(tmp_path / "here"))
    assert done.returncode == 1
    log = (tmp_path / "here" / "log.txt").read_text()
    ends = ["checks: failed", "promises: stopped at its limit", "goals: done"]
    assert re.findall(r"^--- (.*: .*), ", log, re.MULTILINE) == ends
    assert "this is goals" in log
    assert sorted(log.splitlines()) == sorted(done.stdout.splitlines())


def test_it_is_installed_once(script, tmp_path):
    """Beside the part first, which does not wait for it; again only when the sources are others."""
    done = script("first", "goals")
    assert done.returncode == 0
    said = [re.split("[:,]", line)[0] for line in done.stdout.splitlines()]
    first, goals = ["--- first", "this is first", "--- first"], ["--- goals", "this is goals", "--- goals"]
    assert said == [*first, "OK    install", *goals]
    assert f"this is first, PYTHONPATH is {tmp_path}/python" in done.stdout
    assert f"this is goals, PYTHONPATH is {tmp_path}/out/gpu-install" in done.stdout
    assert "OK    install" not in script("goals").stdout
    (tmp_path / "python" / "fusedrnn" / "layers.py").write_text("new = 1\n")
    (tmp_path / "broken").touch()
    done = script("goals")
    assert done.returncode == 1
    assert re.search(r"^FAIL  install: \d+ s, pip: exit status 1, see ", done.stdout, re.MULTILINE)
    assert "no CMake today" in (tmp_path / "out" / "gpu" / "install.txt").read_text()
    assert f"this is goals, PYTHONPATH is {tmp_path}/python" in done.stdout


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a computer without an NVIDIA GPU")
def test_without_a_gpu_everything_is_compiled(script, gpu, tmp_path):
    """Up to the first call of the driver; what is compiled is found again; what does not compile is told."""
    for name in ("gpu.py", "gpu_check.py"):
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench")
    (tmp_path / "python" / "fusedrnn" / "layers.py").unlink()  # what this test imports runs
    options = {"python": INSTALLS_NOTHING, "PYTHONPATH": os.pathsep.join(sys.path), "OUT": str(tmp_path)}
    done = script("first", "promises", **options)
    assert done.returncode == 3, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [found[part]["finished"] for part in ("first", "promises")] == [True, True]
    now = f"{len(KERNELS)} of {len(KERNELS)} files now"
    assert found["first"]["compiled for first"].startswith(now)
    assert f"first: 0{now[1:]}" in script("compile", "sm_90", "first", **options).stdout
    done = script("compile", "sm_10", "first", **options)
    assert done.returncode == 1
    assert done.stdout.count("FAIL  compile Lstm float ieee sm_10 ") == len(KERNELS)


def test_a_check_that_hangs_takes_nothing_with_it(gpu, tmp_path):
    """It is stopped, what it started too, and the others go on."""
    todo = {
        "hangs": ["bash", "-c", f"trap '' TERM; echo so far; (sleep 6; touch {tmp_path}/alive) & sleep 60"],
        "dies": ["bash", "-c", "echo last words; kill -SEGV $$"],
        "raises": [sys.executable, "-c", "raise ValueError('too large')"],
        "right": [sys.executable, "-c", "print('first'); print('all is well')"],
    }
    run = gpu.Run(tmp_path, "first", 60.0)
    gpu.do_all(run, todo.items(), 2.0, 1)
    assert {line["name"]: (line["right"], line["said"]) for line in run.found["checks"]} == {
        "hangs": (False, "stopped after 2 s: so far"),
        "dies": (False, "exit status -11: last words"),
        "raises": (False, "ValueError: too large"),
        "right": (True, "all is well"),
    }
    assert gpu.do(gpu.Run(tmp_path, "first", 1.0), todo["right"], 2.0)[:2] == (False, "not run: no time left")
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


@pytest.fixture
def there_is_one(gpu, monkeypatch):
    """A GPU for which nothing has to be compiled."""
    for name in ("without_gpu", "compile_for"):
        monkeypatch.setattr(gpu, name, lambda *_: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cupy_device, "unavailable", lambda: None)
    monkeypatch.setattr(cupy_device, "current", lambda: SimpleNamespace(architecture="sm_90"))


def test_what_was_found_stays_in_the_file(gpu, there_is_one, tmp_path, monkeypatch, capsys):
    """Rows as they come, and what parts before have found; the goals need the file alone."""
    rows = test_bench_cuda.ROWS

    def run(cases, *, suite, each, **options):
        for row in (rows[0], rows[1] | {"failed": {"fusedrnn": "no such kernel"}}):
            each(row)
        assert len(json.loads((tmp_path / "results.json").read_text())["timing"]["rows"]) == 2
        return test_bench_cuda.REPORT

    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setitem(gpu.PARTS, "checks", lambda run: 1 // 0)
    monkeypatch.setitem(gpu.PARTS, "epochs", lambda run: run.note("ratio to dezero", 25.0))
    codes = [gpu.main(str(tmp_path), part, "60") for part in ("timing", "checks", "epochs", "goals")]
    assert codes == [1, 1, 0, 0]  # ours failed in a row
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(part["finished"] for part in found.values())
    assert rows[1]["case"] in found["timing"]["checks"][0]["said"]
    assert found["checks"]["checks"][0]["said"].startswith("ZeroDivisionError: ")
    every = cuda.expected(problems.SUITES["gpu"], list(cuda.MODES))
    assert found["goals"]["goals"] == json.loads(json.dumps(cuda.judge(rows, every, 25.0)))
    printed = capsys.readouterr().out
    assert "times LSTMCell" in printed
    assert "cluster / steps" in printed


def test_parts_run_checks_that_there_are(gpu, there_is_one, monkeypatch, tmp_path):
    """Of every kernel variant."""
    todo, checks = {}, __import__("gpu_check")
    monkeypatch.setattr(gpu, "do_all", lambda run, found, *limits: todo.update(found))
    for part in ("first", "checks", "promises", "sanitizers"):
        todo.clear()
        assert gpu.main(str(tmp_path), part, "60") == 0
        assert set(" ".join(todo).split()) >= set(KERNELS)
        for command in todo.values():
            if gpu.CHECK[1] in command:
                name, *words = command[command.index(gpu.CHECK[1]) + 1 :]
                inspect.signature(getattr(checks, name)).bind(*words)


def test_a_gpu_that_cannot_be_used_is_no_missing_gpu(gpu, monkeypatch):
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "CuPy is not installed: pip install it")
    assert gpu.without_gpu() is None
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "there is no NVIDIA GPU")
    assert gpu.without_gpu() == (None if Path("/dev/nvidia0").exists() else "there is no NVIDIA GPU")


@pytest.fixture
def checks(gpu, monkeypatch):
    """bench/gpu_check.py on the emulated device, NumPy in CuPy's place."""
    found, device = __import__("gpu_check"), EmulatedDevice(16, warps=8)
    device._graphs = device.graphs
    monkeypatch.setattr(found, "CudaBackend", lambda kernel=None: CudaBackend(device, kernel, _tested=True))
    monkeypatch.setattr(found, "as_cupy", device.asarray)
    monkeypatch.setattr(found, "WIDER", found.SMALL)
    cuda = SimpleNamespace(
        memory=SimpleNamespace(OutOfMemoryError=MemoryError), Stream=lambda **_: contextlib.nullcontext()
    )
    numpy = {name: getattr(np, name) for name in ("random", "float32", "isfinite")}
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, **numpy))
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_variant_can_run_what_is_checked(kernel, gpu):
    """On an H100."""
    sizes, h100 = __import__("gpu_check"), CudaBackend(EmulatedDevice(132, warps=8), kernel)
    for (T, B, _, H), dtype in ((sizes.SMALL, "float32"), (sizes.SMALL, "float16"), (sizes.WIDER, "float32")):
        for cell in [lstm] if sizes.WIDER[0] == T else CELLS.values():
            for back in (False, True):
                assert h100.plan(cell, T, B, H, dtype, backward=back).kernel == kernel


OTHERS = ["bits steps", "cpu rnn", "gradients steps gru bfloat16", "size 5 2 1 1", "small cluster", "api"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("words", [*(f"gradients {kernel} lstm float32" for kernel in KERNELS), *OTHERS])
def test_each_check_on_the_emulated_device(words, checks, modules, monkeypatch):
    monkeypatch.setattr(checks, "Place", lambda device, dtype=None: Place("cpu", dtype))
    name, *arguments = words.split()
    assert re.search("off by|graphs|finite|cells", getattr(checks, name)(*arguments))


def test_what_is_wrong_is_found(checks, monkeypatch):
    """Other bits in one of many calls, and memory that grows."""
    calls, pool = itertools.count(), SimpleNamespace(total_bytes=lambda: 2**20 * next(calls))
    monkeypatch.setattr(checks, "problem", lambda *_, **__: None)
    monkeypatch.setattr(checks, "results", lambda of, data: {"y": np.float32(next(calls) in (12, 50))})
    with pytest.raises(AssertionError, match="run 11, None: y has other bits"):
        checks.bits("grid")
    with pytest.raises(AssertionError, match=r"call \d+ of thread \d: y has other bits"):
        checks.threads()
    sys.modules["cupy"].get_default_memory_pool = lambda: pool
    with pytest.raises(AssertionError, match="MiB after 300 calls"):
        checks.memory()
    pool.total_bytes = lambda: 2**20
    assert checks.memory() == "1.0 MiB after 300 calls, 1.0 after 5000"
