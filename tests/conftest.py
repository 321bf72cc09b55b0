"""The environment of all tests: one thread per process, no bars, no hub, an empty result store.

The variables are set before torch is imported; what the caller set stays.
"""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_THREAD_LIMIT": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# For what runs outside a test function (imports, fixtures of a module); removed when the process ends.
_STORE = tempfile.TemporaryDirectory(prefix="textloc-results-")
os.environ["TEXTLOC_RESULTS"] = _STORE.name


#: Files whose tests take long: trainings, notebooks, the site, miniatures that draw. `make check` leaves them out, and
#: so it does single tests that are marked ``full`` themselves.
FULL = {
    "test_book.py",
    "test_command_lines.py",
    "test_edit.py",
    "test_explorer.py",
    "test_families.py",
    "test_full_size_benchmark.py",
    "test_guard_states.py",
    "test_kills.py",
    "test_layer_contents.py",
    "test_localization.py",
    "test_lora.py",
    "test_lora_looks.py",
    "test_miniatures.py",
    "test_nbval.py",
    "test_notebooks.py",
    "test_patching_miniatures.py",
    "test_planted_layers.py",
    "test_recipes.py",
    "test_reports.py",
    "test_safety.py",
    "test_safety_study.py",
    "test_site.py",
    "test_training.py",
    "test_wheel.py",
}


def pytest_ignore_collect(collection_path, config):
    """Do not even import what will not run."""
    return True if collection_path.name in FULL and config.option.markexpr == "not full" else None


def pytest_collection_modifyitems(items):
    """Mark what takes long."""
    for item in items:
        if item.path.name in FULL:
            item.add_marker(pytest.mark.full)


@pytest.fixture(autouse=True)
def own_accelerator():
    """The accelerate library keeps the first precision of a process for good; each test chooses its own."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def of_the_world(tmp_path_factory):
    """Makes tiny pipelines that pass for miniatures of the second world: they know its words and draw at its size.

    Their weights are random, so that they draw no letters.
    """
    import tiny

    from textloc_utils import prompts
    from textloc_utils.miniatures import world

    folder = tmp_path_factory.mktemp("second world")
    (folder / "training.json").write_text('{"report": {"world": "second"}}')
    words = (*tiny.WORDS, *world.vocabulary(), *prompts.words_table().word.str.lower())
    larger = {"sd3": {"pos_embed_max_size": 32}}  # of these pipelines, this one alone limits the size

    def make(name: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "WORDS", words)
            patch.setitem(tiny.BUILDERS, name, functools.partial(tiny.BUILDERS[name], **larger.get(name, {})))
            model = tiny.model(name)
        spec = replace(model.spec, source=str(folder), height=world.HEIGHT, width=world.WIDTH)
        return replace(model, spec=spec)

    return make


@pytest.fixture(autouse=True)
def empty_result_store(tmp_path, monkeypatch):
    """Each test starts from an empty store: a cached answer is no check."""
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "results"))


def started(mark: str) -> list[psutil.Process]:
    """The programs that a test began, found by what TEXTLOC_STARTED is in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TEXTLOC_STARTED") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def build_book(out: Path, *options, **environment) -> Path:
    """Build the book from the committed notebooks below ``out``; returns the folder of the site."""
    from textloc_utils.settings import ROOT

    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", out, "--all", *options]
    # As on a reader's own machine, wherever the tests run.
    kept = {k: v for k, v in os.environ.items() if k not in ("GITHUB_REPOSITORY", "TEXTLOC_SITE_URL")}
    built = subprocess.run(command, cwd=out, capture_output=True, text=True, env=kept | environment)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out / "_build" / "html"


def html_pages(site: Path) -> list[Path]:
    """All pages. What lies below ``_static`` in HTML is the theme's templates; index.html leads to book/index.html."""
    found = [p for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts]
    found.remove(site / "index.html")
    assert site / "book" / "method.html" in found
    return sorted(found)


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id) -> Path:
    """The book as committed, built anew with warnings as errors, once for all test processes."""
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    out = (shared if worker_id == "master" else shared.parent) / "book"
    with FileLock(f"{out}.lock"):
        if not (out / "done").exists():
            out.mkdir(exist_ok=True)
            build_book(out, "-W", "-n", "--keep-going")
            (out / "done").touch()
    return out / "_build" / "html"
