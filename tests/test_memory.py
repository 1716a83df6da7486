"""Memory of a whole run is flat in pairs: slow, since it makes two runs in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
from freqkd_analysis import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(pairs: int, out: Path) -> int:
    scenes = "synthetic:pairs=500,groups=50,size=96x80"
    words = ["layers", "--pairs", str(pairs), "--control-pairs", "20", "--data", scenes,
             "--model", "vit_tiny_patch16_224", "--weights", "random", "--size", "64", "--out", str(out)]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_peak_memory_is_within_five_percent_from_50_to_500_pairs(tmp_path):
    few, many = (peak(pairs, tmp_path / str(pairs)) for pairs in (50, 500))
    assert many < 1.05 * few, f"{few} KiB with 50 pairs, {many} KiB with 500"
