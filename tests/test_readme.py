"""The README's example runs as written, and its picture shows the tables that are published."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from textloc_utils import sweeps
from textloc_utils.settings import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.full
def test_the_example_runs_as_written(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    shown = []
    monkeypatch.setattr(sweeps.Sweep, "show", lambda self: shown.append(self))
    names = {}
    exec(code, names)
    assert len(shown) == 1 and shown[0] is names["table"]
    assert "all layers" in capsys.readouterr().out
    assert names["found"].layers


def test_the_picture_is_that_of_the_published_tables():
    script = runpy.run_path(str(ROOT / "scripts" / "readme_picture.py"))
    told = re.search(r"<dc:description>(.*?)</dc:description>", (ROOT / "book" / "finding.svg").read_text()).group(1)
    assert told == script["shown"](), "scripts/readme_picture.py draws it anew"
    assert "book/finding.svg" in README and "scripts/readme_picture.py" in README


@pytest.mark.full
def test_the_picture_is_drawn_by_its_command(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "readme_picture.py", tmp_path / "new.svg"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    new, committed = (tmp_path / "new.svg").read_text(), (ROOT / "book" / "finding.svg").read_text()
    assert new == committed
    assert "#ffffff" not in new  # no white ground: it lies on light pages and on dark ones
