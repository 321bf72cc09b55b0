"""The result store: units of work kept under a hash of their inputs, published tables, recorded scalars.

A unit is one file, ``units/<kind>/<hash>.jsonl``: a header line (inputs, provenance, columns, digest), then
one JSON row per line. Files appear whole or not at all, so a killed run resumes where it stopped, and
processes that work on different units share a store. Published tables, ``<name>.csv`` with ``<name>.json``,
are the ones that are committed.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

import textloc_utils
from textloc_utils import files, settings
from textloc_utils.settings import TextlocError

LIBRARIES = ("torch", "diffusers", "transformers")
ADVICE = "set TEXTLOC_RESULTS to a folder that can be written"


class Store:
    """Tables of results in one folder (default: ``settings.results_dir()``)."""

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = Path(root) if root is not None else settings.results_dir()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def unit(self, kind: str, inputs: Mapping, compute: Callable[[], pd.DataFrame | Iterable[Mapping]]) -> pd.DataFrame:
        """The table of one unit of work: the stored one, or else ``compute()``'s, stored first.

        A unit that was made with other versions of LIBRARIES is computed anew: an upgrade is not hidden by the store.

        Parameters
        ----------
        kind
            Name of the experiment; one folder each.
        inputs
            All that the result depends on, as JSON-like values (also dataclasses, paths, numpy numbers). The
            order of keys does not matter.
        compute
            Called without arguments when nothing is stored; returns a DataFrame or dicts, one per row, of
            numbers, booleans, texts or lists of these.

        Returns
        -------
        The rows as stored: a first run and a resumed one see the same values and types.

        Raises
        ------
        TextlocError
            A kind or inputs that cannot be stored, or an unwritable folder; before anything is computed. A
            stored file that is damaged is recomputed with a warning.
        """
        path = self._unit_path(kind, inputs)
        if path.exists():
            try:
                header, table = _read_unit(path)
                if _is_current(header):
                    return table
            except _DamagedError as error:
                warnings.warn(f"recomputing damaged result {path}: {error}", stacklevel=2)
        _require_writable(path.parent)
        table = compute()
        if not isinstance(table, pd.DataFrame):
            table = pd.DataFrame(list(table))
        columns = [str(c) for c in table.columns]
        rows = [_json(dict(zip(columns, row, strict=True))) for row in table.itertuples(index=False, name=None)]
        body = "".join(row + "\n" for row in rows)
        header = {
            "kind": kind,
            "inputs": _plain(inputs),
            "provenance": provenance(),
            "columns": columns,
            "rows": len(rows),
            "sha256": _digest(body),
        }
        files.write_text(path, _json(header) + "\n" + body, advice=ADVICE)
        return _read_unit(path)[1]

    def has(self, kind: str, inputs: Mapping) -> bool:
        """Whether this unit is stored, made with these versions of LIBRARIES."""
        path = self._unit_path(kind, inputs)
        try:
            return path.exists() and _is_current(_read_unit(path)[0])
        except _DamagedError:
            return False

    def table(self, kind: str, **where) -> pd.DataFrame:
        """All rows of all stored units of a kind, or of those whose inputs hold the given values.

        Units follow each other in the order of their hashes: the same store gives the same table. A kind
        without units gives an empty table; a damaged unit raises a TextlocError that names its file.
        """
        wanted = {key: _plain(value) for key, value in where.items()}
        tables = []
        for path in sorted((self.root / "units" / _name(kind)).glob("*.jsonl")):
            try:
                header, table = _read_unit(path)
            except _DamagedError as error:
                raise TextlocError(f"damaged result {path} ({error}); delete it and run its experiment again") from None
            inputs = header["inputs"]
            if all(key in inputs and inputs[key] == value for key, value in wanted.items()) and len(table):
                tables.append(table)
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def publish(self, name: str, table: pd.DataFrame, provenance: Mapping) -> Path:
        """Write a table to ``<name>.csv`` and what it came from to ``<name>.json``; returns the CSV's path.

        ``provenance`` is the caller's part (models, preset, seed, device ...); versions and time are added.
        Columns hold numbers, booleans or texts; a missing text is kept as the empty one.
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
            "provenance": {**_this_provenance(), **_plain(provenance)},
        }
        _require_writable(self.root)
        # The CSV first: between the two writes a reader sees a digest that does not fit, never a wrong table.
        files.write_text(path, text, advice=ADVICE)
        files.write_json(path.with_suffix(".json"), about, indent=2, advice=ADVICE)
        return path

    def load_published(self, name: str) -> pd.DataFrame:
        """A published table; its provenance is in ``table.attrs["provenance"]``."""
        path = self.root / f"{_name(name)}.csv"
        try:
            text = path.read_bytes().decode()
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            kinds, digest = about["columns"], about["sha256"]
        except OSError:
            raise TextlocError(f"no published table {name!r} in {self.root}; known: {self._published()}") from None
        except (ValueError, KeyError, TypeError):
            raise TextlocError(f"{path.with_suffix('.json')} is damaged; restore it or publish {name} again") from None
        if _digest(text.replace("\r\n", "\n")) != digest:
            raise TextlocError(f"{path} does not fit the digest in {name}.json; restore both or publish {name} again")
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
        table = pd.DataFrame({column: _parse(raw[column], kind) for column, kind in kinds.items()})
        table.attrs["provenance"] = about["provenance"]
        return table

    def load_matching(self, name: str, key: Mapping) -> pd.DataFrame | None:
        """A published table whose provenance holds just this ``key``; None where it is missing or of something else."""
        try:
            table = self.load_published(name)
        except TextlocError:
            return None
        return table if table.attrs["provenance"].get("key") == _plain(key) else None

    def taken_or_made(
        self, name: str, key: Mapping, make: Callable[[], pd.DataFrame], *, publish: bool = False
    ) -> pd.DataFrame:
        """The published table of just this ``key``, or else ``make()``'s; with ``publish`` made and published anew."""
        table = None if publish else self.load_matching(name, key)
        if table is None:
            table = make()
            if publish:
                self.publish(name, table, {"key": key})
        return table

    def _published(self) -> str:
        return ", ".join(sorted(p.stem for p in self.root.glob("*.csv"))) or "none"

    def _unit_path(self, kind: str, inputs: Mapping) -> Path:
        return self.root / "units" / _name(kind) / f"{unit_hash(kind, inputs)}.jsonl"


