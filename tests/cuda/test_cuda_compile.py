"""The CUDA sources compile for every GPU they are for, and Python's picture of them is the right one.

Compiling needs no GPU. NVRTC compiles what a user's first call would, and says how the kernels use registers.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import emulated
from fusedrnn.backends.cuda import cupy_device, nvrtc
from fusedrnn.backends.cuda.jobs import BackwardJob, Cut, ForwardJob, MaskRule, Rules, Steps, kernels_of
from fusedrnn.backends.cuda.launches import MOST_SUMS
from fusedrnn.backends.cuda.plans import Tile, cut
from fusedrnn.cells import lstm, rnn
from problems import NORMED, PLAIN
from test_cuda_plan import Limits

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TYPES = tuple(kernels_of(cell).type for cell in PLAIN)
NORMED_TYPES = tuple(kernels_of(cell).type for cell in NORMED[:4])
STEPPED_TYPES = (*NORMED_TYPES, *(f"Regularized<{type_}>" for type_ in (*TYPES, *NORMED_TYPES)))
KERNELS = [
    "begin_forward", "step_forward", "step_forward2", "begin_backward", "step_backward", "step_backward2",
    "finish_backward", "operands",
    *(f"{kernel}_{way}" for kernel in ("grid", "cluster") for way in ("forward", "backward")),
]  # fmt: skip
KINDS = [("float", "ieee"), ("double", "ieee"), ("Half", "fp16"), ("Bfloat16", "bf16")]
LSTM_CODE = nvrtc.Code("Lstm", "float")


def nvrtc_missing() -> str | None:
    try:
        nvrtc.version()
    except Exception as error:  # of CuPy, or of the library, which is another package
        return f"CuPy or NVRTC is not installed ({cupy_device._line(error)})"
    return None


needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
needs_compiler = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is found compiled, and nothing is left."""
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))


# --- NVRTC -------------------------------------------------------------------------------------------------


def kernels_in(code: bytes) -> set[str]:
    """Those of ``KERNELS`` whose symbols this ELF file has."""
    assert code.startswith(b"\x7fELF")
    return {kernel for kernel in KERNELS if f"\0{kernel}\0".encode() in code}


def compile_all(cases) -> None:
    """Cell, dtype, precision and architecture, on two threads: NVRTC leaves the interpreter to others."""
    with ThreadPoolExecutor(2) as pool:
        for code in pool.map(lambda case: nvrtc.cubin(nvrtc.Code(*case[:3]), case[3]), list(cases)):
            assert kernels_in(code) == set(KERNELS)


@pytest.fixture
def little_optimisation(monkeypatch):
    """Optimisation takes most of the time."""
    compile_ = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda options: compile_([*options, "--Ofast-compile=max"]))


@needs_nvrtc
def test_kernels_compile_as_for_a_user():
    found = kernels_in(nvrtc.cubin(LSTM_CODE, "sm_90", "grid"))
    assert {nvrtc.variant_of(kernel) for kernel in found} == {"grid"}


@needs_nvrtc
def test_each_cell_compiles(little_optimisation):
    """Each in a dtype, on an old or a new architecture."""
    compile_all(
        (cell, *KINDS[k % len(KINDS)], ("sm_80", "sm_90", "sm_120")[k % 3]) for k, cell in enumerate(TYPES)
    )


@needs_nvrtc
@pytest.mark.slow
def test_all_compile(little_optimisation):
    """For every architecture each cell and dtype, of what runs step by step alone float."""
    cases = [*itertools.product(TYPES, KINDS), *itertools.product(STEPPED_TYPES, KINDS[:1])]
    compile_all((cell, *kind, a) for (cell, kind), a in itertools.product(cases, ARCHITECTURES))


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("precision", nvrtc.PRECISIONS[1:])
def test_each_precision_compiles(precision):
    compile_all(("Lstm", "float", precision, architecture) for architecture in ("sm_80", "sm_90"))


@pytest.mark.slow
@needs_nvrtc
def test_each_kernel_variant_compiles_by_itself():
    """As for a user; together they have every kernel."""
    seen = []
    for variant in nvrtc.KERNELS:
        found = kernels_in(nvrtc.cubin(LSTM_CODE, "sm_90", variant))
        assert {nvrtc.variant_of(kernel) for kernel in found} == {variant}
        seen += found
    assert sorted(seen) == sorted(KERNELS)


