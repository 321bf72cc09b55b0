"""The tests of the patching engine are worth something: they fail where the engine is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
#: Two that decide, on a U-Net and on joint attention.
TESTS = ["test_every_single_layer_and_all[ldm-4.0]", "test_several_pairs_in_one_batch[sd3-4.0]"]
TESTS += ["test_steps_heads_and_tensors[ldm-{'start': 1, 'stop': 2}]"]


@pytest.mark.full
def test_planted_faults_are_found():
    chosen = [f"{FOLDER / 'test_patching.py'}::{test}" for test in TESTS]
    ran = subprocess.run([sys.executable, FOLDER / "planted.py", *chosen], capture_output=True, text=True, cwd=FOLDER)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    found = {name: (status, line) for name, status, line in map(json.loads, ran.stdout.splitlines())}
    status, line = found.pop("none")
    assert status == 0 and f"{len(TESTS)} passed" in line  # the engine as it is
    assert len(found) >= 5
    assert {name: status for name, (status, _) in found.items()} == dict.fromkeys(found, 1)
    assert all("1 failed" in line for _, line in found.values()), found
