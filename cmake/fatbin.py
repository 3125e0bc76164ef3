"""csrc/cuda made by nvcc into a fatbin: code for all of ``cuda_compile.ARCHITECTURES`` in one file.

CMakeLists.txt runs it, in a build that may have no package but the standard library:

    fatbin.py                             prints the names of all that can be made
    fatbin.py NVCC                        prints the names of what AUTO makes, or fails with a line that says
                                          why this nvcc makes none here
    fatbin.py NAME NVCC FOLDER [unasked]  makes FOLDER/NAME.fatbin, and NAME.json, by which ``shipped`` knows
                                          it; unasked, it goes on without where nvcc fails
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Flags and key come from the module that compiles at run time; at the end of the path, where its neighbours
# hide nothing.
sys.path.append(str(Path(__file__).parents[1] / "python" / "fusedrnn" / "backends"))
import cuda_compile

TYPES = ("RnnTanh", "RnnRelu", "Lstm", "GruResetAfter", "GruResetBefore")

UNASKED = ("Lstm-float-ieee", "GruResetAfter-float-ieee", "RnnTanh-float-ieee")
OLDEST = (12, 8)  # knows sm_100 and sm_120
LIMIT = 60  # seconds for a kernel that does nothing, which takes three; what takes longer hangs


def names() -> list[str]:
    """Every plain cell, dtype and precision."""
    return [
        f"{cell}-{dtype}-{precision}" for cell in TYPES for dtype, precision in cuda_compile.DTYPE_PRECISIONS
    ]


def targets() -> list[str]:
    """Code of every architecture, and PTX of the last, which drivers compile for newer GPUs."""
    numbers = [architecture.removeprefix("sm_") for architecture in cuda_compile.ARCHITECTURES]
    pairs = [(f"compute_{n}", f"sm_{n}") for n in numbers]
    pairs.append((f"compute_{numbers[-1]}", f"compute_{numbers[-1]}"))
    return [f"--generate-code=arch={virtual},code={real}" for virtual, real in pairs]


def release(nvcc: str) -> tuple[int, int]:
    """Of CUDA."""
    said = answer([nvcc, "--version"])
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None:
        raise SystemExit(f"{nvcc} --version: expected a line with its release, got {said!r}")
    return int(version[1]), int(version[2])


def answer(command: list[str]) -> str:
    """What a command prints that ends well and in time."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            if isinstance(error, subprocess.TimeoutExpired):
                raise SystemExit(f"{command[0]} does not answer within {LIMIT} s") from None
            raise
    if process.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        why = [line for line in lines if "error" in line] or lines or [f"status {process.returncode}"]
        raise SystemExit(f"{command[0]} fails here: {why[0]}")
    return said


def check(nvcc: str) -> None:
    """Fails where it cannot make code for all architectures, or no code at all."""
    major, minor = release(nvcc)
    if (major, minor) < OLDEST:
        raise SystemExit(f"{nvcc} is of CUDA {major}.{minor}, and it takes {OLDEST[0]}.{OLDEST[1]} or later")
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "nothing.cu"
        kernel.write_text("__global__ void nothing() {}\n")
        told = ["--fatbin", *cuda_compile.flags("Lstm", "float", "ieee"), *targets()]
        answer([nvcc, *told, str(kernel), f"--output-file={folder}/nothing.fatbin"])


def build(name: str, nvcc: str, folder: Path) -> None:
    """Make a file, and beside it of what it was made."""
    cell, dtype, precision = name.split("-")
    csrc = cuda_compile.sources()
    cuda = release(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            nvcc,
            "--fatbin",
            *cuda_compile.flags(cell, dtype, precision),
            *targets(),
            "--threads=0",  # one for each core, which take the architectures
            f"--include-path={csrc}",
            str(csrc / "cuda" / "kernels.cu"),
            f"--output-file={folder / name}.fatbin",
        ],
        check=True,
    )
    made = {"key": cuda_compile.fatbin_key(cell, dtype, precision), "cuda": cuda}
    (folder / f"{name}.json").write_text(json.dumps(made))


def main(arguments: list[str]) -> None:
    if not arguments:
        print(*names(), sep=";", end="")
    elif len(arguments) == 1:
        try:
            check(*arguments)
        except OSError as error:
            raise SystemExit(f"{arguments[0]} fails here: {error}") from None
        print(*UNASKED, sep=";", end="")
    else:
        name, nvcc, folder, *unasked = arguments
        try:
            build(name, nvcc, Path(folder))
        except (SystemExit, OSError, subprocess.CalledProcessError) as error:
            if not unasked:
                raise
            for suffix in ("fatbin", "json"):
                (Path(folder) / f"{name}.{suffix}").unlink(missing_ok=True)
            print(f"no {name}.fatbin, NVRTC will compile it at the first use: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
