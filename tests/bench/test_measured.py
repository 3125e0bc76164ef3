"""bench/measured.py: the folders of bench/results, and tables of several families of processors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import measured

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        (("AuthenticAMD", "25", "17"), "AMD Zen 4"),
        (("AuthenticAMD", "25", "33"), "AMD Zen 3"),
        (("AuthenticAMD", "26", "2"), "AMD Zen 5"),
        (("GenuineIntel", "6", "143"), "Intel Sapphire Rapids"),
        (("GenuineIntel", "6", "85"), "GenuineIntel-6-85"),
        (("AuthenticAMD", "6", "143"), "AuthenticAMD-6-143"),
    ],
)
def test_a_processor_has_a_family(processor, name, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    machine = dict(zip(("vendor_id", "cpu family", "model"), processor, strict=True))
    assert measured.family(machine) == name
    folder = measured.folder(machine)
    assert folder.is_dir()
    assert folder.name == name.lower().replace("zen ", "zen").replace(" ", "-")


def test_a_machine_that_does_not_say_its_processor_has_its_architecture():
    assert measured.family({"architecture": "aarch64", "cores": 2}) == "aarch64"


def test_results_lie_in_the_folder_of_their_machine():
    files = list(measured.RESULTS.glob("*/*.json"))
    assert files
    for path in files:
        machine = json.loads(path.read_text())["environment"]["machine"]
        assert path.parent == measured.folder(machine), path


def test_families_side_by_side():
    header = ["case", "ms", "ratio"]
    rows = {"A": [["x", "1", "2"], ["y", "3", "4"]], "B": [["z", "5", "6"], ["x", "7", "8"]]}
    assert measured.side_by_side(header, rows).splitlines() == [
        "| case | A: ms | A: ratio | B: ms | B: ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| x | 1 | 2 | 7 | 8 |",
        "| y | 3 | 4 | – | – |",
        "| z | – | – | 5 | 6 |",
    ]
    assert measured.side_by_side(header, {"A": rows["A"]}).startswith("| case | ms | ratio |")
