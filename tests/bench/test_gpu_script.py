"""bench/gpu.sh without a GPU: what it runs and writes, its limits, comparisons on the emulated device."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from test_bench_cuda import REPORT, ROWS  # noqa: E402

import emulated  # noqa: E402
from fusedrnn import problems  # noqa: E402
from fusedrnn.backends import cuda_cupy, cuda_plan  # noqa: E402
from fusedrnn.backends.cuda_jobs import kernels_of  # noqa: E402
from fusedrnn.bench import cuda  # noqa: E402
from fusedrnn.bench.cuda import modes, runner  # noqa: E402
from fusedrnn.cells import CELLS, LSTM  # noqa: E402
from test_cuda_compile import needs_nvrtc  # noqa: E402

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
bash = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU coreutils")


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """The files of bench can be imported."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delenv("OUT", raising=False)


@pytest.fixture
def gpu(modules):
    return __import__("gpu")


@pytest.fixture
def compiling(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    return __import__("gpu_compile")


# --- the script, with a Python that only pretends ---------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case $1 in
  -c) [[ -f out/gpu-install/fusedrnn/_core.so ]] && echo "$PWD/out/gpu-install/fusedrnn/_core.so" ;;
  -m)
    echo "no CMake today"
    [[ -e broken ]] && exit 1
    sleep 2
    mkdir -p out/gpu-install/fusedrnn && touch out/gpu-install/fusedrnn/_core.so ;;
  bench/gpu.py)
    echo "this is $2, PYTHONPATH is $PYTHONPATH"
    [[ $2 == cuts ]] && sleep 60
    [[ $2 == checks ]] && exit 1
    exit 0 ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A checkout with next to nothing in it, and the Python that it is run by."""
    for folder in ("bench", "cmake", "csrc", "src", "python/fusedrnn"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "python/fusedrnn/layers.py"):
        (tmp_path / name).write_text("")
    shutil.copy(BENCH / "gpu.sh", tmp_path / "bench")
    python = tmp_path / "pretends"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def run(tree, *arguments, **environment):
    return subprocess.run(
        [tree / "bench" / "gpu.sh", *arguments], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHON": str(tree / "pretends")} | environment,
    )  # fmt: skip


@bash
def test_without_arguments_it_says_what_there_is(tree, gpu):
    done = run(tree)
    assert done.returncode == 0
    listed = [
        line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and " s  " in line
    ]
    assert listed == [*gpu.PARTS, "(install"]


@bash
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("first", "frist"), "expected parts out of first checks .*, got 'frist'"),
        (("first=soon",), "first: expected whole seconds, got 'soon'"),
        (("compile",), "compile: expected an architecture such as sm_90 "),
        (("compile", "90"), "compile: expected an architecture such as sm_90, got '90'"),
        (("compile", "sm_90", "frist"), "expected parts out of .*, got 'frist'"),
    ],
)
def test_a_wrong_command_runs_nothing(tree, arguments, error):
    done = run(tree, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"bench/gpu.sh: {error}.*\n", done.stderr), done.stderr
    assert not (tree / "calls").exists()


@bash
def test_parts_one_after_the_other_each_within_its_limit(tree):
    """One that fails and one that hangs stop no other; what each printed is in the file."""
    begin = time.monotonic()
    done = run(tree, "checks", "cuts=1", "goals", OUT=str(tree / "here"))
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    log = (tree / "here" / "log.txt").read_text()
    assert log == done.stdout
    said = [line.rsplit(",", 1)[0] for line in log.splitlines() if line.startswith("---")]
    assert said == [
        "--- checks", "--- checks: failed", "--- cuts", "--- cuts: stopped at its limit", "--- goals",
        "--- goals: done",
    ]  # fmt: skip
    assert "this is goals" in log
    assert not (tree / "out" / "gpu").exists()


@bash
def test_it_is_installed_once(tree):
    """Beside the part first, which does not wait for it; again only when the sources are others."""
    done = run(tree, "first", "goals")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(":")[0].split(",")[0] for line in lines] == [
        "--- first", "this is first", "--- first", "OK    install", "--- goals", "this is goals", "--- goals",
    ]  # fmt: skip
    own, sources = tree / "out" / "gpu-install", tree / "python"
    assert lines[1].split(" is ")[2].split(":")[0] == str(sources)
    assert lines[5].split(" is ")[2].split(":")[0] == str(own)
    calls = [line for line in (tree / "calls").read_text().splitlines() if line.startswith("-m pip")]
    assert len(calls) == 1
    assert "--no-build-isolation --no-deps" in calls[0]
    assert "FUSEDRNN_CUDA_FATBIN=OFF" in calls[0]
    assert "install" not in run(tree, "goals").stdout.replace(str(own), "")
    (tree / "python" / "fusedrnn" / "layers.py").write_text("new = 1\n")
    assert "OK    install" in run(tree, "install=30", "goals").stdout
    (tree / "python" / "fusedrnn" / "layers.py").write_text("newer = 1\n")
    assert "s, pip: exit status 124, see " in run(tree, "install=1").stdout


@bash
def test_where_it_cannot_be_installed_the_sources_run(tree):
    (tree / "broken").touch()
    done = run(tree, "goals")
    assert done.returncode == 1
    assert re.search(r"^FAIL  install: \d+ s, pip: exit status 1, see ", done.stdout, re.MULTILINE)
    assert "no CMake today" in (tree / "out" / "gpu" / "install.txt").read_text()
    assert f"this is goals, PYTHONPATH is {tree / 'python'}:" in done.stdout


# --- the script itself ------------------------------------------------------------------------------------


@bash
@needs_nvrtc
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a computer without an NVIDIA GPU")
def test_without_a_gpu_everything_is_compiled(tmp_path):
    """From the install to the first call of the driver; what has to be compiled stays."""
    python = (
        tmp_path / "python"
    )  # to which what is installed seems to be of this checkout: no C++ compiler runs
    own = ROOT / "python" / "fusedrnn" / "_core.so"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ $1 == -c ]] && {{ echo {own}; exit; }}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o700)
    places = {"PYTHON": str(python), "OUT": str(tmp_path), "FUSEDRNN_CACHE": str(tmp_path / "cache")}
    places["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [BENCH / "gpu.sh", "first", "promises"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | places, timeout=240)
    assert done.returncode == 3, done.stdout + done.stderr
    for kernel in cuda_plan.KERNELS:
        assert f"      {kernel}: no GPU: compiled, not run\n" in done.stdout
    assert "FAIL" not in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["first", "promises"]
    assert all(part["finished"] for part in found.values())
    assert found["first"]["compiled"].startswith("6 of 6 files now")
    assert len(list((tmp_path / "cache").glob("Lstm-*-float-ieee-sm_90-*.cubin"))) == 6


# --- one part ---------------------------------------------------------------------------------------------


def part(gpu, tmp_path, name="first", seconds=60.0):
    return gpu.Run(name, seconds, tmp_path)


EMULATED = """
import ctypes, sys
sys.path[:0] = {paths!r}
import gpu_check
from emulated import EmulatedDevice
from fusedrnn.backends.cuda import CudaBackend