@needs_nvrtc
def test_what_does_not_compile_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r'NVRTC_ERROR_COMPILATION.*"Abacus" is undef'):
        nvrtc.cubin(nvrtc.Code("Abacus", "float"), "sm_90")
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_INVALID_OPTION"):
        nvrtc.cubin(nvrtc.Code("RnnTanh", "float"), "sm_1")
    assert not list(tmp_path.rglob("*.cubin"))


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The options of what was compiled, in place of compiling."""
    calls = []
    monkeypatch.setattr(nvrtc, "_compile", lambda options: calls.append(options) or b"code")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return calls


def test_the_cache(compiled, tmp_path, monkeypatch):
    for _ in range(2):
        assert nvrtc.cubin(LSTM_CODE, "sm_90") == b"code"
    assert len(compiled) == 1
    (file,) = tmp_path.rglob("*.cubin")
    assert file.name.startswith("Lstm-float-ieee-sm_90-")
    nvrtc.cubin(nvrtc.Code("Lstm", "double"), "sm_90")
    nvrtc.cubin(LSTM_CODE, "sm_80")
    assert len(compiled) == 3
    for _ in range(2):
        nvrtc.cubin(LSTM_CODE, "sm_80", "cluster")
    assert "--define-macro=FUSEDRNN_ONLY=1" in compiled.pop()
    assert len(compiled) == 3
    assert len([*tmp_path.rglob("Lstm-cluster-float-ieee-sm_80-*.cubin")]) == 1
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))  # another NVRTC
    nvrtc.cubin(LSTM_CODE, "sm_90")
    assert len(compiled) == 4


@pytest.mark.parametrize(
    "file", ["cuda/unit.h", "cells/derived.h", "simd/math.h", "steps.h", "cuda/kernels.cu"]
)
def test_other_sources_are_compiled_again(compiled, tmp_path, monkeypatch, file):
    folder = tmp_path / "csrc"
    shutil.copytree(nvrtc.sources(), folder)
    monkeypatch.setattr(nvrtc, "sources", lambda: folder)
    nvrtc.cubin(LSTM_CODE, "sm_90")
    with open(folder / file, "a") as text:
        text.write("// changed\n")
    nvrtc.cubin(LSTM_CODE, "sm_90")
    nvrtc.cubin(LSTM_CODE, "sm_90")
    assert len(compiled) == 2


def test_where_the_cache_is(monkeypatch):
    assert nvrtc.folder() == Path(os.environ["FUSEDRNN_CACHE"])
    monkeypatch.delenv("FUSEDRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert nvrtc.folder() == Path("/there/fusedrnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert nvrtc.folder() == Path("/home/somebody/.cache/fusedrnn")


def test_a_cache_that_cannot_be_written_is_no_error(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert nvrtc.cubin(LSTM_CODE, "sm_90") == b"code"
    assert len(compiled) == 2


def test_what_broke_off_leaves_nothing_behind(compiled, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    assert nvrtc.cubin(LSTM_CODE, "sm_90") == b"code"
    assert not list((tmp_path / "cache").iterdir())


def test_the_sources_are_found_in_the_tree_and_in_an_installed_package(tmp_path, monkeypatch):
    find = nvrtc.sources.__wrapped__
    assert (find() / "cuda" / "kernels.cu").is_file()
    package = tmp_path / "site-packages" / "fusedrnn"
    monkeypatch.setattr(nvrtc, "_PACKAGE", package)
    with pytest.raises(RuntimeError, match=r"^the sources of the CUDA kernels, csrc/cuda, are not beside"):
        find()
    (package / "csrc" / "cuda").mkdir(parents=True)
    (package / "csrc" / "cuda" / "kernels.cu").write_text("")
    assert find() == package / "csrc"


# --- registers ---------------------------------------------------------------------------------------------

CODES = [nvrtc.Code(cell, "float") for cell in (*TYPES, "LstmLayerNorm", "Regularized<LstmLayerNorm>")]
CODES += [nvrtc.Code("Lstm", "float", precision) for precision in nvrtc.PRECISIONS[1:]]
CODES += [nvrtc.Code("Lstm", *kind) for kind in KINDS[2:]]


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("code", CODES, ids="-".join)
def test_kernels_keep_to_their_registers(monkeypatch, code):
    """No kernel spills; all steps in one launch run with a whole block on a multiprocessor."""
    compiler = importlib.import_module("cupy.cuda").nvrtc

    def said(options):
        program = compiler.createProgram(nvrtc.sources().joinpath("cuda/kernels.cu").read_text(), "", (), ())
        compiler.compileProgram(program, [*options, "--ptxas-options=-v"])
        return compiler.getProgramLog(program).encode()

    monkeypatch.setattr(nvrtc, "_compile", said)
    used = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        nvrtc.cubin(code, "sm_90").decode(),
        re.DOTALL,
    )
    assert {kernel for kernel, *_ in used} == set(KERNELS)
    for kernel, frame, *spilled, registers in used:
        assert spilled == ["0", "0"], kernel
        assert frame == "0" or nvrtc.variant_of(kernel) == "steps", kernel
        assert int(registers) * 32 * nvrtc.WARPS <= 65536


# --- Python's picture of the sources ------------------------------------------------------------------------

PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#define FUSEDRNN_LEVEL cuda
#define FUSEDRNN_LEVEL_CUDA
#include "simd/inline.h"
#include "cuda/device.h"
#include "cells/derived.h"
#include "cuda/all_steps.h"
#include "cuda/norm.h"
using namespace fusedrnn;
using namespace fusedrnn::cuda;
char* emulation::shared_memory() { return nullptr; }
emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

template <class Cell>
static void cell(const char* name) {
  static_assert(2 * RowNorm<Cell, RowUnits<float>>::kNorms <= @MOST_SUMS@, "of a block's shared memory");
  printf("cell %s %d\\n", name, kNormSums<Cell>);
}
template <class S, Precision precision, int columns, template <class> class Exchange>
static void shared(const Cut& cut, Index K) {
  using Tile = TileOf<S, precision, columns>;
  using F = typename Tile::Factor;
  const Layout layout(cut, Tile::columns);
  const Index pitch = pitch_of<F>(K), sums = layout.sum(layout.splits, 0, 0);
  const Exchange<F> exchange(cut, nullptr, layout.rows, pitch);
  printf("shared %d %d %d %zu %zu\\n", Tile::columns, Tile::kept, layout.columns,
         size_t(exchange.after_shared()) + sums * sizeof(Compute<S>), 2 * layout.rows * pitch * sizeof(F));
}
template <int columns, template <class> class Exchange>
static void shared_of(int number, const Cut& cut, Index K) {
  using Call = void (*)(const Cut&, Index);
  const Call calls[] = {shared<float, Precision::ieee, columns, Exchange>,
                        shared<double, Precision::ieee, columns, Exchange>,
                        shared<float, Precision::tf32, columns, Exchange>,
                        shared<Bfloat16, Precision::bf16, columns, Exchange>,
                        shared<Half, Precision::fp16, columns, Exchange>};
  calls[number](cut, K);
}
int main() {
  @FIELDS@
  cell<RnnTanhLayerNorm>("RnnTanhLayerNorm"), cell<RnnReluLayerNorm>("RnnReluLayerNorm");
  cell<LstmLayerNorm>("LstmLayerNorm"), cell<GruResetAfterLayerNorm>("GruResetAfterLayerNorm");
  int number, cluster, backward;
  long n[4];
  while (scanf("%d %d %d %ld %ld %ld %ld", &number, &cluster, &backward, n, n + 1, n + 2, n + 3) == 7) {
    const Cut cut{0, n[0], n[1], n[2], nullptr, nullptr};
    if (cluster)
      shared_of<16, ClusterExchange>(number, cut, n[3]);
    else if (backward)
      shared_of<8, GridExchange>(number, cut, n[3]);
    else
      shared_of<16, GridExchange>(number, cut, n[3]);
  }
}
"""


