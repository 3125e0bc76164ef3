"""nox -s lint | tests | thirdparty | bench | docs | site | linkcheck: each in an environment of its own."""

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session
def lint(session: nox.Session) -> None:
    """The linters of .ci/run."""
    session.install("ruff", "mypy", "clang-format", "codespell", "numpy")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    sources = session.run("git", "ls-files", "*.h", "*.cpp", "*.cu", external=True, silent=True, log=False)
    session.run("clang-format", "--dry-run", "-Werror", *sources.split())
    files = session.run("git", "ls-files", external=True, silent=True, log=False)
    session.run("codespell", *files.splitlines())


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, as far as the extras at hand go."""
    session.install(".[cli,plot,numba]", "-r", "tests/requirements.txt")
    session.run("pytest", *session.posargs)


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
    session.run("python", "bench/plot_readme.py")
    session.run("python", "bench/benchmarks_page.py")
    session.run("python", "bench/programs_page.py")
    for script in ("frozen", "recurrent_ppo", "scaling", "speechbrain_ligru", "zoo"):
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
