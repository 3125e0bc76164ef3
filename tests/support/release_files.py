"""Checks what a release publishes: python tests/support/release_files.py FILE... [--linked FOLDER]

A source archive holds what git has, without what only the repository needs. A wheel holds the package, the
compiled module and the sources of the CUDA kernels, which NVRTC compiles on the user's machine; no tests, no
C++ of the CPU.

FOLDER has the module as it was linked, with the symbols that installing strips. Its code must be the wheel's,
and a function outside the namespaces of the instruction sets must run on every x86-64 processor.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPOSITORY_ONLY = re.compile(r"\.(ci|github)/|\.(clang-format|gitignore|pre-commit-config\.yaml)$")
CUDA = re.compile(r"csrc/((cuda|cells|simd)/.*\.(h|cu)|mask_rule\.h|steps\.h)$")
MODULE = re.compile(r"fusedrnn/_core\.[^/]*(so|pyd)$")
# Of a mangled name.
LEVEL = re.compile(r"_Z.*8fusedrnn(?:4(avx2)|6(avx512)|11(avx512_bf16)|8(amx_bf16)|12(portable_fma))")


def tracked() -> set[str]:
    """The files of the repository."""
    return set(output("git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z").rstrip("\0").split("\0"))


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def differences(kind: str, found: set[str], expected: set[str]) -> list[str]:
    lines = [f"{kind}: {name} does not belong there" for name in sorted(found - expected)]
    return lines + [f"{kind}: {name} is missing" for name in sorted(expected - found)]


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for name in tracked() if not REPOSITORY_ONLY.match(name)}
    return differences("source archive", found, expected | {"PKG-INFO"})


def check_wheel(path: Path) -> list[str]:
    found = set(zipfile.ZipFile(path).namelist())
    modules = {name for name in found if MODULE.match(name)}
    about = {name for name in found if re.match(r"fusedrnn-[^/]*\.dist-info/", name)}
    expected = {name.removeprefix("python/") for name in tracked() if name.startswith("python/")}
    expected |= {f"fusedrnn/{name}" for name in tracked() if CUDA.match(name)}
    wrong = differences("wheel", found - modules - about, expected)
    if len(modules) != 1:
        wrong.append(f"wheel: expected one compiled module, got {sorted(modules)}")
    return wrong


# --- code that the oldest processor cannot run --------------------------------------------------------------

PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f2", "f3"}
VEX = {"c4", "c5", "62"}  # in 64-bit mode nothing else begins so: AVX, AVX2, FMA, BMI; 62 is AVX-512
# Of SSE3 and later, without a prefix or an opcode map of their own.
NEWER = re.compile(r"addsub|hadd|hsub|lddqu|movddup|movs[hl]dup|fisttp|popcnt|lzcnt")


def is_newer(code: list[str], mnemonic: str) -> bool:
    """Whether an instruction, its bytes in hexadecimal, is in no x86-64 processor of the first generation."""
    while code and code[0] in PREFIXES:
        code = code[1:]
    if code and code[0] in VEX:
        return True
    if code and code[0][0] == "4":  # REX
        code = code[1:]
    return code[:2] in (["0f", "38"], ["0f", "3a"]) or bool(NEWER.match(mnemonic))


def newer_instructions(module: Path) -> Counter[str]:
    """How many instructions of each function are newer than the first x86-64 processor."""
    found: Counter[str] = Counter()
    function = ""
    for line in output("objdump", "-d", "--insn-width=15", module).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = match[1]
        elif match := re.match(r" *[0-9a-f]+:\t([0-9a-f ]+)\t(\S+)", line):
            found[function] += is_newer(match[1].split(), match[2])
    return +found


def check_instructions(module: Path) -> list[str]:
    """Only functions of a level's namespace use what not every processor has, and of them some do."""
    levels: Counter[str] = Counter()
    wrong = []
    for function, count in newer_instructions(module).items():
        if match := LEVEL.match(function):
            levels[match[match.lastindex or 0]] += count
        else:  # initialisers of a level's file, too, whose names begin with _GLOBAL__sub_I_
            wrong.append(f"{module.name}: {function} has {count} instructions that not every processor has")
    print(f"{module.name}: instructions that not every processor has: {dict(levels)}, elsewhere {len(wrong)}")
    if not levels:
        wrong.append(f"{module}: no function of an instruction set found; was it stripped?")
    return wrong


def text_of(module: Path) -> bytes:
    """The machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text")
        output("objcopy", "-O", "binary", "--only-section=.text", module, file)
        return file.read_bytes()


def check_linked(path: Path, folder: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as scratch:
        name = next(name for name in wheel.namelist() if MODULE.match(name))
        installed = Path(wheel.extract(name, scratch))
        linked = [file for file in folder.rglob(installed.name) if text_of(file) == text_of(installed)]
    if not linked:
        return [f"{folder}: no {installed.name} with the code of the wheel's"]
    return check_instructions(linked[0])


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks what a release publishes.")
    parser.add_argument("files", nargs="+", type=Path, help="source archives and wheels")
    parser.add_argument("--linked", type=Path, help="the folder of the build: also checks the wheel's code")
    options = parser.parse_args()
    wrong = []
    for path in options.files:
        wrong += check_sdist(path) if path.suffix == ".gz" else check_wheel(path)
        if path.suffix == ".whl" and options.linked and "x86_64" in path.name:
            wrong += check_linked(path, options.linked)
    print("\n".join(wrong) or f"{len(options.files)} files checked")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
