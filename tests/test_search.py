"""A part of the random search of ``search_cases.py``: nothing wrong among calls on values that hurt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_search_finds_nothing(seed):
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("search_cases.py"), "500", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 calls, 0 wrong" in done.stdout
