"""Build bench/ulp_sweep.cpp for every level that runs here, compare the levels' bits and keep the figures.

    python bench/ulp_sweep.py --machine "AMD EPYC (Zen 5), 2 cores"     # every float: 2-3 minutes a level
    python bench/ulp_sweep.py --stride 97 --output sample.json          # a sample, in seconds
    python bench/ulp_sweep.py --compiler aarch64-linux-gnu-g++ --runner qemu-aarch64-static --levels neon \
        --stride 997 --output neon.json                                 # another architecture, emulated

Exit code 1 where an error is above 2 ULP (plain portable code included), a promise is broken, or a level with
FMA has other bits than the first one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma",
    "avx2": "-mavx2 -mfma",
    "portable_fma": "-mfma",
    "portable": "",
    "neon": "",
}
MODES = ("subnormals flushed", "subnormals kept")


def sweep(level: str, compiler: str, runner: list[str], stride: int, folder: Path) -> dict:
    program = folder / level
    options = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]
    options += [f"-DFUSEDRNN_LEVEL={level}", f"-DFUSEDRNN_LEVEL_{level.upper()}", *FLAGS[level].split()]
    if runner:
        options.append("-static")
    subprocess.run([compiler, *options, ROOT / "bench/ulp_sweep.cpp", "-o", program], check=True)
    result = subprocess.run([*runner, program, str(stride)], check=True, capture_output=True, text=True)
    figures = json.loads(result.stdout)
    if runner:  # an emulator's times say nothing
        for f in figures.values():
            if isinstance(f, dict):
                f["ns_per_element"] = None
    return figures


def broken(levels: dict[str, dict]) -> list[str]:
    """Every promise that a figure does not keep, in words."""
    found = []
    fused = [name for name in levels if name != "portable"]
    for name, figures in levels.items():
        for function in (key for key in figures if isinstance(figures[key], dict)):
            for mode in MODES:
                f = figures[function][mode]
                where = f"{name}, {function}, {mode}"
                if f["max_ulp"] > 2:
                    found.append(f"{where}: {f['max_ulp']} ULP at {f['at']}")
                if f["nan_errors"] or f["odd_errors"]:
                    found.append(f"{where}: {f['nan_errors']} NaN errors, {f['odd_errors']} of odd symmetry")
                if name in fused and f["hash"] != levels[fused[0]][function][mode]["hash"]:
                    found.append(f"{where}: other bits than {fused[0]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", nargs="+", default=[*FLAGS][:4], choices=FLAGS)
    parser.add_argument("--stride", type=int, default=1, help="every STRIDE-th float (default: all)")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--runner", default="", help="a command that runs the program, an emulator")
    parser.add_argument("--machine", default="")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/activations.json")
    arguments = parser.parse_args()
    version = subprocess.run(
        [arguments.compiler, "-dumpfullversion"], check=True, capture_output=True, text=True
    )
    levels = {}
    with tempfile.TemporaryDirectory() as folder:
        for level in arguments.levels:
            levels[level] = sweep(
                level, arguments.compiler, arguments.runner.split(), arguments.stride, Path(folder)
            )
            for key, f in levels[level].items():
                if isinstance(f, dict):
                    worst = max(f[mode]["max_ulp"] for mode in MODES)
                    print(f"{level:13} {key:16} {worst:7.4f} ULP  {f['ns_per_element']} ns", flush=True)
    record = {
        "machine": arguments.machine,
        "date": date.today().isoformat(),
        "compiler": f"{arguments.compiler} {version.stdout.strip()}",
        "levels": levels,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    failures = broken(levels)
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
