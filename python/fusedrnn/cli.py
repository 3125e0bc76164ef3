"""The command line: ``fusedrnn info | gradcheck | bench | train``.

Exit codes: 0 done, 1 a check failed or a run broke off, 2 the command cannot be run as given, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

from fusedrnn import backends, interrupts, programs, system, terminal
from fusedrnn.cells import CELLS, Cell
from fusedrnn.cells.files import load
from fusedrnn.programs.common import at_least, output_file, refuse, seed

FAILED, USAGE = 1, 2
COPIES = {
    "always": "copies in the order of tiles",
    "large": "copies in the order of tiles if the weights take more than 4 MiB, else in place",
}


class Failed(Exception):
    """A check failed; the message is what the user reads."""


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def shape(text: str) -> Any:
    """``T,B,I,H``"""
    from fusedrnn.problems import Shape

    try:
        sizes = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        sizes = Shape(0, 0, 0, 0)
    if min(sizes) < 1 or max(sizes) >= 2**31:
        raise argparse.ArgumentTypeError(
            "expected four whole numbers T,B,I,H from 1 to 2147483647 each, for example 30,128,7,100, got "
            f"{text!r}"
        )
    return sizes


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A list of names with commas in between; an empty text is an empty list."""

    def parse(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"expected names out of {', '.join(allowed)}, got {name!r}")
        return list(dict.fromkeys(found))

    return parse


def note(text: str) -> None:
    """How far it is, in the last line of a terminal; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def add_cell(parser: argparse.ArgumentParser, what: str) -> None:
    """A cell of the user's own as the first argument."""
    parser.add_argument(
        "own",
        nargs="?",
        metavar="FILE.py:NAME",
        help=f"{what}: NAME in this file, or in a module as package.module:NAME",
    )


def own_cell(args: argparse.Namespace, without: Sequence[str] = ()) -> Cell | None:
    """The user's own cell, if there is one, with which some options cannot be given."""
    if args.own is None:
        return None
    refuse(args, without, args.own)
    return load(args.own)


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows the version, the compiler, the instruction sets (built, supported by this processor, in use), "
        "the number of threads, and each backend, with the reason if it cannot run. With a GPU, also shows "
        "how the cuda backend would run some sizes. For a cell, shows what was derived from it, and on which "
        "backends it runs."
    )
    add_cell(parser, "show a cell of your own")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")


def describe(cell: Cell) -> None:
    """Print what was derived from a cell, and where it runs."""
    print(cell)
    print("operations")
    for direction in ("forward", "backward"):
        count = sum(o.op not in ("constant", "vector") for o in getattr(cell, direction))
        print(f"  {direction}: {count}")
    print("backends")
    for name in backends.NAMES:
        print(f"  {name}: {backends.refuses(name, cell) or 'runs it'}")


