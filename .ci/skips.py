"""Fails where a test was skipped for a reason that is not on the list below: what CI can run, it runs.

    python .ci/skips.py FILE.xml ...        check reports
    python .ci/skips.py --tests FILE.xml    print the tests that were skipped and may run elsewhere

A report is what ``pytest --junitxml=FILE.xml`` writes.
"""

import os
import re
import sys
import xml.etree.ElementTree as ET

ALLOWED = (
    r"the processor has no \w+",
    r"needs 12 GB of free memory",
    r"nox -s thirdparty installs",
    r"needs an NVIDIA GPU",
    r"needs nvcc",
    r"needs free-threaded Python",
    r"bochs is not installed",
)
if "FUSEDRNN_DATA" not in os.environ:
    ALLOWED += (r"FUSEDRNN_DATA is (unset|not set)",)


def skips(paths: list[str]) -> list[tuple[ET.Element, ET.Element]]:
    """Each test that was skipped, and what pytest said of it."""
    cases = [case for path in paths for case in ET.parse(path).iter("testcase")]
    found = [(case, case.find("skipped")) for case in cases]
    return [(case, skip) for case, skip in found if skip is not None and skip.get("type") != "pytest.xfail"]


def file_of(case: ET.Element) -> str:
    """Of a test, which may be of a class; of a file that was skipped as a whole, its name is all there is."""
    name = case.get("classname") or case.get("name", "")
    return re.sub(r"(\.|^)(test_\w+).*", r"\1\2", name).replace(".", "/") + ".py"


def test_of(case: ET.Element) -> str:
    """Its name as pytest takes it; of a file that was skipped as a whole, the file."""
    file = file_of(case)
    if not case.get("classname"):
        return file
    classes = case.get("classname", "")[len(file) - len(".py") :].strip(".")
    return "::".join([file, *filter(None, classes.split(".")), case.get("name", "")])


def is_allowed(skip: ET.Element) -> bool:
    return any(re.search(allowed, skip.get("message", "")) for allowed in ALLOWED)


def main(paths: list[str]) -> int:
    if paths[0] == "--tests":
        print(*sorted({test_of(case) for case, skip in skips(paths[1:]) if not is_allowed(skip)}), sep="\n")
        return 0
    wrong = 0
    for case, skip in skips(paths):
        reason = skip.get("message", "")
        if not is_allowed(skip):
            wrong += 1
            print(f"skipped: {case.get('classname')}::{case.get('name')}: {reason}", file=sys.stderr)
    if wrong:
        print(f"{wrong} test(s) skipped that this machine could run", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
