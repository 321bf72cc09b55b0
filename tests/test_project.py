"""The project's files agree with each other, and training never meets what is held out."""

import ast
import json
import os
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from PIL import ImageFont

import textloc_utils
from textloc_utils import cli, prompts
from textloc_utils.miniatures import world
from textloc_utils.settings import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
EXTRAS = PROJECT["optional-dependencies"]


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    return [Requirement(r) for group in (PROJECT["dependencies"], *EXTRAS.values()) for r in group]


def pins() -> dict[str, str]:
    """Canonical package name to pinned version, from constraints.txt."""
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(r.specifier) == 1 and next(iter(r.specifier)).operator == "==" for r in found)
    names = [canonicalize_name(r.name) for r in found]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {name: next(iter(r.specifier)).version for name, r in zip(names, found, strict=True)}


# --- one set of packages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_pin_lies_in_the_range(requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier, f"{requirement.name} has no range"
    assert requirement.specifier.contains(pinned), f"{pinned} is outside {requirement.specifier}"


def test_no_pin_names_one_machine():
    assert [f"{n}=={v}" for n, v in pins().items() if "+" in v] == []


def test_this_environment_is_the_lock():
    """What is installed here has the pinned version (a local label such as +cpu aside)."""
    from importlib.metadata import version

    installed = {r.name: version(r.name).partition("+")[0] for r in requirements()}
    assert installed == {r.name: pins()[canonicalize_name(r.name)] for r in requirements()}


def test_conda_installs_the_same_set():
    conda = [d for d in ENVIRONMENT["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in ENVIRONMENT["dependencies"] if isinstance(d, dict))
    # All other packages come through pyproject.toml, with the lock of `make setup`: nothing to drift apart.
    options = [line for line in pip if not line.startswith("--extra-index-url")]
    assert options == ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]
    assert '-c constraints.txt -e ".[book,ocr,test]"' in (ROOT / "Makefile").read_text()
    by_name = {Requirement(d).name: Requirement(d).specifier for d in conda}
    assert set(by_name) == {"python", "pip", "tesseract"}
    assert not by_name["tesseract"].contains("4.1") and by_name["tesseract"].contains("5.3")
    assert by_name["python"] == SpecifierSet(PROJECT["requires-python"])


def test_makefile_takes_the_same_pythons():
    low, high = re.search(r"not (\(.+?\)) <= sys.version_info < (\(.+?\))", (ROOT / "Makefile").read_text()).groups()
    as_range = ">={}.{},<{}.{}".format(*ast.literal_eval(low), *ast.literal_eval(high))
    assert SpecifierSet(as_range) == SpecifierSet(PROJECT["requires-python"])


# --- the project's face -------------------------------------------------------------------------------------------


def test_readme_names_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme and "make test" in readme


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
    assert re.search(r"^export TEXTLOC_BROWSER=required$", script.read_text(), re.MULTILINE)


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_are_valid_and_ask_for_little():
    """Against GitHub's schema; then zizmor: permissions, injected input, kept credentials, versions of actions."""
    scripts = Path(sys.executable).parent
    schema = [scripts / "check-jsonschema", "--builtin-schema", "vendor.github-workflows"]
    audit = [scripts / "zizmor", "--offline", "--no-progress", "--config", ROOT / ".github" / "zizmor.yml"]
    for command in (schema, audit):
        run = subprocess.run([*command, *WORKFLOWS], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    read_only = {"contents": "read"}
    assert all(yaml.safe_load(path.read_text())["permissions"] == read_only for path in WORKFLOWS)


def gpu_step(name: str) -> str:
    steps = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())["jobs"]["execute"]["steps"]
    return next(step["run"] for step in steps if step.get("name") == name)


def run_step(script: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    command = ["bash", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_the_gpu_run_wants_room_on_the_disks(tmp_path):
    at = {"GITHUB_WORKSPACE": str(tmp_path), "RUNNER_TEMP": str(tmp_path), "HF_HOME": str(tmp_path)}
    enough = run_step(gpu_step("Room on the disks"), tmp_path, LEAST_DISK_GB="0", **at)
    assert enough.returncode == 0 and enough.stdout.count("GiB free") == 3
    little = run_step(gpu_step("Room on the disks"), tmp_path, LEAST_DISK_GB="999999", **at)
    assert little.returncode == 1 and re.search(r"::error::only \d+ GiB are free at", little.stdout)


def test_the_gpu_run_stops_where_its_estimate_is_too_long(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    said = "all: about 21.4 h, one notebook after the other; free disk 80 GiB"
    (tmp_path / ".venv/bin/textloc").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / ".venv/bin/textloc").chmod(0o755)
    given = {"MODELS": "sd3", "NOTEBOOKS": "a.ipynb", "PRESET": "paper", "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md")}
    assert run_step(gpu_step("Estimate"), tmp_path, MOST_HOURS="22", **given).returncode == 0
    assert said in (tmp_path / "s.md").read_text()
    stopped = run_step(gpu_step("Estimate"), tmp_path, MOST_HOURS="20", **given)
    assert stopped.returncode == 1 and "::error::about 21 hours are needed" in stopped.stdout


def test_workflows_call_what_there_is():
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.findall(r"make ([a-z]+)\b(?!-)", text))
    assert len(called) >= 3 and called <= targets
    files = re.findall(r"[\w./]+\.(?:py|ipynb)\b", text)
    assert files and [name for name in files if not (ROOT / name).is_file()] == []
    for words in re.findall(r"textloc run (.*?)(?:\n\s*- |\Z)", text, re.DOTALL):
        options = re.findall(r"--[a-z]+", words)
        help_text = cli.parser()._subparsers._group_actions[0].choices["run"].format_help()
        assert options and [o for o in options if o not in help_text] == []


CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
#: Of .zenodo.json, after https://developers.zenodo.org: what a record of software needs, and what it may have.
ZENODO = {
    "type": "object",
    "required": ["title", "upload_type", "description", "creators", "access_right", "license"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "upload_type": {"const": "software"},
        "description": {"type": "string", "minLength": 1},
        "creators": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {name: {"type": "string"} for name in ("name", "affiliation", "orcid")},
            },
        },
        "access_right": {"const": "open"},
        "license": {"type": "string"},
        "language": {"type": "string", "pattern": "^[a-z]{3}$"},
        "keywords": {"type": "array", "items": {"type": "string"}},
        "related_identifiers": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["identifier", "relation"],
                "additionalProperties": False,
                "properties": {
                    "identifier": {"type": "string"},
                    "relation": {"enum": ["cites", "references", "reviews", "isDerivedFrom", "isSupplementTo"]},
                    "resource_type": {"type": "string"},
                },
            },
        },
        "notes": {"type": "string"},
    },
}


