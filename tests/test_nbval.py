"""nbval on a small notebook: what a chapter records may differ by the stated tolerance, and no more."""

import re
import shutil
import subprocess
import sys

import nbformat

from textloc_utils.settings import ROOT

RECORDED = "application/papermill.record/text/plain"
#: What a cell records now, what it recorded once, and whether that is near enough.
CASES = [
    (["0.95"], ["0.95"], True),
    (["0.95"], ["0.965"], True),
    (["0.95"], ["0.975"], False),
    (["28.0"], ["28.5"], True),
    (["28.0"], ["29.0"], False),
    (["1e-05"], ["0.0"], True),
    (["5"], ["5"], True),
    (["100"], ["101"], False),
    (["'6 7 8'"], ["'6 7 8'"], True),
    (["'6 7 8'"], ["'6 7'"], False),
    (["0.5", "0.9"], ["0.51", "0.89"], True),
    (["0.5", "0.9"], ["0.9", "0.5"], False),
    (["0.5"], ["0.5", "0.5"], False),
]


def test_recorded_numbers_are_compared_within_the_tolerance(tmp_path):
    cells = []
    for now, once, _ in CASES:
        source = "from textloc_utils import results\n" + "\n".join(f"_ = results.record('x', {value})" for value in now)
        outputs = [nbformat.v4.new_output("display_data", {RECORDED: value}) for value in once]
        metadata = {"tags": ["nbval-check-output"]}
        cells.append(nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata, execution_count=1))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "small.ipynb")
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-v", "--rootdir", tmp_path, "--nbval-lax", tmp_path]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    verdicts = re.findall(r"::Cell (\d+) (PASSED|FAILED)", told)
    assert verdicts == [(str(i), "PASSED" if near else "FAILED") for i, (*_, near) in enumerate(CASES)], told[-3000:]
