"""``textloc run`` on tiny notebooks: what is executed when, what is left alone, and what a failure leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from conftest import started
from textloc_utils import cli, settings
from textloc_utils.book import notebooks

PARAMETERS = 'MODELS = "sd3-mini"\nPRESET = "book"\nSEED = 42'
SAY = 'import os\nprint(MODELS, PRESET, SEED)\nprint("threads", os.environ["OMP_NUM_THREADS"])'


def write(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in (*([parameters] if parameters else []), *sources)]
    if parameters:
        cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "WORK", tmp_path / "work")


@pytest.fixture
def run(capsys):
    def go(*arguments) -> str:
        assert cli.main(["run", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return go


def test_in_place_then_up_to_date_then_again(tmp_path, run):
    path = write(tmp_path / "one.ipynb", SAY)
    assert run(path) == "1 notebooks executed, 0 up to date\n"
    assert printed(path) == "sd3-mini book 42\nthreads 1\n"
    assert [c.metadata.get("tags") for c in nbformat.read(path, 4).cells] == [["parameters"], []]  # nothing injected
    first, began = path.read_bytes(), time.perf_counter()
    assert run(path) == "all 1 are up to date\n"
    assert time.perf_counter() - began < 10
    (tmp_path / "work").rename(tmp_path / "lost")  # executed anew, to the byte
    assert "1 notebooks executed" in run(path) and path.read_bytes() == first
    # Changed outputs, and changed cells, are no longer those of the stamp.
    path.write_bytes(first.replace(b"sd3-mini book", b"sd3-mini BOOK"))
    assert "1 notebooks executed" in run(path) and path.read_bytes() == first
    path.write_bytes(first.replace(b"SEED = 42", b"SEED = 43"))
    assert "1 notebooks executed" in run(path) and "book 43" in printed(path)


def test_prose_makes_nothing_out_of_date_in_place(tmp_path, run):
    path, out = write(tmp_path / "one.ipynb", SAY), tmp_path / "out"
    run(path)
    run(path, "--seed", "7", "--out", out)
    book = nbformat.read(path, 4)
    book.cells.append(nbformat.v4.new_markdown_cell("New prose.", id="prose"))
    nbformat.write(book, path)
    assert run(path) == "all 1 are up to date\n"
    assert "1 notebooks executed" in run(path, "--seed", "7", "--out", out)
    assert nbformat.read(out / "one.ipynb", 4).cells[-1].source == "New prose."


def test_the_package_and_the_data_count_but_results_do_not(tmp_path, monkeypatch):
    for name in ("paper/table.csv", "results/table.csv", "runs/x/state.bin"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("one")
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path / "data"))
    before = notebooks._inputs()
    (tmp_path / "data/results/table.csv").write_text("two")
    (tmp_path / "data/runs/x/state.bin").write_text("two")
    assert notebooks._inputs() == before
    (tmp_path / "data/paper/table.csv").write_text("two")
    assert notebooks._inputs() != before
    before = notebooks._inputs()
    monkeypatch.setattr(notebooks, "_package", lambda: [tmp_path / "data/runs/x/state.bin"])
    assert notebooks._inputs() != before


def test_parameters_give_what_plain_papermill_gives(tmp_path, run):
    path = write(tmp_path / "one.ipynb", SAY)
    untouched = path.read_bytes()
    given = ["--models", "sd3-mini", "ldm-mini", "--preset", "smoke", "--seed", "7"]
    assert "1 notebooks executed" in run(path, *given, "--out", tmp_path / "out")
    assert printed(tmp_path / "out/one.ipynb") == "sd3-mini ldm-mini smoke 7\nthreads 1\n"
    assert path.read_bytes() == untouched
    assert run(path, *given, "--out", tmp_path / "out") == "all 1 are up to date\n"

    # The commands of book/how_to_run.md.
    plain = tmp_path / "plain.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", path, plain]
    command += ["-p", "MODELS", "sd3-mini ldm-mini", "-p", "PRESET", "smoke", "-p", "SEED", "7"]
    subprocess.run(command, check=True, capture_output=True)
    assert cli.main(["strip", str(plain)]) == 0
    assert plain.read_bytes() == (tmp_path / "out/one.ipynb").read_bytes()


def test_what_the_kernel_cut_apart_is_one_output(tmp_path, capsys):
    def stream(text, name="stdout"):
        return nbformat.v4.new_output("stream", text=text, name=name)

    whole, apart = nbformat.v4.new_code_cell("1", id="a"), nbformat.v4.new_code_cell("1", id="a")
    whole.outputs = [stream("one\ntwo\n"), stream("oh\n", "stderr"), stream("three\n")]
    apart.outputs = [stream("one"), stream("\n"), stream("two\n"), stream("oh\n", "stderr"), stream("three\n")]
    paths = tmp_path / "whole.ipynb", tmp_path / "apart.ipynb"
    for path, cell in zip(paths, (whole, apart), strict=True):
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    assert cli.main(["strip", *map(str, paths)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    outputs = nbformat.read(paths[1], as_version=4).cells[0].outputs
    assert [o.text for o in outputs] == ["one\ntwo\n", "oh\n", "three\n"]

    paths[0].write_text("no notebook")
    assert cli.main(["strip", str(paths[0])]) == 2
    assert "cannot be read as a notebook" in capsys.readouterr().err


def test_a_failure_leaves_the_old_notebook_and_finishes_the_others(tmp_path, capsys):
    good, bad = write(tmp_path / "good.ipynb", SAY), write(tmp_path / "bad.ipynb", "raise ValueError('no such layer')")
    dead = write(tmp_path / "dead.ipynb", "import os; os._exit(1)")
    before = bad.read_bytes(), dead.read_bytes()
    assert cli.main(["run", *map(str, (bad, dead, good))]) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    # Each reason is told when its notebook ends, too: an interrupted run has told what it knew.
    assert any(line.startswith("failed   bad.ipynb: ValueError: no such layer (see ") for line in lines)
    (told,) = (line for line in lines if line.startswith("failed   dead.ipynb: nbclient.exceptions.DeadKernelError"))
    assert re.search(r"; last reading of memory: host \d+\.\d of \d+\.\d GiB", told)
    assert error.startswith("textloc: 2 of 3 notebooks failed and were not changed: bad.ipynb: ")
    assert "no such layer" in error and "dead.ipynb: " in error
    assert (bad.read_bytes(), dead.read_bytes()) == before
    assert "sd3-mini book 42" in printed(good)
    # Started again it goes on with those that failed.
    write(bad, "print('well')")
    write(dead, "print('alive')")
    assert [e.source.name for e in notebooks.execute(notebooks.plan([bad, dead, good], {}))] == [
        "bad.ipynb",
        "dead.ipynb",
    ]


def test_a_folder_that_cannot_be_written_at_the_end_is_named_and_the_work_is_kept(tmp_path, capsys, monkeypatch):
    one, two = write(tmp_path / "one.ipynb", SAY), write(tmp_path / "two.ipynb", SAY)
    before, replace = one.read_bytes(), notebooks.os.replace

    def full(source, target):
        if Path(target) == one:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(notebooks.os, "replace", full)
    assert cli.main(["run", str(one), str(two)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 notebooks failed" in error and "No space left" in error and "the result is kept as" in error
    assert one.read_bytes() == before and "sd3-mini book 42" in printed(two)
    assert not list(tmp_path.glob(".*"))


def test_a_notebook_takes_the_parameters_that_it_has(tmp_path):
    path = write(tmp_path / "one.ipynb", parameters="SEED = 1")
    (planned,) = notebooks.plan([path], {"MODELS": "sd3-mini", "SEED": 2}, tmp_path / "out")
    assert planned.parameters == {"SEED": 2} and planned.out == tmp_path / "out" / "one.ipynb"


def test_all_of_the_book_is_planned():
    planned = notebooks.plan([], {})
    assert {e.source.name for e in planned} >= {"00_models_and_layers.ipynb", "01_patch_one_layer.ipynb"}
    assert all(e.source == e.out for e in planned)


def test_mistakes_are_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notebooks, "_execute", lambda *a: pytest.fail("something ran"))
    path, bare = write(tmp_path / "one.ipynb", SAY), write(tmp_path / "bare.ipynb", "1", parameters=None)
    (tmp_path / "text.ipynb").write_text(json.dumps({"no": "notebook"}))
    for arguments, said in (
        ([tmp_path / "none.ipynb"], "none.ipynb cannot be read as a notebook"),
        ([tmp_path / "text.ipynb"], "text.ipynb cannot be read as a notebook"),
        ([path, "--preset", "smoke"], "--out"),
        ([path, "--models", "sd4", "--out", tmp_path / "out"], "unknown model 'sd4'"),
        ([bare, "--seed", "1", "--out", tmp_path / "out"], "no cell with the tag parameters"),
        ([path, path], "same name"),
        ([path, "--jobs", "0"], "from 1 to 256"),
    ):
        assert cli.main(["run", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def test_killed_between_notebooks_it_goes_on(tmp_path, monkeypatch):
    """The stamp is written with the notebook: what was finished before a kill is not executed again."""
    one, two = write(tmp_path / "one.ipynb", SAY), write(tmp_path / "two.ipynb", SAY)
    original = notebooks._execute

    def killed(execution, *arguments):
        if execution.source == two:
            raise KeyboardInterrupt
        return original(execution, *arguments)

    monkeypatch.setattr(notebooks, "_execute", killed)
    with pytest.raises(KeyboardInterrupt):
        notebooks.execute(notebooks.plan([one, two], {}), jobs=1)
    monkeypatch.setattr(notebooks, "_execute", original)
    assert [e.source for e in notebooks.execute(notebooks.plan([one, two], {}))] == [two]


def test_a_cell_that_takes_too_long_is_named_so(tmp_path, capsys):
    path = write(tmp_path / "slow.ipynb", "import time\ntime.sleep(60)")
    assert cli.main(["run", str(path), "--timeout", "1"]) == 2
    assert "slow.ipynb: nbclient.exceptions.CellTimeoutError: A cell timed out" in capsys.readouterr().err


def test_what_a_notebook_makes_names_its_command(tmp_path, run):
    say = "from textloc_utils import results\nprint(results.provenance()['command'])"
    path = write(tmp_path / "one.ipynb", say)
    run(path, "--preset", "smoke", "--seed", "7", "--out", tmp_path / "out")
    assert "textloc run one.ipynb" in printed(tmp_path / "out/one.ipynb")
    assert str(tmp_path) not in printed(tmp_path / "out/one.ipynb")


# --- kills and crowds ---

#: A notebook whose processes can be found by their environment. It says when its kernel runs, and waits for a word.
SLOW = """
import os, time
open(os.environ["TEXTLOC_STARTED"], "a").write("started ")
while not os.path.exists(os.environ["TEXTLOC_STARTED"] + ".go"):
    time.sleep(0.1)
