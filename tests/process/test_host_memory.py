"""What a piece of work is said to need, whatever its process did before."""

from __future__ import annotations

import subprocess
import sys

import pytest

_MEBIBYTES = """
import torch
from cloq_export.process.host_memory import MemoryWatch, keep_freed_memory

def blocks(mebibytes):
    return [torch.ones(2**18) for _ in range(mebibytes)]

keep_freed_memory()
before = blocks(512)
del before
watch = MemoryWatch()
used = blocks(128)
print(watch.stop().beyond_start // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a piece of work")
def test_memory_that_earlier_work_has_freed_is_counted_when_it_is_used_again() -> None:
    found = subprocess.run([sys.executable, "-c", _MEBIBYTES], capture_output=True, text=True, check=True)
    assert 120 <= int(found.stdout) <= 160