def unit_hash(kind: str, inputs: Mapping) -> str:
    """sha256 (hexadecimal) of a unit's kind and inputs in canonical JSON: keys sorted, no spaces."""
    text = json.dumps([kind, _plain(inputs)], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _digest(text)


def provenance(device: str | None = None) -> dict:
    """What a result was made with: versions, device, time (UTC). ``device`` defaults to what torch would use."""
    versions = {"textloc_utils": textloc_utils.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "device": device or _device(), "created": now}


_this_provenance = provenance  # publish() has an argument of that name


def record(name: str, value):
    """Record a notebook's scalar for the book's prose (``{glue:text}``), or a figure for another page; returns it."""
    try:
        from myst_nb import glue
    except ImportError:
        raise TextlocError("recording a number for the book needs myst-nb: pip install myst-nb") from None
    if isinstance(value, np.generic):
        value = value.item()
    glue(name, value, display=False)
    return value


# --- files ----------------------------------------------------------------------------------------------------


class _DamagedError(Exception):
    """A stored file is not what was written."""


def _read_unit(path: Path) -> tuple[dict, pd.DataFrame]:
    """Header and table of a unit's file."""
    try:
        head, _, body = path.read_bytes().decode().partition("\n")
        header = json.loads(head)
        if _digest(body) != header["sha256"]:
            raise _DamagedError("its rows do not fit their digest")
        rows = [json.loads(line) for line in body.split("\n") if line]
        return header, pd.DataFrame(rows, columns=header["columns"])
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"its header is unreadable ({type(error).__name__})") from None


def _is_current(header: Mapping) -> bool:
    """Whether a unit was made with the installed versions of LIBRARIES; the label of one build ("+cpu") is none."""
    made, now = (
        {name: versions[name].partition("+")[0] for name in LIBRARIES if name in versions}
        for versions in (header["provenance"]["versions"], provenance()["versions"])
    )
    return made == now


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TextlocError(_unwritable(folder, error)) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TextlocError(_unwritable(folder, PermissionError(13, "Permission denied")))


def _unwritable(folder: Path, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"cannot write results to {folder} ({reason}); {ADVICE}"


# --- values ---------------------------------------------------------------------------------------------------


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise TextlocError(f"a result's name holds letters, digits, - and _ only, got {name!r}")
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
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if value is pd.NA or value is pd.NaT:
        return None
    raise TextlocError(
        f"a result cannot hold a {type(value).__name__}; allowed: numbers, booleans, texts, lists, dicts"
    )


def _plain(value):
    """The value as JSON gives it back."""
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
        raise TextlocError(f"column {column!r} of {name} must hold numbers, booleans or texts only")
    return "str"


def _parse(values: pd.Series, kind: str) -> pd.Series:
    if kind == "bool":
        return values == "True"
    if kind == "int":
        return values.astype("int64")
    if kind == "float":
        return values.map(lambda text: float(text or "nan")).astype("float64")
    return values


def _device() -> str:
    """The accelerator's name where torch is loaded and sees one, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