print("done")
"""


def begin(folder: Path, path: Path, *options, **environment) -> subprocess.Popen:
    """``textloc run`` in a process of its own, with its scratch files in ``folder``."""
    # A shell's background jobs, and what they start, ignore Ctrl-C: not here.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import sys, pathlib; from textloc_utils import cli; from textloc_utils.book import notebooks; "
    code += "notebooks.WORK = pathlib.Path(sys.argv[1]); sys.exit(cli.main(['run', *sys.argv[2:]]))"
    environment = {"TEXTLOC_STARTED": str(folder / "started"), "PYTHONPATH": str(settings.ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "work"), str(path), *options],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_run_takes_its_children_with_it(tmp_path, how):
    path = write(tmp_path / "slow.ipynb", SLOW)
    before = path.read_bytes()
    running = begin(tmp_path, path)
    wait_until((tmp_path / "started").exists)
    assert len(started(str(tmp_path / "started"))) >= 3  # the run, papermill, the kernel
    running.send_signal(getattr(signal, how))
    running.communicate(timeout=300)
    wait_until(lambda: not started(str(tmp_path / "started")), 10)
    assert path.read_bytes() == before
    (tmp_path / "started.go").touch()
    again = begin(tmp_path, path)
    assert "1 notebooks executed" in again.communicate()[0] and printed(path) == "done\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slow.ipynb", "started", "started.go", "work"]


def test_an_interrupted_run_starts_no_more_notebooks(tmp_path):
    paths = [write(tmp_path / f"{name}.ipynb", SLOW) for name in "abc"]
    running = begin(tmp_path, paths[0], *map(str, paths[1:]), "--jobs", "1")
    wait_until((tmp_path / "started").exists)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=300)
    wait_until(lambda: not started(str(tmp_path / "started")), 10)
    assert (tmp_path / "started").read_text() == "started "


def test_a_killed_papermill_takes_its_kernel_with_it(tmp_path):
    """As where memory ran out; the run goes on and says so."""
    running = begin(tmp_path, write(tmp_path / "slow.ipynb", SLOW))
    wait_until((tmp_path / "started").exists)
    (papermill,) = psutil.Process(running.pid).children()
    papermill.kill()
    assert (
        "slow.ipynb: papermill was ended by signal 9" in running.communicate(timeout=300)[1] and running.returncode == 2
    )
    wait_until(lambda: not started(str(tmp_path / "started")), 10)


def test_one_run_of_one_notebook_at_a_time(tmp_path):
    path, other = write(tmp_path / "slow.ipynb", SLOW), tmp_path / "other"
    first = begin(tmp_path, path)
    wait_until((tmp_path / "started").exists)
    second = begin(tmp_path, path)
    told = second.communicate(timeout=300)[1]
    assert "failed   slow.ipynb: another run of this notebook is in progress" in told and second.returncode == 2
    (tmp_path / "aside.go").touch()
    aside = begin(tmp_path, path, "--seed", "1", "--out", str(other), TEXTLOC_STARTED=str(tmp_path / "aside"))
    assert "1 notebooks executed" in aside.communicate(timeout=300)[0] and printed(other / "slow.ipynb") == "done\n"
    (tmp_path / "started.go").touch()
    assert "1 notebooks executed" in first.communicate()[0] and printed(path) == "done\n"
    assert "all 1 are up to date" in begin(tmp_path, path).communicate()[0]
    assert (tmp_path / "started").read_text() == "started "
