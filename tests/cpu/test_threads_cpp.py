"""The thread pool, the arena, the control word and the choice of the instruction set, without Python around.

Builds tests/cpu/cpp/runtime_test.cpp with nothing but a compiler: plain, without futex (as on systems that
have none), and under the sanitizers.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = ROOT / "tests/cpu/cpp/runtime_test.cpp"
SOURCES = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("threads", "openmp", "arena", "isa")]
BUILDS = {
    "plain": ["-O2"],
    "no_futex": ["-O2", "-DFUSEDRNN_NO_FUTEX"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "openmp": ["-O2", "-fopenmp"],  # the others have a stand-in for OpenMP
}
X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = ["PORTABLE", "PORTABLE_FMA", "AVX2", "AVX512"] if X86 else ["PORTABLE"]
PARTS = ["regions", "errors", "interruption", "callers", "signals", "count", "arena", "control_word"]
EXITS = ["parked", "spinning", "inside"]
# The thread sanitizer does not support threads in a forked child; the address sanitizer hangs in one
# whose parent's other threads were allocating; and both reserve the address space that "limits" takes away.
OWN = [build for build in BUILDS if build != "openmp"]
CASES = [(build, part) for build in OWN for part in PARTS]
CASES += [(build, "fork") for build in OWN if build != "thread"]
CASES += [(build, part) for build in ("plain", "no_futex") for part in ("fork_busy", "limits")]
OPENMP_PARTS = ["thread_pool", "regions", "errors", "interruption", "callers"]
OPENMP_CASES = [(build, part) for build in BUILDS for part in OPENMP_PARTS]
OPENMP_CASES += [(build, "fork") for build in BUILDS if build != "thread"]


def builds(pairs):
    return [pytest.param(*pair, marks=() if pair[0] == "plain" else pytest.mark.slow) for pair in pairs]


def environment(extra):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDRNN_", "OMP_", "LD_PRELOAD"))}
    # As without sanitizers: a failed allocation is the caller's to handle.
    clean["ASAN_OPTIONS"] = "allocator_may_return_null=1"
    clean["TSAN_OPTIONS"] = "allocator_may_return_null=1:halt_on_error=1"
    return clean | extra


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """A function: name of a build -> path of its program."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not SOURCES[0].exists():
        pytest.skip("the C++ sources are not here")
    folder = tmp_path_factory.mktemp("runtime")
    built = {}

    def build(name):
        if name not in built:
            flags = ["-std=c++17", "-pthread", "-rdynamic", "-Wall", "-Wextra", "-Werror", *BUILDS[name]]
            if name in ("thread", "address", "openmp"):  # is it installed, and does it run here?
                empty = folder / "empty.cpp"
                empty.write_text("int main() {}\n")
                command = [*compiler.split(), *flags, empty, "-o", folder / "empty"]
                if any(
                    subprocess.run(c, capture_output=True).returncode for c in (command, [folder / "empty"])
                ):
                    built[name] = None
            if name not in built:
                flags += [f"-DFUSEDRNN_HAS_{level}" for level in LEVELS]
                flags.append(f"-I{ROOT / 'csrc'}")
                command = [*compiler.split(), *flags, TEST, *SOURCES, "-ldl", "-o", folder / name]
                subprocess.run(command, check=True)
                built[name] = folder / name
        if built[name] is None:
            pytest.skip(f"nothing for the {name} build here")
        return built[name]

    return build


def output(path, *arguments, **extra):
    result = subprocess.run(
        [path, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment(extra)
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING: ThreadSanitizer" not in result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(("build", "part"), builds(CASES))
def test_part(program, build, part):
    output(program(build), part)


@pytest.mark.parametrize(("build", "part"), builds(OPENMP_CASES))
def test_part_on_the_openmp_team(program, build, part):
    output(program(build), part, "openmp")


@pytest.mark.slow
def test_openmp_with_fewer_threads_than_it_says(program):
    output(program("openmp"), "thread_limit", "openmp", OMP_THREAD_LIMIT="3")


@pytest.mark.parametrize(("build", "how"), builds((build, how) for build in OWN for how in EXITS))
def test_exit(program, build, how):
    output(program(build), "exit", how)


@pytest.mark.slow
@pytest.mark.parametrize("how", EXITS)
def test_exit_on_the_openmp_team(program, how):
    output(program("openmp"), "exit", how, "openmp")


def test_threads_from_environment(program):
    def threads(**extra):
        return output(program("plain"), "threads", **extra)

    usable = threads()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= int(usable) <= cpus
    assert threads(FUSEDRNN_NUM_THREADS="3") == "3"
    assert threads(FUSEDRNN_NUM_THREADS="3", OMP_NUM_THREADS="5") == "3"
    assert threads(FUSEDRNN_NUM_THREADS="", OMP_NUM_THREADS="5") == "5"
    assert threads(OMP_NUM_THREADS="4,2,1") == "4"
    assert threads(OMP_NUM_THREADS=" 6 , 2") == "6"
    assert threads(OMP_NUM_THREADS="99999") == "256"
    for garbage in ("", "0", "-2", "two", "3x", ",3", "99999999999999999999"):
        assert threads(OMP_NUM_THREADS=garbage) == usable
    for bad in ("0", "-1", "two", "3x", "4,2"):
        expected = f"error: FUSEDRNN_NUM_THREADS: expected an integer of at least 1, got '{bad}'"
        assert threads(FUSEDRNN_NUM_THREADS=bad) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity of processes on this system")
def test_threads_follow_the_affinity(program):
    path, allowed = program("plain"), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert output(path, "threads") == "1"
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/\n"}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "garbage\n"}, 0),
        (  # a parent's limit binds
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpuset:/x\n4:cpu,cpuacct:/docker/c\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/c/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/c/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (  # inside a container: the path is the host's, the mount shows the group itself
            {
                "proc/self/cgroup": "4:cpuacct,cpu:/docker/c\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "700000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            7,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0,
        ),
        (  # cpuset is another controller
            {
                "proc/self/cgroup": "4:cpuset:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0,
        ),
    ],
)
def test_quota(program, tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert output(program("plain"), "quota", tmp_path) == str(cpus)


def test_isa(program):
    path = program("plain")
    best = output(path, "isa")
    order = ["portable", "portable_fma", "avx2", "avx512", "neon"]
    here = order[: order.index(best) + 1] if X86 else ["portable"]
    assert best in here
    for level in here:
        assert output(path, "isa", FUSEDRNN_ISA=level) == level
    for bad in ("AVX2", "sse", "neon" if X86 else "avx2"):
        expected = f"error: FUSEDRNN_ISA: got '{bad}', available here: {', '.join(here)}"
        assert output(path, "isa", FUSEDRNN_ISA=bad) == expected
    assert output(path, "isa", FUSEDRNN_ISA="") == best
    if X86:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
        assert (best == "avx512") == ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags)
