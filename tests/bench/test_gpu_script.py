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
from fusedrnn import cli, gradcheck_suite  # noqa: E402
from fusedrnn.backends.cuda import KERNEL, CudaBackend, cupy_device  # noqa: E402
from fusedrnn.backends.cuda.nvrtc import KERNELS  # noqa: E402
from fusedrnn.bench import cuda  # noqa: E402
from fusedrnn.bench.peer_torch import Place  # noqa: E402
from fusedrnn.cells import CELLS, lstm  # noqa: E402
from test_cuda_compile import needs_nvrtc  # noqa: E402

emulated, modules = test_bench_cuda.emulated, test_bench_cuda.modules
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU coreutils")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """bench/gpu.py, whose results go to a folder of their own."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return __import__("gpu")


def found(tmp_path):
    """Of each check whether it was right, and what it said."""
    lines = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    return {line["check"]: (line["right"], line["said"]) for line in lines}


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a computer without an NVIDIA GPU")
def test_without_a_gpu_everything_is_compiled(tmp_path):
    """Up to the first call of the driver; what is compiled is found again."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "python").mkdir()
    (tmp_path / "pip.py").write_text("print('nothing to do')\n")  # what this test imports runs
    places = {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path), "OUT": str(tmp_path / "out")}
    places["FUSEDRNN_CACHE"] = str(tmp_path / "cache")
    command = [tmp_path / "bench" / "gpu.sh", "first", "promises"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | places)
    assert done.returncode == 3, done.stdout + done.stderr
    n = len(KERNELS)
    compiled = re.findall(
        r"^OK    cubins first: [\d.]+ s, (\d+) of (\d+) files now, sm_90 ", done.stdout, re.M
    )
    assert compiled == [(f"{n}", f"{n}"), ("0", f"{n}")]
    right = found(tmp_path)
    assert list(right) == ["install " + str(tmp_path / "out/gpu-install"), "gpu", "cubins first"]
    assert all(each for each, _ in right.values())
    assert "there is no NVIDIA" in right["gpu"][1]
    assert "nothing to do" in (tmp_path / "out" / "log.txt").read_text()


def test_what_does_not_compile_is_told(checks):
    with pytest.raises(RuntimeError, match="sm_10"):
        checks.cubins("first", "sm_10")


def test_a_wrong_command_runs_nothing(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("it ran"))
    assert gpu.main() == 0
    assert re.findall(r"^  (\w+) +\d+ s  ", capsys.readouterr().out, re.MULTILINE) == list(gpu.PARTS)
    assert gpu.main("first", "frist") == 2
    assert "expected parts out of first, checks, promises" in capsys.readouterr().err


def test_a_check_that_hangs_takes_nothing_with_it(gpu, monkeypatch, tmp_path):
    """It is stopped, what it started too, and the others go on; what each printed is in the file."""
    todo = {
        "hangs": ["bash", "-c", f"trap '' TERM; echo so far; (sleep 6; touch {tmp_path}/alive) & sleep 60"],
        "dies": ["bash", "-c", "echo last words; kill -SEGV $$"],
        "raises": [sys.executable, "-c", "raise ValueError('too large')"],
        "right": [sys.executable, "-c", "print('first'); print('all is well')"],
    }
    monkeypatch.setattr(gpu, "command", lambda check, out: todo[check])
    (tmp_path / "out").mkdir()
    for check in todo:
        gpu.run(check, tmp_path / "out", 2.0)
    assert found(tmp_path) == {
        "hangs": (False, "stopped: so far"),
        "dies": (False, "exit status -11: last words"),
        "raises": (False, "ValueError: too large"),
        "right": (True, "all is well"),
    }
    assert gpu.run("right", tmp_path / "out", 2.0, time.monotonic()) == (False, "not run: no time left")
    assert "first\nall is well" in (tmp_path / "out" / "log.txt").read_text()
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("wrong", "said", "status", "ran"),
    [
        ("install", "", 1, 1),  # nothing runs without
        ("gpu", "", 1, 2),
        ("", "there is no NVIDIA GPU", 3, 4),  # each part compiles what it needs
        ("gradients grid lstm float32", "a GPU", 1, None),
        ("", "a GPU", 0, None),
    ],
)
def test_what_runs_and_the_exit_status(wrong, said, status, ran, gpu, monkeypatch):
    seen = []

    def run(check, out, seconds, end=0.0):
        seen.append(check)
        return not wrong or not check.startswith(wrong), said

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main("first", "promises") == status
    every = [*gpu.PARTS["first"][2], *gpu.PARTS["promises"][2]]
    assert len(seen) == ran if ran else sorted(seen[2:]) == sorted(every)


def test_parts_run_checks_that_there_are(gpu, monkeypatch, tmp_path):
    """Of every kernel variant."""
    checks = __import__("gpu_check")
    for name in ("first", "checks", "promises", "sanitizers"):
        assert set(" ".join(gpu.PARTS[name][2]).split()) >= set(KERNELS)
    for check in itertools.chain.from_iterable(checks for _, _, checks in gpu.PARTS.values()):
        command = gpu.command(check, tmp_path)
        at = command.index(sys.executable) + 1
        if command[at].endswith("gpu_check.py"):
            function, *words = command[at + 1 :]
            inspect.signature(getattr(checks, function)).bind(*words)
            assert command[0] in (sys.executable, "compute-sanitizer")
    env, kernel, _, *gradcheck = gpu.command("gradcheck grid lstm", tmp_path)
    asked = {}

    def run_suite(**options):
        asked.update(options)
        raise ValueError("nothing to do")

    monkeypatch.setattr(gradcheck_suite, "run_suite", run_suite)
    assert cli.main(gradcheck[2:]) == cli.USAGE
    assert (env, kernel, asked["cells"], asked["backends"]) == ("env", f"{KERNEL}=grid", ["lstm"], ["cuda"])
    pollution = __import__("pollution_epoch")
    measured = {"ms": {"fusedrnn": 1.0, "torch": 2.0}, "ratio": 2.0}
    monkeypatch.setattr(pollution, "measure", {"cuda": measured}.get)
    monkeypatch.setattr(sys, "argv", gpu.command("epochs", tmp_path)[1:])
    pollution.main()
    assert json.loads((tmp_path / "epochs.json").read_text())["ratio"] == 2.0


@pytest.fixture
def checks(gpu, modules, monkeypatch):
    """bench/gpu_check.py on the emulated device, NumPy in CuPy's place."""
    found, device = __import__("gpu_check"), EmulatedDevice(16, warps=8)
    device._graphs = device.graphs
    made = lambda kernel=None, precision=None: CudaBackend(device, kernel, precision, _tested=True)  # noqa: E731
    monkeypatch.setattr(found, "CudaBackend", made)
    monkeypatch.setattr(found, "as_cupy", device.asarray)
    monkeypatch.setattr(found, "WIDER", found.SMALL)
    fake = SimpleNamespace(Stream=lambda **_: contextlib.nullcontext(), set_allocator=lambda allocator: None)
    monkeypatch.setattr(sys.modules["cupy"], "cuda", fake, raising=False)
    monkeypatch.setattr(sys.modules["cupy"], "repeat", np.repeat, raising=False)
    monkeypatch.setattr(found, "Place", lambda device, dtype=None: Place("cpu", dtype))
    return found


