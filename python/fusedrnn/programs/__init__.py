"""The programs of ``fusedrnn train NAME``.

Each module has ``add_arguments(parser)`` and ``run(args, report)``; what ``report`` is: ``programs.common``.
"""

from __future__ import annotations

from types import ModuleType

from fusedrnn.programs import airline, pollution, sine

__all__ = ["PROGRAMS", "airline", "pollution", "sine"]

PROGRAMS: dict[str, ModuleType] = {"airline": airline, "sine": sine, "pollution": pollution}
