"""Make the file of ``fusedrnn train pollution`` from the one that UCI publishes.

    python -m fusedrnn.programs.uci_pollution PRSA_data_2010.1.1-2014.12.31.csv beijing_pollution.csv

The first is in the download of https://archive.ics.uci.edu/dataset/381/beijing+pm2+5+data (Song Chen, CC BY
4.0). In the arrangement known as "LSTM-Multivariate pollution" the first day, which has no measurement, is
left out, and a missing measurement, NA, is 0.
"""

from __future__ import annotations

import csv
import sys

COLUMNS = {  # ours, and UCI's
    "pollution": "pm2.5",
    "dew": "DEWP",
    "temp": "TEMP",
    "press": "PRES",
    "wnd_dir": "cbwd",
    "wnd_spd": "Iws",
    "snow": "Is",
    "rain": "Ir",
}
DATE, FIRST_DAY = ("day", "month", "year", "hour"), 24  # hours


def convert(source: str, target: str) -> int:
    """Returns how many rows were written.

    Raises:
        ValueError: A column is missing, a date is not one, or there is nothing after the first day.
    """
    with open(source, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        missing = [name for name in (*DATE, *COLUMNS.values()) if name not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"{source}: expected UCI's columns, got none named {', '.join(missing)}")
        rows = list(lines)[FIRST_DAY:]
    if not rows:
        raise ValueError(f"{source}: expected more than the {FIRST_DAY} hours of the first day")
    found = []
    for row in rows:
        try:
            day, month, year, hour = (int(row[name]) for name in DATE)
        except (TypeError, ValueError):
            raise ValueError(f"{source}: expected numbers for day, month, year and hour in {row}") from None
        values = ["0" if row[name] in ("NA", "") else row[name] for name in COLUMNS.values()]
        found.append([f"{day:02}-{month:02}-{year} {hour:02}:00", *values])
    with open(target, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["date", *COLUMNS])
        out.writerows(found)
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{convert(*sys.argv[1:])} rows")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
