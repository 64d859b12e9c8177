"""The catalogue answers at once."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("classact"))


@pytest.mark.parametrize("words", [["--help"], ["papers", "rare classes in pathology"], ["papers", "acmil"]])
def test_under_400_ms(words, capsys):
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([COMMAND, *words], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    with capsys.disabled():
        print(f"\n  classact {' '.join(words)}: {statistics.median(times):.2f} s")
    assert statistics.median(times) < 0.4