STRUCTURES = {  # in C++; the pointers alone know a dtype
    Steps: "Steps",
    MaskRule: "MaskRule",
    Rules: "cuda::Regularization",
    Cut: "cuda::Cut",
    ForwardJob: "ForwardJob<float>",
    BackwardJob: "BackwardJob<double>",
}


def fields(structure: type[ctypes.Structure], type_: str) -> str:
    """C++ that prints where every field lies."""
    name, printed = structure.__name__, "offsetof({0}, {1}), sizeof((({0}*)nullptr)->{1})"
    lines = [f'printf("size {name} %zu\\n", sizeof({type_}));']
    for field, *_ in structure._fields_:
        lines.append(f'printf("field {name} {field} %zu %zu\\n", {printed.format(type_, field)});')
    return "\n  ".join(lines)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of the program, by their first word."""
    folder = tmp_path_factory.mktemp("picture")
    text = PROGRAM.replace("@FIELDS@", "\n  ".join(fields(*pair) for pair in STRUCTURES.items()))
    (folder / "picture.cpp").write_text(text.replace("@MOST_SUMS@", str(MOST_SUMS)))
    program = emulated.build([folder / "picture.cpp"], ["-w"], ROOT / "csrc", folder)
    given = "".join(f"{' '.join(map(str, numbers))}\n" for _, numbers, _ in blocks())
    out = subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[list[str]]] = {}
    for first, *rest in map(str.split, out.splitlines()):
        found.setdefault(first, []).append(rest)
    return found


@needs_compiler
def test_structures(printed):
    here = {s.__name__: s for s in STRUCTURES}
    assert {n: int(size) for n, size in printed["size"]} == {n: ctypes.sizeof(s) for n, s in here.items()}
    assert len(printed["field"]) == sum(len(s._fields_) for s in here.values())
    for structure, field, offset, size in printed["field"]:
        mine = getattr(here[structure], field)
        assert (mine.offset, mine.size) == (int(offset), int(size)), f"{structure}.{field}"


def test_no_field_is_left_out():
    """Sizes and offsets would not show two fields of a kind that have changed places."""
    text = "".join((ROOT / "csrc" / file).read_text() for file in ("cuda/jobs.h", "mask_rule.h", "steps.h"))
    for structure, type_ in STRUCTURES.items():
        name = re.sub("cuda::|<.*", "", type_)
        body = re.search(rf"struct {name} {{\n(.*?)\n}};", text, re.DOTALL)[1]
        body = re.sub(r"//.*|using .*", "", body)
        names = re.findall(r"\*?(\w+)(?:\[\d\])?\s*(?=[,;])", body)
        assert names == [field for field, *_ in structure._fields_]


@needs_compiler
def test_sums_of_layer_norm(printed):
    found = {kernels_of(cell).type: str(kernels_of(cell).norm_sums) for cell in NORMED[:4]}
    assert dict(printed["cell"]) == found


def blocks():
    """Plans of many sizes, as the program reads them, which has the kinds in this order, and what it is to
    print of each."""
    device = Limits(10_000, 1 << 22, 8, 16)
    kinds = ((4, "ieee"), (8, "ieee"), (4, "tf32"), (4, "bf16"), (4, "fp16"))
    for kernel, (number, kind) in itertools.product(nvrtc.KERNELS[1:], enumerate(kinds)):
        for cell, backward, H, units, rows in itertools.product(
            (kernels_of(rnn), kernels_of(lstm)), (False, True), (1, 33, 100, 261), (1, 7, 13), (1, 9, 31)
        ):
            plan = cut(kernel, cell, 31, H, kind[0], device, kind[1], backward, units, rows)
            if plan is None:
                continue
            K, grid = (cell.recurrent.count * H if backward else H), kernel == "grid"
            tile = Tile.of(*kind, backward and grid)
            numbers = (number, int(not grid), int(backward), rows, plan.splits, plan.at_once, K)
            exchanged = 2 * -(-rows // 8) * 8 * tile.row(K)
            assert plan.exchanged == grid * plan.blocks[1] * exchanged
            columns = 8 // plan.splits * tile.columns
            yield kernel, numbers, (tile.columns, tile.kept, columns, plan.shared, exchanged)


@needs_compiler
def test_shared_memory(printed):
    expected = [list(map(str, line)) for _, _, line in blocks()]
    assert {kernel for kernel, *_ in blocks()} == set(nvrtc.KERNELS[1:])
    assert printed["shared"] == expected