def test_the_version_and_its_date_are_the_changelogs():
    """The package's version is the newest that the changelog tells of, and the citation names it with its date."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    unreleased, *released = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert unreleased == ("Unreleased", "") and all(date for _, date in released)
    assert released[0] == (textloc_utils.__version__, CITATION["date-released"])
    assert CITATION["version"] == textloc_utils.__version__
    assert [date for _, date in released] == sorted((date for _, date in released), reverse=True)


def test_metadata_fit_their_schemas(tmp_path):
    check = [Path(sys.executable).with_name("check-jsonschema")]
    (tmp_path / "zenodo.json").write_text(json.dumps(ZENODO))
    for schema, file in (
        (["--builtin-schema", "vendor.citation-file-format"], ROOT / "CITATION.cff"),
        (["--schemafile", tmp_path / "zenodo.json"], ROOT / ".zenodo.json"),
    ):
        run = subprocess.run([*check, *schema, file], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        # The schema is one: without its title the same file is refused.
        planted = tmp_path / f"x{file.suffix}"
        planted.write_text(re.sub(r'^ *"?title"?:.*$', "", file.read_text(), flags=re.MULTILINE))
        assert subprocess.run([*check, *schema, planted], capture_output=True).returncode == 1
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    assert (zenodo["title"], zenodo["license"]) == (CITATION["title"], CITATION["license"])
    assert zenodo["keywords"] == CITATION["keywords"]
    assert zenodo["creators"] == CITATION["authors"] == PROJECT["authors"]
    # The wheel holds the word lists, which are under another licence than the code.
    assert CITATION["license"] == "MIT" and PROJECT["license"] == "MIT AND CC-BY-SA-4.0"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_container_does_what_the_readme_says():
    """It cannot be built here; its instructions are read, and its commands are those of the README."""
    text = (ROOT / "Containerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "EXPOSE", "CMD"}
    assert lines[0].startswith("FROM ") and {line.split()[0] for line in lines} == known
    commands = set(re.findall(r"make ([a-z]+)\b(?!-)", text))
    assert commands == {"setup", "site", "test"} and commands <= set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    readme = (ROOT / "README.md").read_text()
    build = "docker build -f Containerfile -t textloc ."
    assert build in text and build in readme
    # What `make setup` and `make test` would install with the package manager is there beforehand.
    tools = (ROOT / "scripts" / "ensure_tool.sh").read_text()
    for packages in re.findall(r"packages=\((.+?)\)", tools):
        assert set(packages.split()) <= set(text.split())
    version = re.search(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE).group(1)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    server = re.search(r"-m http\.server --directory \S+", readme).group()
    assert server in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" not in ignored and {".venv", "_build"} <= set(ignored)  # new tables name the commit


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]


def test_every_page_of_the_contents_exists():
    missing = [f for f in toc_files() if not any((ROOT / (f + end)).is_file() for end in (".md", ".ipynb"))]
    assert missing == []


def test_every_notebook_is_in_the_contents():
    notebooks = {f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(toc_files())


def test_no_file_is_heavy():
    """Counts what git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    files = [ROOT / name for name in listing.split("\0") if name]
    assert ROOT / "pyproject.toml" in files
    assert [f.name for f in files if f.is_file() and f.stat().st_size > 16 * 2**20] == []


