"""A log of the memory of the host and of its GPUs while notebooks run. It helps when a run ends for lack of memory."""

import contextlib
import csv
import datetime
import shutil
import subprocess
import threading
from pathlib import Path

import pandas as pd
import psutil

HOST = "host"
COLUMNS = ("time", "device", "used_gib", "total_gib", "watts")
_QUERY = "--query-gpu=index,name,memory.used,memory.total,power.draw"


def accelerators() -> list[tuple[str, str, float, float, float | None]]:
    """Index, name, used and total memory (GiB) and power (W, or None if unknown) of each GPU that the driver knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for index, name, used, total, watts in (line.split(", ") for line in told.strip().splitlines()):
        power = float(watts) if watts.replace(".", "").isdigit() else None
        found.append((index, name, float(used) / 1024, float(total) / 1024, power))
    return found


class Log:
    """Write the used memory to a CSV file with COLUMNS, every ``seconds`` inside a ``with`` block.

    Each reading is written to the disk immediately, so the log survives a crash of the machine. A full disk does not
    stop the run.
    """

    def __init__(self, path: Path, seconds: float = 5.0):
        self.path, self._seconds = path, seconds
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Log":
        self._write("w", [COLUMNS])
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *raised) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self._read()

    def _read(self) -> None:
        host, at = psutil.virtual_memory(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        rows: list[tuple[str, float, float, float | None]]
        rows = [(HOST, (host.total - host.available) / 2**30, host.total / 2**30, None)]
        rows += [(f"GPU {index}", used, total, watts) for index, _, used, total, watts in accelerators()]
        self._write("a", [(at, d, f"{u:.2f}", f"{t:.2f}", "" if w is None else w) for d, u, t, w in rows])

    def _write(self, mode: str, rows: list) -> None:
        with contextlib.suppress(OSError), self.path.open(mode, newline="") as file:
            csv.writer(file).writerows(rows)


def last(path: Path) -> str:
    """The last reading of each device in a log, in words."""
    return _in_words(_read(path).groupby("device", sort=False).last())


def peak(path: Path) -> str:
    """The highest reading of each device in a log, in words."""
    return _in_words(_read(path).groupby("device", sort=False).max())


def watt_hours(path: Path) -> float | None:
    """The energy that the GPUs used during a log, from its readings. None if no GPU reports its power."""
    log = _read(path).dropna(subset="watts")
    if log.empty:
        return None
    hours = log.groupby("device").time.diff().shift(-1).dt.total_seconds().fillna(0) / 3600
    return float((log.watts * hours).sum())


def _read(path: Path) -> pd.DataFrame:
    """Read a log. It is empty if it could not be written."""
    try:
        return pd.read_csv(path, parse_dates=["time"])
    except (OSError, pd.errors.EmptyDataError):
        return pd.DataFrame(columns=list(COLUMNS))


def _in_words(readings: pd.DataFrame) -> str:
    rows = zip(readings.index, readings.used_gib, readings.total_gib, strict=True)
    return ", ".join(f"{device} {used:.1f} of {total:.1f} GiB" for device, used, total in rows) or "none"