class Wrong(EmulatedDevice):
    def launch(self, cell, dtype, kernel, grid, args, *rest, **options):
        super().launch(cell, dtype, kernel, grid, args, *rest, **options)
        if kernel == "cluster_backward":
            ctypes.c_float.from_address(args[0].dh0).value += 1e-3
        if kernel == "grid_forward_streamed":
            raise RuntimeError("no such launch")

device = Wrong(16, warps=8)
gpu_check.put = device.asarray
gpu_check.backend = lambda kernel=None: CudaBackend(device, kernel, _tested=True)
gpu_check.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")
def test_each_kernel_variant_has_its_line(gpu, tmp_path, monkeypatch, capsys):
    """On the emulated device, with a wrong gradient in one way and a failing launch in another."""
    script = tmp_path / "emulated.py"
    script.write_text(EMULATED.format(paths=[str(BENCH), *sys.path]))
    monkeypatch.setattr(gpu, "CHECK", [sys.executable, str(script)])
    monkeypatch.setattr(gpu, "checking", slow_checking(gpu))
    monkeypatch.setattr(cuda_cupy, "unavailable", lambda: None)
    facts = {"multiprocessors": 132, "shared_bytes": 232448, "cluster": 8}
    monkeypatch.setattr(cuda_cupy, "current", lambda: SimpleNamespace(architecture="sm_90", **facts))
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    error = {"grid": "error: expected a )"}
    monkeypatch.setattr(gpu, "compile_for", lambda run, part, architecture: error)
    run = part(gpu, tmp_path, seconds=280)
    gpu.first(run)
    lines = {
        line["name"]: line for line in json.loads((tmp_path / "results.json").read_text())["first"]["checks"]
    }
    right = {name for name, line in lines.items() if line["right"]}
    assert right == {"backend cuda", "steps", "grid_registers", "cluster_registers"}
    assert lines["grid"]["said"] == "does not compile: error: expected a )"
    assert lines["grid_streamed"]["said"] == "RuntimeError: no such launch"
    assert lines["cluster"]["said"].startswith("AssertionError: dh0 is off by ")
    assert "cluster_registers, " in lines["cluster_registers"]["said"]
    assert run.failed
    printed = capsys.readouterr().out
    assert "OK    steps: " in printed
    assert "FAIL  cluster: " in printed


