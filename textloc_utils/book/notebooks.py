"""Execute the book's notebooks with papermill: in parallel, resumable, and only those whose outputs may have changed.

A notebook is executed to a scratch file. Then everything that differs from run to run is removed. The result replaces
the old file only if the execution was complete. A stamp, which is next to the scratch files, holds a digest of all
inputs of the outputs: the notebook's own code and parameters, the package, the data, and the versions of the required
packages. Published results and the store of results do not count. Otherwise a notebook that computes them would never
be up to date. If only the text cells change, a notebook that is executed in place stays up to date. A copy also holds
the text cells, so it is made again.

A notebook can have only one run at a time. Further runs are refused. Each papermill process ends, with its kernel, when
the process that started it ends for any reason.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from tqdm import tqdm

from textloc_utils import files, ocr, results
from textloc_utils.book import memory
from textloc_utils.settings import ROOT, TextlocError, check_writable, data_dir, first_line

#: Scratch files, logs and stamps.
WORK = ROOT / "_build" / "executed"
#: The log of memory, in the folder of the scratch files.
MEMORY = "memory.csv"
#: The metadata that nbstripout removes, so that two runs give the same bytes.
STRIPPED = "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"
#: The errors that nbformat raises for files that are not notebooks, including JSON with another structure.
_NO_NOTEBOOK = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    *(nbformat.reader.NotJSONError, nbformat.ValidationError),
)
#: Largest default number of processes. More would need more memory than a laptop has.
MOST = 4


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One notebook to execute: ``source`` is read, and ``out`` is written. ``parameters`` replace the notebook's own.

    ``environment`` holds further environment variables for its kernel.
    """

    source: Path
    out: Path
    parameters: dict
    environment: dict = field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        """Whether the notebook itself is overwritten."""
        return self.out.resolve() == self.source

    def made(self) -> dict:
        """The time and place of the last execution: seconds, device, commit, created."""
        return json.loads(self.stamp.read_text())["made"]

    @property
    def stamp(self) -> Path:
        """The stamp file of this source and out. Other parameters change its content, but not its name."""
        return WORK / f"{self.source.stem}-{_short_hash((str(self.source), str(self.out)))}.json"

    @property
    def lock(self) -> Path:
        """The lock file that is held by the run that writes ``out``."""
        return WORK / f"{self.out.stem}-{_short_hash(str(self.out))}.lock"

    @property
    def command(self) -> str:
        """The command line that executes this notebook."""
        options = [part for name, value in self.parameters.items() for part in (f"--{name.lower()}", str(value))]
        return shlex.join(["textloc", "run", self.source.name, *options])


