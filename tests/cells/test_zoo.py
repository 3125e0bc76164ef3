"""Published cells compute what their papers say (papers.py), their gradients are right, the page lists them.

``python tests/cells/test_zoo.py`` writes the tables of docs/zoo.md anew.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import papers
import sequences
from fusedrnn.cells import Cell, zoo
from fusedrnn.cells.zoo import dynamics, gated, light, lstms
from published import PUBLISHED

pytestmark = pytest.mark.quick

# Options that change what is computed, beside the defaults.
CASES = [
    *zoo.ALL,
    zoo.fs_lstm.with_options(fast=3),
    zoo.ltc.with_options(steps=1),
    zoo.ran.with_options(linear=True),
    zoo.rhn.with_options(depth=1),
    zoo.rhn.with_options(depth=3),
]


@pytest.mark.parametrize("cell", CASES, ids=repr)
def test_a_sequence_is_that_of_the_paper(cell):
    """Every state after every step."""
    arguments, *_ = sequences.draw(cell, np.float64)
    paper = getattr(papers, cell.name)
    blocks = papers.Blocks(arguments["weights"], sequences.H)
    states = tuple(arguments["states"].values())
    for k, step in enumerate(sequences.forward(cell, **arguments)):
        scalars = {name: value[k] for name, value in arguments["scalars"].items()}
        states = paper(blocks, arguments["x"]["x"][k], *states, **cell.options, **scalars)
        for found, expected in zip(step.after, states, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


# test_derived.py has the others, in long double too.
@pytest.mark.parametrize("cell", [c for c in CASES if c not in PUBLISHED], ids=repr)
def test_gradients_are_those_by_a_complex_step(cell):
    assert sequences.worst_error(cell, np.float64) < 1e-14


# --- the page -----------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
TABLES = re.compile(r"(?<=<!-- cells: begin -->\n).*?(?=<!-- cells: end -->)", re.DOTALL)


def cells_of(module):
    return [value for value in vars(module).values() if isinstance(value, Cell)]


def row(cell):
    """Name with options and row scalars; paper and notes; states; blocks of each parameter."""
    arguments = [*cell.scalars, *(f"{name}={value}" for name, value in cell.options.items())]
    name = cell.name + (f"({', '.join(arguments)})" if arguments else "")
    said = (" ".join(part.split()) for part in inspect.getdoc(cell).split("\n\n"))
    states = ", ".join(s + (f"={start:g}" if start else "") for s, start in cell.trace.start.items())
    blocks = ", ".join(
        p if count == 1 and "_" not in p else f"{p} {count}" for p, count in cell.blocks.items()
    )
    return f"| `{name}` | {'<br>'.join(said)} | {states} | {blocks} |\n"


def tables():
    found = ""
    for module in (lstms, gated, light, dynamics):
        found += f"\n## {inspect.getdoc(module).rstrip('.')}\n\n"
        found += "| cell | paper | states | parameters |\n|---|---|---|---|\n"
        found += "".join(map(row, cells_of(module)))
    return found + "\n"


def test_the_page_lists_the_cells():
    """If this fails: python tests/cells/test_zoo.py"""
    assert TABLES.search(PAGE.read_text())[0] == tables()


def test_the_page_runs():
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["y"].shape == (50, 8, 32)


def test_every_cell_is_in_the_zoo():
    """And its docstring begins with a paper: authors, year, title, where it appeared."""
    found = [cell for module in (lstms, gated, light, dynamics) for cell in cells_of(module)]
    assert {cell.name for cell in found} == {cell.name for cell in zoo.ALL} == {*zoo.__all__} - {"ALL"}
    for cell in found:
        paper = " ".join(inspect.getdoc(cell).split("\n\n")[0].split())
        assert re.fullmatch(r'[^"]+ (19|20)\d\d, "[^"]+", [^"]+\.', paper), paper


if __name__ == "__main__":
    PAGE.write_text(TABLES.sub(lambda _: tables(), PAGE.read_text()))