def slow_checking(gpu):
    """With the time that g++ takes for the emulation."""
    plain = gpu.checking

    def checking(*arguments, **options):
        return plain(*arguments, **options | {"seconds": 200.0})

    return checking


def test_a_check_that_hangs_takes_nothing_with_it(gpu, tmp_path):
    """It is stopped, what it started too, and the others go on."""
    file = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(file)!r}).touch()"
    hangs = (
        "import subprocess, sys, time\nprint('so far', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    )
    todo = [
        gpu.Check("hangs", [sys.executable, "-c", hangs], 2.0),
        gpu.Check("dies", ["bash", "-c", "echo last words; kill -SEGV $$"]),
        gpu.Check("raises", [sys.executable, "-c", "raise ValueError('too large')"]),
        gpu.Check("right", [sys.executable, "-c", "print('first'); print('all is well')"]),
        gpu.Check("of the environment", ["bash", "-c", "echo $KEY"], 30.0, {"KEY": "value"}),
    ]
    run = part(gpu, tmp_path)
    gpu.do_all(run, todo)
    said = {line["name"]: (line["right"], line["said"]) for line in run.found["checks"]}
    assert said == {
        "hangs": (False, "stopped after 2 s: so far"),
        "dies": (False, "exit status -11: last words"),
        "raises": (False, "ValueError: too large"),
        "right": (True, "all is well"),
        "of the environment": (True, "value"),
    }
    time.sleep(4)
    assert not file.exists()
    late = part(gpu, tmp_path, seconds=1.0)
    gpu.do_all(late, todo[:1])
    assert late.found["checks"][0]["said"] == "not run: no time left"


def call(gpu, monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["gpu.py", name, "--out", str(tmp_path)])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return gpu.main()


def test_what_was_found_stays_in_the_file(gpu, tmp_path, monkeypatch, capsys):
    """Of a part that fails or never comes back, and of those before it; the goals need the file alone."""

    def timing(run):
        run.found["rows"] = list(ROWS)
        run.write()
        raise KeyboardInterrupt

    def checks(run):
        raise RuntimeError("no such kernel")

    def epochs(run):
        run.note("ratio to dezero", 25.0)

    monkeypatch.setattr(gpu, "without_gpu", lambda: None)
    for each in (timing, checks, epochs):
        monkeypatch.setitem(gpu.PARTS, each.__name__, each)
    with pytest.raises(KeyboardInterrupt):
        call(gpu, monkeypatch, tmp_path, "timing")
    assert call(gpu, monkeypatch, tmp_path, "checks") == 1
    assert call(gpu, monkeypatch, tmp_path, "epochs") == 0
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCH))
    assert call(gpu, monkeypatch, tmp_path, "goals") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [found[name]["finished"] for name in ("timing", "checks", "epochs", "goals")] == [
        False,
        True,
        True,
        True,
    ]
    assert found["checks"]["checks"][0]["said"] == "RuntimeError: no such kernel"
    every = runner.expected(problems.SUITES["gpu"], list(modes.MODES))
    assert found["goals"]["goals"] == json.loads(json.dumps(cuda.judge(ROWS, every, 25.0)))
    assert "times LSTMCell" in capsys.readouterr().out
    found["timing"] = REPORT
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert call(gpu, monkeypatch, tmp_path, "goals") == 0
    assert "PERSIST_STATIC / STANDARD" in capsys.readouterr().out


def test_rows_are_written_as_they_come(gpu, tmp_path, monkeypatch):
    """And a row in which ours failed is a failure."""

    def run(cases, *, each, **options):
        for row in (ROWS[0], ROWS[1] | {"failed": {"fusedrnn": "no such kernel"}}):
            each(row)
            written.append(len(json.loads((tmp_path / "results.json").read_text())["timing"]["rows"]))
        return REPORT

    written = []
    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(gpu, "compile_for", lambda *_: {})
    monkeypatch.setattr(cuda_cupy, "current", lambda: SimpleNamespace(architecture="sm_90"))
    timing = part(gpu, tmp_path, "timing")
    gpu.timing(timing)
    assert written == [1, 2]
    assert timing.failed
    assert ROWS[1]["case"] in timing.found["checks"][0]["said"]


