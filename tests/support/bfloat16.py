"""The mark of tests that need the kernels for bfloat16. What a processor has is not skipped by default."""

from pathlib import Path

import pytest

from fusedrnn.backends.cpu import CpuBackend

CPUINFO = Path("/proc/cpuinfo")
DETECTED = CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()
needs_bfloat16 = pytest.mark.skipif(
    not CpuBackend().has_bfloat16(),
    reason="FUSEDRNN_ISA is lower" if DETECTED else "the processor has no avx512_bf16",
)