def run_info(args: argparse.Namespace) -> None:
    if (cell := own_cell(args, ("json",))) is not None:
        describe(cell)
        return
    found = system.info()
    if args.json:
        print(json.dumps(found, indent=1))
        return

    def listed(values: Sequence[str]) -> str:
        return " ".join(values) or "none"

    rows = [
        ("version", found["version"]),
        ("Python", found["python"]),
        ("NumPy", found["numpy"]),
        ("compiler", found["compiler"] or "no compiled module"),
        ("instruction sets built", listed(found["built"])),
        ("instruction sets detected", listed(found["detected"])),
        ("instruction set in use", found["isa"] or "none"),
        ("weight gradients read", COPIES.get(found["ordered_copies"], "in place")),
        ("large weights", "prefetched" if found["prefetch"] else "not prefetched"),
        ("bfloat16", found["bfloat16"] or "no kernels for it here; PyTorch's own layers run"),
        ("threads", f"{found['threads']}, {found['thread_pool']} thread pool"),
    ]
    for name, why in found["backends"].items():
        default = ", the default here" if name == found["backend"] else ""
        rows.append((f"backend {name}", f"absent: {why}" if why else f"available{default}"))
    rows += [(f"cuda, {size}", plans) for size, plans in found["cuda"].items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


# What of ``bench`` is for one device alone.
OF_A_DEVICE = {"cpu": ("dtype", "peers", "backend", "threads", "memory", "plot"), "cuda": ("precision",)}


def add_bench(parser: argparse.ArgumentParser) -> None:
    from fusedrnn import bench, problems
    from fusedrnn.bench.cuda import MODES

    parser.description = (
        "Compares the time of a layer with that of its peers: variants in PyTorch, ONNX Runtime, JAX and "
        "DeZero, if they are installed and support the case. All run in turn, with the same inputs and "
        "number of threads. Each result is checked before it is timed. A ratio above 1 means that fusedrnn "
        "is faster. With --device cuda, compares our PyTorch modules with PyTorch's own, which run cuDNN, "
        "and with the lower bound of the time. A cell of your own is compared with the "
        "loop that people write for it in PyTorch, TorchScript and JAX."
    )
    add_cell(parser, "time a cell of your own")
    parser.add_argument(
        "--device", choices=list(OF_A_DEVICE), default="cpu", help="where it runs (default: %(default)s)"
    )
    cases = parser.add_mutually_exclusive_group()
    cases.add_argument(
        "--suite",
        choices=list(problems.SUITES),
        help="the list of cases: core, eleven shapes in training; programs, workloads of other libraries; "
        "rl, different lengths, resets and single steps; pytorch, our PyTorch modules, also in whole "
        "training steps; wide and deepbench, larger shapes of other benchmarks; gpu, the cases for a GPU. On "
        "a CPU, cases that take more than about 5 s per call are left out (default: core; with --device "
        "cuda: gpu)",
    )
    cases.add_argument(
        "--shape",
        type=shape,
        nargs="+",
        metavar="T,B,I,H",
        help="instead of a suite: time steps, batch size, input size, hidden size",
    )
    parser.add_argument("--cell", choices=list(CELLS), help="the cell (default: as the suite lists them)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="the dtype, on a CPU (default: float32); bfloat16 compares our PyTorch layers with PyTorch's",
    )
    parser.add_argument(
        "--precision",
        type=names(list(MODES)),
        metavar="NAMES",
        help=f"on a GPU: any of {','.join(MODES)} (default: all)",
    )
    parser.add_argument("--forward", action="store_true", help="forward only, without backward")
    parser.add_argument(
        "--peers",
        type=names(list(bench.PEERS)),
        metavar="NAMES",
        help=f"any of {','.join(bench.PEERS)} (default: all that are installed and support the cell, except "
        "the last three; for a cell of your own also numba)",
    )
    parser.add_argument(
        "--show-loop", action="store_true", help="print the loops for FILE.py:NAME, without timing them"
    )
    parser.add_argument("--backend", choices=backends.FOR_NUMPY, help="our backend (default: the fastest)")
    parser.add_argument(
        "--threads", type=at_least(1, 256), metavar="N", help="threads of each library (default: all cores)"
    )
    parser.add_argument("--memory", action="store_true", help="also show bytes saved and peak memory")
    parser.add_argument("--quick", action="store_true", help="a few small cases, few repetitions")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the result to FILE")
    parser.add_argument(
        "--plot",
        type=output_file,
        metavar="FILE",
        help="also draw the ratios to FILE, for example ratios.png",
    )


def run_bench(args: argparse.Namespace) -> None:
    from fusedrnn import bench, problems
    from fusedrnn.bench import cuda

    for device, options in OF_A_DEVICE.items():
        refuse(args, options if device != args.device else (), f"--device {args.device}")
    if args.plot:
        from fusedrnn.bench import plot  # says what to install where matplotlib is missing

        plot.check_ending(args.plot)
    own = own_cell(args, ("cell", "suite", "memory"))
    if own is not None and args.dtype == "bfloat16":
        raise ValueError(f"--dtype bfloat16: expected float32 or float64 with {args.own}")
    unable: list[str] = []
    if own is None and args.show_loop:
        raise ValueError("--show-loop: expected FILE.py:NAME, got none")
    if own is not None:
        if args.device != "cpu":
            raise ValueError(f"--device {args.device}: not with {args.own}")
        sources = [loop(own).source() for loop in (bench.TorchLoop, bench.JaxScan)]
        if args.show_loop:
            timed = ("shape", "dtype", "forward", "peers", "backend", "threads", "quick", "json", "plot")
            refuse(args, timed, "--show-loop, which times nothing")
            print("\n\n".join(sources), end="")
            return
        args.backend, unable = able(own, args.backend)
    cell = own or (CELLS[args.cell] if args.cell else None)
    suite = args.suite or ("core" if args.device == "cpu" else "gpu")
    listed = problems.SUITES[suite]
    if args.shape or own:
        suite = None
        listed = tuple(problems.Case(cell or CELLS["lstm"], s) for s in args.shape or problems.OWN_CELL)
    cases = problems.select(listed, cell, args.forward)
    if args.quick and not args.shape:
        cases = problems.quick(cases)
    modes = args.precision or list(cuda.MODES)
    total = len(cases) * (len(modes) if args.device == "cuda" else 1) + 1
    with ExitStack() as stack:
        rich = terminal.rich_report()
        bar = stack.enter_context(rich.progress(total, "bench")) if rich else None

        def progress(what: str, number: int, total: int) -> None:
            if number and bar is not None:
                bar.advance(what)
            elif number and sys.stderr.isatty():
                note(f"{number} of {total}: {what}")
            else:
                print(f"{number} of {total}: {what}" if number else what, file=sys.stderr, flush=True)

        if args.device == "cuda":
            report = cuda.run(cases, suite=suite, modes=modes, quick=args.quick, progress=progress)
            report["goals"] = cuda.judge(report["rows"])
        else:
            report = bench.run(
                cases,
                suite=suite,
                dtype=args.dtype or "float32",
                peers=args.peers,
                backend=args.backend,
                threads=args.threads,
                quick=args.quick,
                peaks=args.memory,
                progress=progress,
            )
    note("")
    if args.json:
        bench.save(report, args.json)
    terminal.table(*bench.table(report))
    if args.memory:
        terminal.table(*bench.memory_table(report))
    lines = cuda.summary(report) if args.device == "cuda" else [*bench.summary(report), *unable]
    for line in lines:
        print(line)
    if suite == "gpu" and args.device == "cuda":
        terminal.table(*cuda.goal_table(report["goals"]), left=2)
    if args.plot:
        plot.draw(report, args.plot)


def able(cell: Cell, asked: str | None) -> tuple[str, list[str]]:
    """The backend that runs a cell, and a line for each faster one that does not.

    Raises:
        ValueError: The backend that was asked for, or every one, does not run it.
    """
    unable: list[str] = []
    for name in [asked] if asked else dict.fromkeys([backends.get().name, *backends.FOR_NUMPY]):
        reason = backends.refuses(name, cell)
        if reason is None:
            return name, unable
        unable.append(f"without {name}: {reason}")
    raise ValueError("; ".join(unable))


def add_gradcheck(parser: argparse.ArgumentParser) -> None:
    from fusedrnn import gradcheck_suite
    from fusedrnn.gradcheck import tables

    parser.description = (
        "Compares every output and gradient of every cell, backend, dtype and option with a reference in "
        "long double, and the reference with complex-step derivatives. Prints the worst error of each cell, "
        "backend and dtype, and that of plain NumPy. The exit code is 1 if an error is too large."
    )
    add_cell(parser, "check a cell of your own instead of the built-in ones")
    choices = {
        "cell": list(CELLS),
        "backend": [tables.ORACLE, *backends.NAMES],
        "dtype": list(gradcheck_suite.DTYPES),
        "option": list(gradcheck_suite.OPTIONS),
    }
    for name, known in choices.items():
        text = f"only these {name}s: any of {', '.join(known)}"
        parser.add_argument(f"--{name}", choices=known, nargs="+", metavar=name.upper(), help=text)
    parser.add_argument("--levels", action="store_true", help="the cpu backend on every instruction set")
    lines = parser.add_mutually_exclusive_group()
    lines.add_argument("--verbose", action="store_true", help="a line for each option")
    lines.add_argument("--tensors", action="store_true", help="a line for each tensor")
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the problems (default: %(default)s)")


def run_gradcheck(args: argparse.Namespace) -> None:
    from fusedrnn import gradcheck_suite
    from fusedrnn.gradcheck import tables

    def progress(done: int, total: int, row: tables.Row) -> None:
        note(f"{done} of {total}: {row.cell} {row.backend} {row.dtype} {row.option}")

    cell = own_cell(args, ("cell", "levels"))
    if args.levels and args.backend is not None and "cpu" not in args.backend:
        raise ValueError(f"--levels: expected cpu among --backend, got {', '.join(args.backend)}")
    rows = gradcheck_suite.run_suite(
        cells=args.cell if cell is None else [cell],
        backends=args.backend,
        dtypes=args.dtype,
        options=args.option,
        seed=args.seed,
        progress=progress,
        sizes=gradcheck_suite.QUICK if args.quick else gradcheck_suite.SIZES,
        levels=gradcheck_suite.available_levels() if args.levels else None,
    )
    note("")
    if args.tensors:
        header, cells = tables.format_tensors(rows)
    else:
        header, cells = tables.format_rows(rows if args.verbose else tables.summarize(rows))
        if not args.verbose:
            header = tuple("options" if name == "option" else name for name in header)
    left = 3 if args.tensors else 4
    terminal.table("Largest error, relative to each tensor's largest entry", header, cells, left)
    for line in tables.format_notes(rows):
        print(line)
    wrong = [row for row in rows if row.passed is False]
    absent = [row for row in rows if row.passed is None]
    print(f"{len(rows) - len(wrong) - len(absent)} passed, {len(wrong)} failed, {len(absent)} not run")
    if len(absent) == len(rows):
        raise Failed("nothing was checked")
    if wrong:
        first = wrong[0]
        raise Failed(f"{first.cell} {first.backend} {first.dtype} {first.option}: {first.note}")


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains one of the programs in the package, and prints its scores."
    commands = parser.add_subparsers(title="programs", dest="program", metavar="NAME", required=True)
    for name, module in programs.PROGRAMS.items():
        text = (module.__doc__ or name).strip()
        program = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(program)
        program.set_defaults(module=module)


def run_train(args: argparse.Namespace) -> None:
    args.module.run(args, terminal.rich_report() or terminal.Report())


COMMANDS = {
    "info": ("show what is installed, and what is used on this machine", add_info, run_info),
    "gradcheck": ("check the gradients of every cell, backend and dtype", add_gradcheck, run_gradcheck),
    "bench": ("compare the speed with PyTorch, ONNX Runtime, JAX and others", add_bench, run_bench),
    "train": ("train one of the programs in the package", add_train, run_train),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="fusedrnn", description="Fast LSTM, GRU and Elman RNN layers for training on a CPU.")
    top.add_argument("--version", action="version", version=system.version())
    top.add_argument("--traceback", action="store_true", help="on an error, print the traceback")
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, (text, add, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add(command)
        command.set_defaults(run=run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = None
    try:
        interrupts.raise_again()
        top = parser()
        args = top.parse_args(argv)
        if args.command is None:
            top.print_help()
            return 0
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        note("")
        print(f"interrupted {stop}".rstrip(), file=sys.stderr)
        return interrupts.INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in: fusedrnn info | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (
        Failed, ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError, ArithmeticError
    ) as error:  # fmt: skip
        if args is None or args.traceback:
            raise
        note("")
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fusedrnn {args.command}: {message}", file=sys.stderr)
        usage = isinstance(error, (ValueError, TypeError, ImportError, OSError, NotImplementedError))
        return USAGE if usage else FAILED
    return 0
