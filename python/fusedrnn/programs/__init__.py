"""The programs of ``fusedrnn train NAME``.

Each module has ``add_arguments(parser)`` and ``run(args, report)``; ``report`` is a ``terminal.Report``.
"""

from __future__ import annotations

from types import ModuleType

from fusedrnn.programs import (
    airline,
    classify,
    continual,
    feeding_back,
    passenger_flow,
    pollution,
    runoff,
    sine,
    waves,
)

PROGRAMS: dict[str, ModuleType] = {
    "runoff": runoff,
    "airline": airline,
    "sine": sine,
    "pollution": pollution,
    "passenger-flow": passenger_flow,
    "feeding-back": feeding_back,
    "waves": waves,
    "classify": classify,
    "continual": continual,
}
