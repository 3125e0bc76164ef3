"""csrc/cuda made by nvcc into a fatbin: code for all of ``cuda_compile.ARCHITECTURES`` in one file.

CMakeLists.txt runs it, in a build that may have no package but the standard library:

    fatbin.py                   prints the names of all that can be made
    fatbin.py NAME NVCC FOLDER  makes FOLDER/NAME.fatbin, and NAME.json, by which ``shipped`` knows it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

# Flags and key come from the module that compiles at run time; at the end of the path, where its neighbours
# hide nothing.
sys.path.append(str(Path(__file__).parents[1] / "python" / "fusedrnn" / "backends"))
import cuda_compile

TYPES = ("RnnTanh", "RnnRelu", "Lstm", "GruResetAfter", "GruResetBefore")


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
    """The CUDA version of nvcc."""
    output = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None:
        raise SystemExit(f"{nvcc} --version: expected a line with its release, got {output!r}")
    return int(version[1]), int(version[2])


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
    if arguments:
        name, nvcc, folder = arguments
        build(name, nvcc, Path(folder))
    else:
        print(*names(), sep=";", end="")


if __name__ == "__main__":
    main(sys.argv[1:])