@pytest.mark.parametrize(("tool", "package"), [("tesseract", "tesseract-ocr"), ("chromium", "chromium")])
def test_tools_are_ensured_or_named(tool, package, tmp_path):
    """Without the tool and a package manager the script says in one line what to install."""
    script = ROOT / "scripts" / "ensure_tool.sh"
    for needed in ("sed", "grep", "id"):
        (tmp_path / needed).symlink_to(_which(needed))
    bash = _which("bash")
    run = subprocess.run([bash, script, tool], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert package in line
    if tool == "tesseract" or os.environ.get("TEXTLOC_BROWSER") == "required":  # else a machine may be without
        here = subprocess.run([bash, script, tool], capture_output=True, text=True)
        assert (here.returncode, here.stdout, here.stderr) == (0, "", "")


def _which(tool: str) -> str:
    import shutil

    found = shutil.which(tool)
    assert found, f"{tool} is not on the PATH"
    return found


# --- what training never sees -------------------------------------------------------------------------------------


def test_splits_are_disjoint():
    splits = [prompts.words(split) for split in prompts.SPLITS]
    words = [word for split in splits for word in split]
    assert len(words) == len(set(words)) and all(re.fullmatch("[A-Z]{3,6}", word) for word in words)
    assert min(map(len, splits)) >= 200 and len(splits[0]) > len(splits[1]) + len(splits[2])


@pytest.mark.parametrize("only", [*world.WORLDS.values(), world.EVERYWHERE], ids=lambda only: only.name)
def test_training_scenes_hold_neither_validation_nor_test_words(only):
    kept = {*prompts.words("validation"), *prompts.words("held-out")}
    rng = random.Random(0)
    drawn = [world.random_scene(rng, only) for _ in range(20_000)]
    runs = [world.random_scene(rng, only, runs=True) for _ in range(20_000)]
    texts = [scene.text for scene in drawn]
    assert kept.isdisjoint(texts) and kept.isdisjoint(scene.text for scene in runs)
    # Both kinds of text occur, in every length, so that the line above had something to find.
    train = set(prompts.words("train"))
    words = sum(text in train for text in texts)
    assert 0.45 < words / len(texts) < 0.55
    assert {len(text) for text in texts} == {len(scene.text) for scene in runs} == {3, 4, 5, 6}
    assert all(prompts.quoted_text(world.caption(scene, rng, only)) == scene.text for scene in drawn[:500])


class PlantedRandom(random.Random):
    """Draws the letters of the planted texts first, one text a call."""

    def plant(self, *texts: str) -> "PlantedRandom":
        self.planted = list(texts)
        return self

    def choices(self, population, *args, k=1, **kwargs):
        return list(self.planted.pop(0))


@pytest.mark.parametrize(("split", "at"), [("held-out", 0), ("held-out", -1), ("validation", 0)])
def test_random_strings_are_drawn_again_when_held_out(split, at):
    word = prompts.words(split)[at]
    rng = PlantedRandom(0).plant(word, word, "QXZJQ"[: len(word)])
    assert prompts.random_string(rng, len(word)) == "QXZJQ"[: len(word)]
    assert rng.planted == []


@pytest.mark.parametrize("only", [world.SECOND, world.PLAIN], ids=lambda only: only.name)
def test_training_draws_the_typefaces_of_its_world(only, monkeypatch):
    opened = []
    original = ImageFont.truetype

    def record(path, *args, **kwargs):
        opened.append(Path(path).name)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(ImageFont, "truetype", record)
    world.atlas.cache_clear()
    rng = random.Random(1)
    pictures = [world.render(world.random_scene(rng, only)) for _ in range(50)]
    assert pictures[0].shape == (world.HEIGHT, world.WIDTH, 3)
    assert set(opened) == {world.TYPEFACES[name] for name in only.typefaces}


def test_one_place_names_the_typefaces():
    """Nothing below ``miniatures`` draws letters that the world does not have."""
    for path in (ROOT / "textloc_utils" / "miniatures").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith((".ttf", ".otf")):
                assert path.name == "world.py" and node.value in world.TYPEFACES.values(), path.name
