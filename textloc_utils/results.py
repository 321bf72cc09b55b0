"""The result store: units of work (stored under a hash of their inputs), published tables and recorded scalars.

A unit is one file, ``units/<kind>/<hash>.jsonl``. It has a header line (kind, inputs, provenance, columns, number of
rows), one JSON row per line, and a last line with the digest of all lines before it. A file is either complete or does
not exist. So a killed run resumes where it stopped, and processes that work on different units can share a store.

Published tables are the ones that are committed. Each has two files: ``<name>.csv`` and ``<name>.json``. The JSON file
holds the digest of the table and a digest of itself. A file that was changed, or that belongs to another request, is
never used as a result.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

import textloc_utils
from textloc_utils import files, ocr, settings
from textloc_utils.settings import TextlocError

if TYPE_CHECKING:
    from textloc_utils.models import Model

LIBRARIES = ("torch", "diffusers", "transformers")
ADVICE = "set TEXTLOC_RESULTS to a folder that can be written"
#: Environment variable with the command for the provenance of a notebook's results. The command line of the notebook's
#: own process says nothing useful.
COMMAND = "TEXTLOC_COMMAND"
_BEGAN = time.monotonic()


class NotPublishedError(TextlocError):
    """There is no published table of this name."""


class Store:
    """A store of result tables in one folder (default: ``settings.results_dir()``)."""

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root) if root is not None else settings.results_dir()
        #: Seconds that other runs took for the stored units that this object returned. Each unit counts once.
        self.seconds_before = 0.0
        self._counted: set[Path] = set()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def unit(
        self,
        kind: str,
        inputs: Mapping,
        compute: Callable[[], pd.DataFrame | Iterable[Mapping]],
        *,
        model: "Model | None",
    ) -> pd.DataFrame:
        """Return the table of one unit of work: the stored one, or else that of ``compute()``, which is then stored.

        A unit that was made with other versions of LIBRARIES is computed again. So the store does not hide the effect
        of an upgrade.

        Parameters
        ----------
        kind
            Name of the experiment. Each name has its own folder.
        inputs
            Everything that the result depends on, as JSON-like values (also dataclasses, paths, numpy numbers). The
            order of keys does not matter.
        compute
            Function without arguments, called if nothing is stored. It returns a DataFrame, or dicts, one per row. The
            values are numbers, booleans, texts or lists of these.
        model
            The model that computes the result, or None if no model is used. The type of its device, its dtype, and the
            reader of its pictures with the reader's version are also inputs.

        Returns
        -------
        The rows as stored. So a first run and a resumed run return the same values and types.

        Raises
        ------
        TextlocError
            Before anything is computed: the kind or the inputs cannot be stored, the folder cannot be written, or the
            unit's path exists and is not a file. If a stored file is damaged or holds another unit, the unit is
            computed again, with a warning.
        """
        inputs = {**inputs, **computed_with(model)}
        path = self.root / "units" / _name(kind) / f"{unit_hash(kind, inputs)}.jsonl"
        if os.path.lexists(path):
            try:
                header, table = _read_unit(path)
                if _is_current(header):
                    if path not in self._counted:
                        self._counted.add(path)
                        self.seconds_before += header["provenance"].get("seconds", 0.0)
                    return table
            except _DamagedError as error:
                warnings.warn(f"recomputing damaged result {path}: {error}", stacklevel=2)
        settings.check_writable(path.parent, advice=ADVICE)
        began = time.monotonic()
        table = compute()
        if not isinstance(table, pd.DataFrame):
            table = pd.DataFrame(list(table))
        columns = [str(c) for c in table.columns]
        rows = [_json(dict(zip(columns, row, strict=True))) for row in table.itertuples(index=False, name=None)]
        header = {
            "kind": kind,
            "inputs": _plain(inputs),
            "provenance": provenance(model) | {"seconds": round(time.monotonic() - began, 3)},
            "columns": columns,
            "rows": len(rows),
        }
        body = "".join(line + "\n" for line in (_json(header), *rows))
        files.write_text(path, body + _seal(body.encode()).decode(), advice=ADVICE)
        self._counted.add(path)
        return _read_unit(path)[1]

    def publish(self, name: str, table: pd.DataFrame, provenance: Mapping, *, model: "Model | None" = None) -> Path:
        """Write a table to ``<name>.csv`` and its provenance to ``<name>.json``. Returns the CSV's path.

        ``provenance`` is the caller's part of it (models, preset, seed ...). The entries of :func:`provenance` for the
        ``model`` and the seconds of this process are added unless the caller gives them. Columns hold numbers, booleans
        or texts. A missing text is stored as the empty text.
        """
        path = self.root / f"{_name(name)}.csv"
        table = table.reset_index(drop=True)
        kinds = {str(column): _column_kind(name, column, table[column]) for column in table.columns}
        text = table.to_csv(index=False, lineterminator="\n")
        about = {
            "table": path.name,
            "rows": len(table),
            "columns": kinds,
            "sha256": _digest(text),
            "provenance": {
                **_this_provenance(model),
                "seconds": round(time.monotonic() - _BEGAN, 1),
                **_plain(provenance),
            },
        }
        settings.check_writable(self.root, advice=ADVICE)
        # The CSV is renamed first. Between the two renames a reader sees a wrong digest, but never a wrong table.
        with files.whole_files(self.root, path.name, path.with_suffix(".json").name, advice=ADVICE) as aside:
            (aside / path.name).write_bytes(text.encode())
            text = json.dumps(files.sealed(about), indent=2, ensure_ascii=False) + "\n"
            (aside / path.with_suffix(".json").name).write_bytes(text.encode())
        return path

    def load_published(self, name: str) -> pd.DataFrame:
        """Return a published table. Its provenance is in ``table.attrs["provenance"]``.

        Raises NotPublishedError if there is no such table. Raises TextlocError if the files are damaged, do not belong
        together, or were published under another name.
        """
        path = self.root / f"{_name(name)}.csv"
        beside = path.with_suffix(".json")
        try:
            text, about = path.read_bytes(), beside.read_bytes()
        except FileNotFoundError:
            raise NotPublishedError(f"no published table {name!r} in {self.root}; known: {self._published()}") from None
        except OSError as error:
            raise TextlocError(f"the published table {path} cannot be read ({error.strerror})") from None
        advice = f"restore both or publish {name} again"
        try:
            about = json.loads(about.decode())
            if about != files.sealed(about) or about["table"] != path.name:
                raise ValueError
            kinds, digest, provenance = about["columns"], about["sha256"], about["provenance"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TextlocError(f"{beside} is damaged; {advice}") from None
        try:
            if _digest(text.decode().replace("\r\n", "\n")) != digest:
                raise ValueError
            raw = pd.read_csv(path, dtype=str, na_filter=False)
            table = pd.DataFrame({column: _parse(raw[column], kind) for column, kind in kinds.items()})
        except (ValueError, KeyError):
            raise TextlocError(f"{path} does not match the digest in {beside.name}; {advice}") from None
        table.attrs["provenance"] = provenance
        return table

    def load_matching(self, name: str, key: Mapping) -> pd.DataFrame | None:
        """Return a published table if its provenance has exactly this ``key``. Returns None otherwise.

        Raises TextlocError for a damaged table, so that a published table is never replaced silently.
        """
        try:
            table = self.load_published(name)
        except NotPublishedError:
            return None
        return table if table.attrs["provenance"].get("key") == _plain(key) else None

    def _published(self) -> str:
        return ", ".join(sorted(p.stem for p in self.root.glob("*.csv"))) or "none"


def unit_hash(kind: str, inputs: Mapping) -> str:
    """sha256 (hexadecimal) of a unit's kind and inputs in canonical JSON: keys sorted, no spaces."""
    text = json.dumps([kind, _plain(inputs)], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _digest(text)


def provenance(model: "Model | None" = None) -> dict:
    """The provenance of a result: versions, commit, command, device, reader, time (UTC).

    Device and reader are those of the ``model``. Without a model, they are the device that torch would use and the
    reader of miniatures. The commit is None outside a clone. The reader is None if none is installed.
    """
    return {
        "versions": _versions(),
        "commit": _commit(),
        "command": _command(),
        "device": _device(model.device.type if model is not None else None),
        "reader": _reader(model.spec.height if model is not None else 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


_this_provenance = provenance  # publish() has an argument of that name


def record(name: str, value):
    """Record a notebook's number for the book's text (``{glue:text}``), or a figure for another page. Returns it."""
    try:
        from myst_nb import glue
    except ImportError:
        raise TextlocError("recording a number for the book needs myst-nb: pip install myst-nb") from None
    if isinstance(value, np.generic):
        value = value.item()
    glue(name, value, display=False)
    return value


def computed_with(model: "Model | None") -> dict:
    """The inputs that a model adds to the inputs of a unit."""
    if model is None:
        return {}
    return {
        "device": model.device.type,
        "dtype": str(model.denoiser.dtype).removeprefix("torch."),
        "reader": _reader(model.spec.height),
    }


# --- files ----------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A stored file was changed after it was written."""


def _read_unit(path: Path) -> tuple[dict, pd.DataFrame]:
    """Read the header and the table of a unit's file."""
    if not path.is_file():
        raise TextlocError(f"{path} is not a file, so no result can be stored there; remove it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextlocError(f"the stored result {path} cannot be read ({error.strerror})") from None
    body = data[: -len(_seal(b""))]
    if data != body + _seal(body):
        raise _DamagedError("it does not match its digest")
    try:
        head, *lines = body.decode().removesuffix("\n").split("\n")
        header = json.loads(head)
        rows = [json.loads(line) for line in lines]
        if unit_hash(header["kind"], header["inputs"]) != path.stem:
            raise _DamagedError("it belongs to another unit")
        if len(rows) != header["rows"] or any(list(row) != header["columns"] for row in rows):
            raise ValueError
        if not isinstance(header["provenance"]["versions"], dict):
            raise ValueError
        return header, pd.DataFrame(rows, columns=list(header["columns"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _DamagedError("it was not written by this package") from None


def _seal(body: bytes) -> bytes:
    """The last line of a unit's file."""
    return b'{"sha256": "%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def _is_current(header: Mapping) -> bool:
    """Whether a unit was made with the installed versions of LIBRARIES. Labels of builds ("+cpu") do not matter."""
    made, now = (
        {name: str(versions[name]).partition("+")[0] for name in LIBRARIES if name in versions}
        for versions in (header["provenance"]["versions"], _versions())
    )
    return made == now


# --- values ---------------------------------------------------------------------------------------------------


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise TextlocError(f"a result's name may have only letters, digits, - and _, got {name!r}")
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _json(value) -> str:
    return json.dumps(value, default=_json_default, ensure_ascii=False)


def _json_default(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TextlocError(
        f"a result cannot hold a {type(value).__name__}; allowed: numbers, booleans, texts, lists, dicts"
    )


def _plain(value):
    """The value after it was written to JSON and read back."""
    return json.loads(_json(value))


def _column_kind(name: str, column, values: pd.Series) -> str:
    for kind, test in (
        ("bool", pd.api.types.is_bool_dtype),
        ("int", pd.api.types.is_integer_dtype),
        ("float", pd.api.types.is_float_dtype),
    ):
        if test(values.dtype):
            return kind
    if not values.dropna().map(lambda v: isinstance(v, str)).all():
        raise TextlocError(f"column {column!r} of {name} must hold only numbers, booleans or texts")
    return "str"


def _parse(values: pd.Series, kind: str) -> pd.Series:
    if kind == "bool":
        return values == "True"
    if kind == "int":
        return values.astype("int64")
    if kind == "float":
        return values.map(lambda text: float(text or "nan")).astype("float64")
    return values


# --- where results come from ----------------------------------------------------------------------------------


def _device(kind: str | None = None) -> str:
    """The name of the GPU, if torch is loaded and finds one and ``kind`` is not "cpu". Otherwise the processor."""
    torch = sys.modules.get("torch")
    if kind != "cpu" and torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"textloc_utils": textloc_utils.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


@functools.cache
def _reader(height: int) -> str | None:
    """Name and version of the reader for pictures of this height. Cached, because it takes a separate process."""
    with contextlib.suppress(TextlocError):
        return ocr.reader(ocr.engine_of(height))
    return None


@functools.cache
def _commit() -> str | None:
    """The clone's commit, followed by ``+changes`` if files of the package differ from it."""
    if not (settings.ROOT / ".git").exists():  # a folder above an installed package may belong to another project
        return None
    git = ["git", "-C", str(settings.ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "textloc_utils"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed.returncode else "")


def _command() -> str:
    """The command line of this process. Of absolute paths, only the last part is kept."""
    if told := os.environ.get(COMMAND):
        return told
    program, *arguments = sys.argv or [""]
    if "ipykernel" in program:
        return "a notebook"
    started = Path(program)
    name = started.parent.name if started.name == "__main__.py" else started.name
    return shlex.join([name, *(Path(a).name if a.startswith(("/", "~")) else a for a in arguments)])