def test_a_gpu_that_cannot_be_used_is_no_missing_gpu(gpu, monkeypatch):
    monkeypatch.setattr(cuda_cupy, "unavailable", lambda: "CuPy is not installed: pip install it")
    assert gpu.without_gpu() is None
    monkeypatch.setattr(cuda_cupy, "unavailable", lambda: "there is no NVIDIA GPU")
    assert gpu.without_gpu() == (None if Path("/dev/nvidia0").exists() else "there is no NVIDIA GPU")


def test_every_way_to_run_can_run_what_is_checked(modules):
    """On an H100; a plan that does not exist would be a failure there."""
    import gpu_check

    h100 = cuda_plan.Device(132, 232448, 8, 8)
    wanted = [(gpu_check.SMALL, [LSTM()], "ieee"), (gpu_check.WIDER, [LSTM()], "ieee")]
    wanted += [(gpu_check.OF_16_BITS, [c() for c in CELLS.values()], "fp16")]
    wanted += [(gpu_check.SLOW, [c() for c in CELLS.values()], "ieee")]
    for (T, B, _, H), cells, precision in wanted:
        for cell in cells:
            for kernel in cuda_plan.KERNELS:
                for backward in (False, True):
                    plan = cuda_plan.choose(
                        kernels_of(cell),
                        T,
                        B,
                        H,
                        4,
                        h100,
                        precision=precision,
                        backward=backward,
                        forced=kernel,
                    )
                    assert plan.kernel == kernel


# --- compiled beforehand ----------------------------------------------------------------------------------


def test_parts_have_what_they_run(compiling, gpu):
    assert list(compiling.NEEDED) == list(gpu.PARTS)
    names = {part: set(map(str, compiling.jobs_of(part, "sm_90"))) for part in compiling.NEEDED}
    assert names["first"] == {f"Lstm float ieee {kernel}" for kernel in cuda_plan.KERNELS}
    assert all(
        names["first"] <= names[part] for part in ("checks", "timing", "cuts", "promises", "sanitizers")
    )
    assert "RnnRelu double ieee cluster" in names["checks"]
    assert "Regularized<GruResetBefore> float ieee steps" in names["checks"]
    assert "GruResetAfterLayerNorm double ieee steps" in names["checks"]
    assert {n for n in names["checks"] if n.startswith("GruResetBefore ")} == {
        f"GruResetBefore {dtype} ieee steps" for dtype in ("float", "double")
    }
    assert "GruResetAfter float tf32 grid_registers" in names["timing"]
    assert "Lstm Bfloat16 bf16 cluster" in names["timing"]


@needs_nvrtc
def test_the_folder_is_filled_by_processes(compiling, monkeypatch):
    two = [compiling.Job(cell, "float", "sm_80", "ieee", "steps") for cell in ("RnnTanh", "RnnRelu")]
    wrong = compiling.Job("NoCell", "float", "sm_80", "ieee", "steps")
    found = {done.job: done.error for done in compiling.compile_all([*two, *two, wrong])}
    assert found.keys() == {*two, wrong}
    assert found[two[0]] is None
    assert "error" in found[wrong]
    names = sorted(file.name.rsplit("-", 1)[0] for file in compiling.folder().iterdir())
    assert names == ["RnnRelu-steps-float-ieee-sm_80", "RnnTanh-steps-float-ieee-sm_80"]


def test_it_says_whether_what_was_compiled_beforehand_is_used(compiling, monkeypatch, capsys):
    monkeypatch.setattr(compiling.cuda_compile, "version", lambda: (13, 0))
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, each: [])
    assert "nothing was compiled beforehand" in compiling.at_hand("sm_90")
    assert compiling.main("sm_90") == 0
    assert "another NVRTC will not use it" in capsys.readouterr().out
    assert compiling.at_hand("sm_90") == "compiled beforehand for sm_90 by NVRTC 13.0: used"
    assert "NOT USED, here it is sm_100 by NVRTC 13.0" in compiling.at_hand("sm_100")
    monkeypatch.setattr(compiling.cuda_compile, "version", lambda: (13, 5))
    assert "for sm_90 by NVRTC 13.0: NOT USED, here it is sm_90 by NVRTC 13.5" in compiling.at_hand("sm_90")
    assert compiling.main("sm_90") == 0
    monkeypatch.setattr(compiling.cuda_compile, "fatbin_key", lambda *_: "another")
    assert compiling.at_hand("sm_90") == "compiled beforehand of other sources: NOT USED"