def _short_hash(what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


class _Papermills:
    """The processes that execute notebooks. Each one watches a pipe of this process, and ends when it is closed."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []
        self._ended = False

    def run(self, arguments: Sequence, **options) -> int:
        """Run papermill to its end and return its exit status."""
        command = [sys.executable, "-m", "textloc_utils.ends_with_parent", "papermill", *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, **options) as process:
            self._started.append(process)
            if self._ended:
                self.end()
            return process.wait()

    def end(self) -> None:
        """End all running processes, and all that are started later."""
        self._ended = True
        for process in self._started:
            assert process.stdin is not None
            process.stdin.close()


def plan(notebooks: Sequence[str | Path], parameters: Mapping, out: str | Path | None = None) -> list[Execution]:
    """Plan the executions of the given notebooks, or of all notebooks of the book.

    Each notebook takes the parameters that it has. Without parameters and ``out``, a notebook is executed in place.
    Otherwise the result is written to the folder ``out``. Raises TextlocError for a file that is not a notebook, and
    for a notebook without a cell of parameters if parameters are given.
    """
    paths = [Path(n) for n in notebooks] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if parameters and out is None:
        raise TextlocError("other parameters give other outputs: give a folder for them with --out")
    planned = []
    for path in paths:
        cells = read(path).cells
        tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
        if parameters and not tagged:
            raise TextlocError(f"{path} has no cell with the tag parameters, so no parameter can be set")
        known = {k: v for k, v in parameters.items() if any(_assigns(source, k) for source in tagged)}
        target = path if out is None else Path(out) / path.name
        planned.append(Execution(source=path.resolve(), out=target.absolute(), parameters=known))
    if len({e.out for e in planned}) < len(planned):
        raise TextlocError("two of the notebooks have the same name and would overwrite each other's outputs")
    return planned


def execute(
    planned: Sequence[Execution], *, jobs: int | None = None, timeout: int = 1800, progress: bool = False
) -> list[Execution]:
    """Execute all notebooks that are out of date, ``jobs`` in parallel (default: one per core, at most MOST).

    Returns the executions that were done. ``timeout`` is the limit for one cell, in seconds. Each process computes with
    one thread. Two processes with one thread per core each would be many times slower, and their sums could depend on
    other processes. A failure is reported immediately with its reason, and the old file is not changed. The other
    notebooks are still executed. At the end a TextlocError names all failures. If this process is interrupted, it ends
    all running executions.
    """
    if jobs is not None and jobs < 1:
        raise TextlocError(f"at least one job is needed, got {jobs}")
    check_writable(WORK).mkdir(parents=True, exist_ok=True)
    shared = _inputs()
    keys = {e.out: _key(e, shared) for e in planned}
    stale = [e for e in planned if not _is_current(e, keys[e.out])]
    failed, papermills = {}, _Papermills()
    if not stale:
        return []
    with (
        memory.Log(WORK / MEMORY) as log,
        ThreadPoolExecutor(jobs or min(MOST, os.cpu_count() or 1)) as pool,
        tqdm(total=len(stale), unit="notebook", disable=not progress) as bar,
    ):
        running = {pool.submit(_execute, e, keys[e.out], timeout, papermills): e for e in stale}
        try:
            for done in as_completed(running):
                name = running[done].source.name
                if reason := done.result():
                    if re.search(r"DeadKernelError|signal \d+ \(", reason):  # a typical end for lack of memory
                        reason = f"{reason}; last reading of memory: {memory.last(log.path)}"
                    failed[name] = reason
                bar.write(f"failed   {name}: {reason}" if reason else f"executed {name}", file=sys.stderr)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            papermills.end()
            raise
    if failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items()))
        raise TextlocError(f"{len(failed)} of {len(planned)} notebooks failed and were not changed: {told}")
    return stale


def _execute(execution: Execution, key: str, timeout: int, papermills: _Papermills) -> str | None:
    """Execute one notebook. Returns the reason why it failed, or None."""
    try:
        with FileLock(execution.lock, timeout=0):
            if _is_current(execution, key):  # another run has just done it
                return None
            return _execute_alone(execution, key, timeout, papermills)
    except Timeout:
        return "another run of this notebook is in progress; wait for it, or stop it"
    except OSError as error:
        return f"{WORK} cannot be written ({error.strerror})"


def _execute_alone(execution: Execution, key: str, timeout: int, papermills: _Papermills) -> str | None:
    scratch, log, temporary = (execution.stamp.with_suffix(suffix) for suffix in (".ipynb", ".log", ".tmp"))
    arguments = ["--no-progress-bar", "--execution-timeout", str(timeout), "--kernel", "python3"]
    arguments += [str(execution.source), str(scratch)]
    for name, value in execution.parameters.items():
        arguments += ["-p", name, str(value)]
    environment = {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "TQDM_DISABLE": "1"}
    # A killed papermill leaves the connection file of its kernel behind. The next run of the notebook removes it.
    environment |= {results.COMMAND: execution.command, "TMPDIR": str(temporary), **execution.environment}
    temporary.mkdir(exist_ok=True)
    with log.open("w") as file:
        status = papermills.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
    shutil.rmtree(temporary, ignore_errors=True)
    if status < 0:
        return f"papermill was ended by signal {-status} (see {log})"
    if status:
        return f"{_reason(log) or f'exit status {status}'} (see {log})"
    made = _made(scratch)
    try:
        strip(scratch)
        files.write_bytes(execution.out, scratch.read_bytes())
        stamp = {"key": key, "sha256": _written(execution), "made": made}
        files.write_text(execution.stamp, json.dumps(stamp))
    except TextlocError as error:
        return f"it was executed, but {error} (the result is kept as {scratch})"
    return None


def _made(scratch: Path) -> dict:
    """The time and place of an execution, from papermill's notes and from this process."""
    about = results.provenance()
    device = next((name for _, name, *_ in memory.accelerators()), about["device"])
    seconds = json.loads(scratch.read_text(encoding="utf-8"))["metadata"]["papermill"]["duration"]
    return {"seconds": round(seconds, 1), "device": device, "commit": about["commit"], "created": about["created"]}


def _reason(log: Path) -> str:
    """The line of a log with the last error. If there is none, the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)(: |$)", line)]
    return (told or lines or [""])[-1]


def read(path: str | Path) -> nbformat.NotebookNode:
    """Read a notebook in format 4. Raises TextlocError for a file that is not a notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except _NO_NOTEBOOK as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TextlocError(f"{path} cannot be read as a notebook: {reason}") from None
    return notebook


def strip(path: str | Path) -> None:
    """Remove from an executed notebook everything that differs from run to run. Then two runs give the same bytes.

    Times and papermill's notes are removed. The printed parts of a cell are joined to one output, because the kernel
    splits them at random places. Raises TextlocError for a file that is not a notebook.
    """
    path, notebook = Path(path), read(path)
    for cell in notebook.cells:
        joined: list = []
        for output in cell.get("outputs", ()):
            last = joined[-1] if joined else {}
            if output.output_type == last.get("output_type") == "stream" and output.name == last["name"]:
                last["text"] += output.text
            else:
                joined.append(output)
        if joined:
            cell.outputs = joined
    with files.whole_file(path) as part:
        nbformat.write(notebook, part)
        options = ["--keep-output", "--keep-count", "--extra-keys", STRIPPED, str(part)]
        done = subprocess.run([sys.executable, "-m", "nbstripout", *options], capture_output=True, text=True)
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"nbstripout ended with {done.returncode}"]
            raise TextlocError(f"{path} cannot be stripped: {told[-1]}")


