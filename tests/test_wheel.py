"""The wheel outside a clone: built without the network, installed alone, and run from an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from textloc_utils import models
from textloc_utils.settings import ROOT

#: A pipeline that the package did not load, in the place of the hub's; and the page's lines behind it.
PIPE = """
import os, sys
sys.path.insert(0, {tests!r})
import tiny, torch
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained = lambda *_, **__: tiny.BUILDERS["sdxl"]()
DiffusionPipeline.to = torch.nn.Module.to = lambda self, *_, **__: self
{page}
import textloc_utils
print(textloc_utils.__file__)
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What runs Python from an empty folder, with nothing of this package but the installed wheel; and that place."""
    place = tmp_path_factory.mktemp("wheel")
    source, site, empty = place / "source", place / "site", place / "empty"
    copied = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "textloc_utils", source / "textloc_utils", ignore=copied)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", place, source], check=True)
    [wheel] = place.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", site, wheel], check=True)
    empty.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TEXTLOC_", "PYTHON"))}
    environment = kept | {"PYTHONPATH": str(site), "HOME": str(place / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    return run, wheel, place


def test_it_holds_the_package_and_its_data(outside):
    names = set(zipfile.ZipFile(outside[1]).namelist())
    kinds = (".py", ".csv", ".toml", ".json")
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "textloc_utils").rglob("*") if p.suffix in kinds}
    assert wanted <= names
    assert not [name for name in names if re.match(r"data/|tests/|notebooks/|book/", name)]


def test_commands(outside):
    run, _, place = outside
    told = run("-m", "textloc_utils.cli", "--help")
    assert told.returncode == 0 and told.stdout.startswith("usage: textloc")
    told = run("-m", "textloc_utils.cli", "models", "--json")
    assert [row["name"] for row in json.loads(told.stdout)] == list(models.FULL_SIZE), told.stderr
    told = run("-m", "textloc_utils.cli", "generate", "sd3-mini", 'A sign that says "HI".', "--out", "pictures")
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert "sd3-mini comes with a clone of the project; set TEXTLOC_DATA to a clone's data folder" in told.stderr
    assert not [*(place / "empty").iterdir()]


def test_the_page_on_own_pipelines(outside):
    run, _, place = outside
    page = re.findall(r"```python\n(.*?)```", (ROOT / "book" / "your_own_pipeline.md").read_text(), re.S)[0]
    told = run("-c", PIPE.format(tests=str(ROOT / "tests"), page=page))
    assert told.returncode == 0, told.stderr
    assert "all layers" in told.stdout
    assert Path(told.stdout.splitlines()[-1]).is_relative_to(place / "site")
    # What was drawn is kept in the user's cache, and nothing beside the package.
    assert [*(place / "home" / ".cache" / "textloc" / "results" / "units" / "sweep").glob("*.jsonl")]
    assert not (place / "site" / "data").exists() and not [*(place / "empty").iterdir()]
