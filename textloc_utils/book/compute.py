"""The cost of making the book: the recorded seconds, devices and energy of its trainings, tables and chapters.

Nothing is measured here. The cost of a miniature's training is in ``training.json``, that of a published table is in
its JSON file, and that of the chapters is in the published table ``chapters`` (``textloc run --publish``). A value that
was not recorded is UNKNOWN.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from textloc_utils import models
from textloc_utils import trainings as studies
from textloc_utils.experiment import published_store
from textloc_utils.models.registry import MINIATURES
from textloc_utils.results import NotPublishedError, Store
from textloc_utils.settings import data_dir

UNKNOWN = "not recorded"
#: The energy model of Lannelongue, Grealey and Inouye (2021), with the defaults of their calculator: watts of a
#: processor core at full load, watts of a gigabyte of memory, and the watts that a computing centre needs per watt of
#: computing.
WATTS_CORE, WATTS_GIGABYTE, CENTRE = 12.0, 0.3725, 1.67
#: Assumed memory of a process of this project, in gigabytes. It is not recorded.
GIGABYTES = 4
#: The chapter that shows a published table, by the first word of the table's name (or by the last word, see below).
CHAPTERS = {
    "localize": "02_localization",
    "study": "03_what_the_layers_carry",
    "trainings": "03_what_the_layers_carry",
    "explorer": "explorer",
    "lora": "04_lora",
    "edit": "05_editing",
    "safety": "06_safety",
}
CHAPTERS |= dict.fromkeys(("specific", "needed", "alone"), "02_localization")


def watt_hours(seconds: float, processes: int = 1) -> float:
    """Estimated energy of processes with one thread each on a CPU: seconds x (core + memory) x the centre's factor."""
    return seconds / 3600 * processes * (WATTS_CORE + GIGABYTES * WATTS_GIGABYTE) * CENTRE


def trainings() -> pd.DataFrame:
    """One row per miniature and part of its training.

    Columns: model, part, device, processes, seconds, watt_hours, estimated (whether the energy is estimated) and
    commit. A part that several miniatures share has a row for each of them.
    """
    rows = []
    for spec in models.registry().values():
        log = models.training_log(spec) if spec.miniature else None
        if log is None:
            continue
        report = log["report"]
        parts = dict(report.get("parts", {}))
        parts |= {"second stage": report["stage2"]} if "stage2" in report else {}
        for name, part in {"denoiser": report, **parts}.items():
            about = {key: part.get(key, report.get(key)) or "" for key in ("device", "commit")}
            rows.append({"model": spec.name, "part": name} | about | _spent(part, about["device"]))
    rows += [
        {"model": row.model, "part": f"study: {row.run}", "device": "", "commit": ""}
        | _spent({"seconds": 60 * row.minutes}, "cpu")
        for row in studies.together(MINIATURES).drop_duplicates(["model", "run"]).itertuples()
    ]
    return pd.DataFrame(rows)


def _spent(part: Mapping, device: str) -> dict:
    """Processes, seconds and energy of a part. An autoencoder and a text encoder are trained by one process."""
    processes, seconds = part.get("processes", 1), part.get("seconds")
    energy, estimated = part.get("watt_hours"), False
    if not energy and device == "cpu" and seconds is not None:
        energy, estimated = watt_hours(seconds, processes), True
    return {"processes": processes, "seconds": seconds, "watt_hours": energy, "estimated": estimated}


def tables() -> pd.DataFrame:
    """One row per published table.

    Columns: table, chapter, device, reader, commit, command, created, seconds and partly. ``seconds`` is the time of
    the whole table. If it was not recorded, ``seconds`` is the time of its rows or of its search, which is less, and
    ``partly`` is True.
    """
    root = published_store().root
    paths = sorted(path for path in root.glob("*.csv") if path.stem.partition("_")[0] in CHAPTERS)
    rows = [_row(path, path.stem.partition("_")[0]) for path in paths]
    rows += [_row(path, "explorer") for path in sorted((root / "explorer").glob("*.csv"))]
    return pd.DataFrame(rows)


def _row(path: Path, kind: str) -> dict:
    table = Store(path.parent).load_published(path.stem)
    about = table.attrs["provenance"]
    seconds, partly = about.get("seconds"), False
    if seconds is None:
        of_search = about.get("found", {}).get("seconds")
        seconds, partly = float(table.seconds.sum()) if "seconds" in table else of_search, True
    told = {name: about.get(name) or "" for name in ("device", "reader", "commit", "command", "created")}
    chapter = CHAPTERS.get(path.stem.rpartition("_")[2], CHAPTERS[kind])
    return {"table": path.stem, "chapter": chapter, **told, "seconds": seconds, "partly": partly}


