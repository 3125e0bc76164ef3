"""CSV files: what is wrong in one is named, with its line."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from fusedrnn import terminal
from fusedrnn.datasets import read_csv
from fusedrnn.programs import common, feeding_back, pollution

pytestmark = pytest.mark.quick

GOOD = "date,load\n2022-01-07,1.5\n2022-01-08,2\n2022-01-09,3\n"


def read(path):
    return read_csv(path, ["load"], hours=24)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD + "\n\n",
        GOOD + ",\n",
        "\ufeff" + GOOD,
        GOOD.replace(",", " , "),
        GOOD.removesuffix("\n"),
        "date,load\n07-01-2022 00:00,1.5\n08-01-2022 00:00,2\n09-01-2022 00:00,3\n",
        'date,"a, b",load\n2022-01-07,x,1.5\n2022-01-08,"y, z",2\n2022-01-09,,3\n',
    ],
    ids=["plain", "Windows", "blank lines", "empty row", "mark", "spaces", "no end", "day first", "quoted"],
)
def test_what_is_read(tmp_path, text):
    path = tmp_path / "load.csv"
    path.write_text(text, encoding="utf-8", newline="")
    np.testing.assert_array_equal(read(path), [[1.5], [2], [3]])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "01-09",
            "01-06",
            "line 4: expected the date 2022-01-09 00:00, 24 h after the row before, got .*06'",
        ),
        ("01-09", "01-08", "line 4: expected the date 2022-01-09 00:00, .* got '2022-01-08'"),
        ("01-09", "01-10", "line 4: expected the date 2022-01-09 00:00, .* got '2022-01-10'"),
        ("2022-01-08", "8 January", "line 3: expected a date such as 2024-12-31 or .* got '8 January'"),
        ("2022-01-08", "2022-02-30", "line 3: expected a date .* got '2022-02-30'"),
        (",2\n", ",2,5\n", "line 3: expected 2 values, got 3"),
        (",2\n", "\n", "line 3: expected 2 values, got 1"),
        (",2\n", ",2\n\n,\n", "line 5: expected 2 values, got none"),
        (",2\n", ",\n", "line 3, column load: expected a number, got ''$"),
        (",2\n", ',"2,5"\n', "line 3, column load: expected a number, got '2,5'$"),
        (",2\n", ",nan\n", "line 3, column load: expected a finite number in float32, got 'nan'$"),
        (",2\n", ",inf\n", "line 3, column load: expected a finite number in float32, got 'inf'$"),
        (",2\n", ",1e39\n", "line 3, column load: expected a finite number in float32, got '1e39'$"),
        (",", ";", "expected each of the columns date, load once, separated by commas, got 'date;load'"),
        ("load", "Load", "expected each of the columns date, load once, .* got 'date,Load'"),
        ("date,load", "date,load,load", "expected each of the columns .* got 'date,load,load'"),
        (GOOD[10:], "", "expected rows with values, got none"),
        (GOOD, "", "expected each of the columns .* got ''"),
    ],
)
def test_what_is_refused(tmp_path, old, new, message):
    path = tmp_path / "load.csv"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=rf"^{path}(, |: ){message}"):
        read(path)


def test_dates_are_read_where_hours_are_given(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("hour,load\n0,1.5\n7,2\n5,-1e38\n")
    np.testing.assert_array_equal(read_csv(path, ["load", "hour"]), [[1.5, 0], [2, 7], [-1e38, 5]])
    path.write_text("date,load\n2022-01-07T23:30,1\n2022-01-08T00:00,2\n")
    assert read_csv(path, ["load"], hours=0.5).shape == (2, 1)
    with pytest.raises(ValueError, match=r"line 3: expected the date 2022-01-08 00:30, 1 h after"):
        read_csv(path, ["load"], hours=1)
    for hours in (0, float("nan"), 1e6):
        with pytest.raises(ValueError, match=r"^hours: expected a number above 0"):
            read_csv(path, ["load"], hours=hours)
    with pytest.raises(TypeError, match="columns: expected a list of names, got 'load'"):
        read_csv(path, "load")


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "load.csv"
    for text in ((GOOD + "é").encode("latin-1"), GOOD.encode("utf-16")):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"load\.csv: expected a CSV file in UTF-8"):
            read(path)


def test_a_constant_column_is_refused(tmp_path):
    path = tmp_path / "daily.csv"
    days = np.datetime64("2022-01-07") + np.arange(359)
    path.write_text("date,reported\n" + "".join(f"{day},0.1\n" for day in days))
    with pytest.raises(ValueError, match=r"daily\.csv: expected numbers that differ in reported, got"):
        feeding_back.read(str(path))
    rising = np.zeros((900, 7), np.float32)
    rising[:, 0] = np.arange(900)
    with pytest.raises(ValueError, match="pollution: expected changes from hour to hour that differ"):
        pollution.prepare(rising, "ahead")
    found = common.scores(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    assert np.isnan(found.pop("R2"))
    assert found == {"MSE": 0.5, "RMSE": 0.5**0.5, "MAE": 0.5}


def test_how_many_rows_there_must_be():
    for rows, wanted in ((182, "expected at least 183 rows, got 182"), (183, None)):
        draw = np.random.default_rng(0).random((rows, 3))
        with pytest.raises(ValueError, match=wanted) if wanted else contextlib.nullcontext():
            pollution.prepare(draw, "ahead")


def test_a_score_that_is_no_number_beats_nothing(capsys):
    report = terminal.Report()
    common.compare(report, {"ours": {"MSE": math.nan}, "other": {"MSE": 1.0}}, "MSE")
    assert "ours does not beat: other" in capsys.readouterr().out


def test_a_wrong_file_of_ucis_is_one_line(tmp_path):
    """And leaves the file that was there before."""
    source, target = tmp_path / "uci.csv", tmp_path / "ours.csv"
    header = "No,year,month,day,hour,pm2.5,DEWP,TEMP,PRES,cbwd,Iws,Is,Ir"
    rows = [f"{k},2010,1,{1 + k // 24},{k % 24},1,-21,-11,1021,NW,1.79,0,0" for k in range(30)]
    source.write_text("\n".join([header, *rows, "30,2010,1,2,noon,1,-21,-11,1021,NW,1.79,0,0"]))
    target.write_text("kept")
    command = [sys.executable, "-m", "fusedrnn.programs.uci_pollution", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{source}: expected numbers for day, month, year and hour in {{'No': '30'")
    assert done.stderr.count("\n") == 1
    assert target.read_text() == "kept"
