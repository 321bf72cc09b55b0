"""Reports on runs of the notebooks: their cost, the numbers that changed, and the estimated time of a larger run."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from textloc_utils import settings
from textloc_utils.book import compute, memory, notebooks
from textloc_utils.experiment import published_store

RECORDED = "application/papermill.record/text/plain"
#: A summary lists at most this many changed numbers, so that it can be read.
MOST_ROWS = 200


def publish_times(planned: Sequence[notebooks.Execution]) -> None:
    """Publish the table ``chapters``: the cost of the last execution in place of each notebook.

    Rows of notebooks that are not planned are kept. Columns: notebook, seconds, device, commit, created.
    """
    known = compute.chapters().reset_index(names="notebook").to_dict("records")
    rows = {row["notebook"]: row for row in known}
    rows |= {e.source.name: {"notebook": e.source.name, **e.made()} for e in planned}
    table = pd.DataFrame([rows[name] for name in sorted(rows)])
    published_store().publish("chapters", table.fillna({"commit": ""}), {"seconds": float(table.seconds.sum())})


# --- which numbers changed --------------------------------------------------------------------------------------


def recorded(path: Path) -> dict[str, str]:
    """The numbers that a notebook recorded for the book, as texts by name. Empty if there is no notebook."""
    if not path.is_file():
        return {}
    cells = notebooks.read(path).cells
    outputs = (output for cell in cells for output in cell.get("outputs", ()))
    return {o.metadata.scrapbook.name: o.data[RECORDED] for o in outputs if RECORDED in o.get("data", {})}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, value before and value now of each number that differs. A missing value is the empty text."""
    names = dict.fromkeys([*before, *now])
    return [(n, before.get(n, ""), now.get(n, "")) for n in names if before.get(n) != now.get(n)]


def summary(done: Sequence[notebooks.Execution], before: Mapping[Path, Mapping[str, str]]) -> str:
    """A report in Markdown on executed notebooks: their time, the memory, and the numbers that changed.

    ``before`` holds the numbers that were :func:`recorded` in each ``out`` before the run.
    """
    lines = ["## Notebooks executed", "", "| notebook | time | device | commit |", "| --- | --- | --- | --- |"]
    changed = []
    for e in done:
        made = e.made()
        commit = (made["commit"] or compute.UNKNOWN)[:10]
        lines.append(f"| {e.source.name} | {made['seconds']:.0f} s | {made['device']} | {commit} |")
        changed += [(e.source.stem, *row) for row in changes(before[e.out], recorded(e.out))]
    if done:
        log = notebooks.WORK / notebooks.MEMORY
        energy = memory.watt_hours(log)
        told = f"; the GPUs drew {energy:.1f} Wh" if energy is not None else ""
        lines += ["", f"Peak of memory: {memory.peak(log)}{told}."]
    lines += ["", "## Numbers that changed", ""]
    if not changed:
        return "\n".join([*lines, "None.", ""])
    lines += ["| notebook | name | before | now |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(cell or '(none)' for cell in row)} |" for row in changed[:MOST_ROWS]]
    if len(changed) > MOST_ROWS:
        lines.append(f"\nAnd {len(changed) - MOST_ROWS} more.")
    return "\n".join([*lines, ""])


# --- time of a larger run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The time of a notebook with the preset smoke, in seconds, and its estimated time with another preset."""

    notebook: str
    smoke: float
    units: float  # the part of ``smoke`` that was spent in units of work, which grows with the preset
    seconds: float
    peak: str  # peak of memory during ``smoke``, in words


def estimate(planned: Sequence[notebooks.Execution], steps: int, **options) -> list[Estimate]:
    """Estimate the time of the planned runs, from real runs with the preset smoke.

    The time in units of work is assumed to grow like the preset's pairs and sampling steps. Of the preset's several
    numbers of pairs or words, the one that grows most is used. ``steps`` are those of the models, for a preset without
    steps. All other time, such as loading, is assumed to stay the same. ``options`` are those of ``notebooks.execute``.
    """
    found = []
    smoke = settings.preset("smoke")
    with tempfile.TemporaryDirectory(prefix="textloc-estimate-") as folder:
        for e in planned:
            store = Path(folder, e.source.stem)
            small = replace(
                e,
                out=Path(folder, e.source.name),
                parameters=e.parameters | {"PRESET": smoke.name},
                environment={"TEXTLOC_RESULTS": str(store)},
            )
            notebooks.execute([small], **options)
            seconds, units = small.made()["seconds"], _unit_seconds(store)
            small.stamp.unlink()
            growth = _growth(smoke, settings.preset(e.parameters.get("PRESET", "book")), steps)
            whole = max(0.0, seconds - units) + units * growth
            peak = memory.peak(notebooks.WORK / notebooks.MEMORY)
            found.append(Estimate(notebook=e.source.name, smoke=seconds, units=units, seconds=whole, peak=peak))
    return found


def _growth(small: settings.Preset, large: settings.Preset, steps: int) -> float:
    kinds = ("pairs", "sweep_pairs", "words")
    items = max(getattr(large, kind) / getattr(small, kind) for kind in kinds)
    assert small.steps is not None
    return items * (large.steps or steps) / small.steps


def _unit_seconds(store: Path) -> float:
    """Seconds of all units in a store."""
    files = store.glob("units/*/*.jsonl")
    return sum(json.loads(path.open().readline())["provenance"]["seconds"] for path in files)
