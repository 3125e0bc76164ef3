"""nox -s lint | tests | types | build | thirdparty | bench | docs | site | linkcheck.

Each has an environment of its own.
"""

import shutil
import tarfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """The linters of .ci/run."""
    session.install("ruff", "mypy", "clang-format", "codespell", "numpy")
    session.install("check-jsonschema>=0.39", "validate-pyproject[all]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    sources = session.run("git", "ls-files", "*.h", "*.cpp", "*.cu", external=True, silent=True, log=False)
    session.run("clang-format", "--dry-run", "-Werror", *sources.split())
    files = session.run("git", "ls-files", external=True, silent=True, log=False)
    session.run("codespell", *files.splitlines())
    workflows = [file for file in files.splitlines() if file.startswith(".github/workflows/")]
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("validate-pyproject", "pyproject.toml")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, as far as the extras at hand go."""
    session.install(".[cli,plot,numba]", "-r", "tests/requirements.txt")
    session.run("pytest", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """The compiled module has what its stub says, and a user's program passes ``mypy --strict``."""
    session.install(".[torch]", "mypy")
    session.run("stubtest", "fusedrnn._core", "--allowlist", "tests/support/stubtest.txt")
    session.run("mypy", "--strict", "tests/support/typed_program.py")
    session.run("python", "tests/support/typed_program.py")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def build(session: nox.Session) -> None:
    """A release's files, into build/dist-VERSION: checked, then tested where no compiler is found."""
    session.install("build", "twine", "auditwheel")
    dist, linked = Path(f"build/dist-{session.python}"), Path(f"build/linked-{session.python}").absolute()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), f"-Cbuild-dir={linked}")
    [archive], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    session.run("twine", "check", "--strict", str(archive), str(wheel))
    session.run("auditwheel", "show", str(wheel))
    checks = "tests/support/release_files.py"
    session.run("python", checks, str(archive), str(wheel), "--linked", str(linked))

    # A program and the quick tests, as a user without a clone runs them. PATH has only the environment.
    scratch = Path(session.create_tmp()).absolute()
    session.run("python", "-m", "venv", "--clear", str(scratch / "venv"))
    programs = scratch / "venv" / "bin"
    with tarfile.open(archive) as file:
        file.extractall(scratch, filter="data")

    def run(program: str, *arguments: str) -> None:
        session.run(str(programs / program), *arguments, env={"PATH": str(programs)}, external=True)

    run("pip", "install", f"{wheel.absolute()}[cli]")
    with session.chdir(scratch / archive.name.removesuffix(".tar.gz")):
        run("fusedrnn", "train", "runoff")
        run("pip", "install", "-r", "tests/requirements.txt")
        run("pytest", "-m", "quick")
    if emulator := shutil.which("qemu-x86_64-static"):  # a processor without AVX
        step = "import fusedrnn.functions as F, fusedrnn.layers as L; F.sum(L.LSTM(4)([[[1.0]]])).backward()"
        for arguments in ("-m", "fusedrnn", "info"), ("-c", step):
            session.run(emulator, "-cpu", "Nehalem", str(programs / "python"), *arguments, external=True)


@nox.session
def thirdparty(session: nox.Session) -> None:
    """Suites and libraries of others on our layers (docs/third_party.md)."""
    session.install(
        ".[torch]",
        "-r",
        "tests/requirements.txt",
        "expecttest",
        "onnx",
        "onnxruntime",
        "sb3-contrib",
        "neuralhydrology",
        "opacus",
        "thop",
        "fvcore",
        "onnxscript",
    )
    names = ("torch/test_torch_moduleinfo", "torch/test_onnx_cases", "torch/test_torch_libraries")
    files = [f"tests/{name}.py" for name in (*names, "docs/test_pytorch_tools")]
    session.run("pytest", *files, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark against PyTorch."""
    session.install(".[bench,torch]")
    session.run("fusedrnn", "bench", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The measured pictures and tables of README and docs, drawn again from their sources."""
    session.install(".[plot]")
    for script in ("plot_readme", "benchmarks_page", "programs_page", "irregular_page", "pollution_page"):
        session.run("python", f"bench/{script}.py")
    for script in ("first_call", "frozen", "recurrent_ppo", "scaling", "speechbrain_ligru", "zoo"):
        session.run("python", f"bench/{script}.py", "--page")
    session.run("python", "docs/pictures.py")


@nox.session
def site(session: nox.Session) -> None:
    """The documentation as a site, into build/site. A warning is an error: a link that leads nowhere, too."""
    session.install(".[docs,torch]")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "build/site", *session.posargs)


@nox.session
def linkcheck(session: nox.Session) -> None:
    """Every external link of the documentation; needs the network."""
    session.install(".[docs,torch]")
    session.run("sphinx-build", "-b", "linkcheck", "docs", "build/linkcheck", *session.posargs)