def chapters() -> pd.DataFrame:
    """Seconds to execute each notebook, by its name. Columns: seconds, device, commit, created.

    The table is published by ``textloc run --publish``. It is empty if nothing was published.
    """
    try:
        return published_store().load_published("chapters").set_index("notebook")
    except NotPublishedError:
        return pd.DataFrame(columns=["seconds", "device", "commit", "created"])


# --- the page ---------------------------------------------------------------------------------------------------


def page() -> dict[str, str]:
    """The contents of the page *Compute and provenance* in Markdown, by the names of their marks in the page."""
    trained, made, executed = trainings(), tables(), chapters()
    total = trained.seconds.sum() + made.seconds.sum() + executed.seconds.sum()
    # Each table and each chapter is made by one process.
    energy = trained.watt_hours.sum() + watt_hours(made.seconds.sum() + executed.seconds.sum())
    lacking, partly = int(made.seconds.isna().sum()), int((made.partly & made.seconds.notna()).sum())
    return {
        "total": f"What was recorded adds up to **{_time(total)}** and about **{energy / 1000:.1f} kWh**. "
        f"{lacking} of {len(made)} tables have no seconds at all, and for {partly} only a part is known. What is "
        "missing is not in the sum. Parts that several miniatures share are in it several times.",
        "method": f"$E = t \\cdot n \\cdot ({WATTS_CORE:g}\\,\\mathrm{{W}} + {GIGABYTES} \\cdot "
        f"{WATTS_GIGABYTE}\\,\\mathrm{{W}}) \\cdot {CENTRE}$",
        "trainings": _trainings(trained),
        "chapters": _chapters(made, executed),
        "tables": _tables(made),
        "data": _data(),
    }


def _trainings(trained: pd.DataFrame) -> str:
    rows = [
        [row.model, row.part, f"{row.device}, {row.processes} process{'es' if row.processes > 1 else ''}"]
        + [_time(row.seconds), _energy(row.watt_hours, row.estimated), _commit(row.commit)]
        for row in trained.itertuples()
    ]
    return _markdown(["miniature", "part", "device", "time", "energy", "commit"], rows)


def _chapters(made: pd.DataFrame, executed: pd.DataFrame) -> str:
    names = sorted({*made.chapter, *(Path(name).stem for name in executed.index)}, key=lambda n: (n == "explorer", n))
    rows = []
    for name in names:
        part = made[made.chapter == name]
        run = executed.seconds.get(f"{name}.ipynb")
        lacking = f"; {int(part.seconds.isna().sum())} {UNKNOWN}" if part.seconds.isna().any() else ""
        known = "at least " if lacking or part.partly.any() else ""
        told = f"{known}{_time(part.seconds.sum())}{lacking}" if part.seconds.notna().any() else UNKNOWN
        energy = watt_hours(part.seconds.sum() + (run or 0))
        shown = f"{{doc}}`{name if name == 'explorer' else f'../notebooks/{name}'}`"
        rows.append(
            [shown, len(part), told if len(part) else "none", _time(run)]
            + [f"{known}{_energy(energy, True)}" if energy else UNKNOWN]
        )
    return _markdown(["chapter", "tables", "time of the tables", "time of the notebook", "energy"], rows)


def _tables(made: pd.DataFrame) -> str:
    parts = []
    for chapter, part in made.groupby("chapter"):
        rows = [
            [f"`{row.table}`", f"{(row.created or UNKNOWN)[:10]}, {row.device or UNKNOWN}"]
            + [("at least " if row.partly and row.seconds == row.seconds else "") + _time(row.seconds)]
            + [row.reader or UNKNOWN, _commit(row.commit), f"`{row.command}`" if row.command else UNKNOWN]
            for row in part.itertuples()
        ]
        head = ["table", "made", "time", "reader", "commit", "command"]
        parts.append(f":::{{dropdown}} {chapter} ({len(part)} tables)\n{_markdown(head, rows)}\n:::")
    return "\n\n".join(parts)


def _data() -> str:
    """The table of ``data/README.md``."""
    lines = (data_dir() / "README.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def _markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def _time(seconds: float | None) -> str:
    if seconds is None or seconds != seconds:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _energy(hours: float | None, estimated: bool) -> str:
    if hours is None or hours != hours:
        return UNKNOWN
    return f"{hours:.3g} Wh, {'estimated' if estimated else 'reported by the device'}"


def _commit(commit: str) -> str:
    return f"`{commit[:10]}{'+changes' if commit.endswith('+changes') else ''}`" if commit else UNKNOWN