# --- the inputs of outputs --------------------------------------------------------------------------------------


def _is_current(execution: Execution, key: str) -> bool:
    """Whether the file was written by an execution with this key and not changed since then."""
    try:
        stamp = json.loads(execution.stamp.read_text())
        return (stamp["key"], stamp["sha256"]) == (key, _written(execution)) and "made" in stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _written(execution: Execution) -> str:
    """Digest of an executed notebook: of the file, or, if executed in place, of its code cells with their outputs."""
    if not execution.in_place:
        return files.sha256_of(execution.out)
    cells = json.loads(execution.out.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256(json.dumps([c for c in cells if c["cell_type"] == "code"]).encode()).hexdigest()


def _key(execution: Execution, shared: str) -> str:
    kept = [c for c in read(execution.source).cells if c.cell_type == "code" or not execution.in_place]
    cells = [[c.cell_type, c.source, c.metadata.get("tags", [])] for c in kept]
    return hashlib.sha256(json.dumps([cells, execution.parameters, shared]).encode()).hexdigest()


def _inputs() -> str:
    """One digest of the package, the data (without results and training runs) and the installed versions."""
    digest = hashlib.sha256(f"tesseract {ocr.tesseract_version()}\n".encode())
    required = {Requirement(line).name for line in importlib.metadata.requires("textloc-utils") or ()}
    for name in sorted(required):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the package of an extra may be missing
            digest.update(f"{name}=={importlib.metadata.version(name)}\n".encode())
    aside = {data_dir() / "results", data_dir() / "runs"}
    data = sorted(p for p in data_dir().rglob("*") if p.is_file() and not aside & set(p.parents) and p.suffix != ".md")
    for path in (*_package(), *data):
        digest.update(f"{path}\n{files.sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _package() -> list[Path]:
    kinds = (".py", ".csv", ".toml", ".json")
    return sorted(path for path in Path(__file__).parents[1].rglob("*") if path.suffix in kinds)


def _assigns(source: str, name: str) -> bool:
    return any(line.startswith(f"{name} =") for line in source.splitlines())