def test_a_gpu_that_cannot_be_used_is_no_missing_gpu(checks, monkeypatch):
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "CuPy is not installed: pip install it")
    with pytest.raises(RuntimeError, match="CuPy is not installed"):
        checks.gpu()
    monkeypatch.setattr(cupy_device, "unavailable", lambda: "there is no NVIDIA GPU")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert checks.gpu() == "there is no NVIDIA GPU"
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(RuntimeError, match="there is no NVIDIA GPU"):
        checks.gpu()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_variant_can_run_what_is_checked(kernel, gpu):
    """On an H100."""
    sizes, h100 = __import__("gpu_check"), CudaBackend(EmulatedDevice(132, warps=8), kernel)
    for (T, B, _, H), dtype in ((sizes.SMALL, "float32"), (sizes.SMALL, "float16"), (sizes.WIDER, "float32")):
        for cell in [lstm] if sizes.WIDER[0] == T else CELLS.values():
            for back in (False, True):
                assert h100.plan(cell, T, B, H, dtype, backward=back).kernel == kernel


OTHERS = ["bits steps", "cpu rnn", "gradients steps gru bfloat16", "gradients grid lstm float32 tf32"]
OTHERS += ["size 5 3 1 2", "small cluster", "api"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("words", [*(f"gradients {kernel} lstm float32" for kernel in KERNELS), *OTHERS])
def test_each_check_on_the_emulated_device(words, checks):
    name, *arguments = words.split()
    assert re.search("off by|graphs|cells", getattr(checks, name)(*arguments))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_row_of_a_batch_that_is_another_is_found(checks, monkeypatch):
    def wrong(*given, results=checks.results, **options):
        found = results(*given, **options)
        found["y"][-1, -1] += options != {}  # of the GPU's
        return found

    monkeypatch.setattr(checks, "results", wrong)
    with pytest.raises(AssertionError, match=r"^y is off by"):
        checks.size("3", "2", "1", "2")


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
    with pytest.raises(AssertionError, match=r"MiB after 1,000 calls, .* after 10,000"):
        checks.memory()
    pool.total_bytes = lambda: 2**20
    assert "after 10,000" in checks.memory()


def test_what_timing_found_stays_in_the_file(checks, monkeypatch, tmp_path, capsys):
    """Row by row; the tables come at its end."""
    rows = [test_bench_cuda.ROWS[0], test_bench_cuda.ROWS[5]]
    file = tmp_path / "timing.json"

    def run(cases, *, suite, quick, go_on):
        assert go_on(test_bench_cuda.REPORT | {"rows": rows[:1]})
        assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(rows[:1]))
        monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
        assert not go_on(test_bench_cuda.REPORT | {"rows": rows})
        return test_bench_cuda.REPORT | {"rows": rows}

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("SECONDS", "60")
    monkeypatch.setattr(cuda, "run", run)
    with pytest.raises(AssertionError, match="1 rows failed: gru 256,64,256,256 bf16"):
        checks.timing()
    assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(rows))
    printed = capsys.readouterr().out
    assert "times LSTMCell" in printed
    assert "ours ran" in printed
