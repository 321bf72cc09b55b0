"""Paths, run presets, and the error class that users see as a single line.

Paths come from the package's own location or from an environment variable, never from the working
directory. So papermill, nbval and the command line use the same paths.
"""

import datetime
import logging
import os
import shutil
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Folder with paper tables, miniatures and results: the clone's folder, or the one in ``TEXTLOC_DATA``."""
    return Path(os.environ.get("TEXTLOC_DATA", ROOT / "data"))


def results_dir() -> Path:
    """Folder of the result store: ``TEXTLOC_RESULTS``, else in the data folder, else (no clone) in the user's cache."""
    if told := os.environ.get("TEXTLOC_RESULTS"):
        return Path(told)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return data_dir() / "results" if data_dir().is_dir() else cache / "textloc" / "results"


#: How long one of several processes waits for the others. The others may have most of the work to do.
PATIENCE = datetime.timedelta(days=1)
#: A disk with less free space than this, in bytes, counts as full. A few pictures and their report need this much.
SPARE = 8 * 2**20


class TextlocError(Exception):
    """A mistake of the caller. The message is one line that says what is wrong and what is allowed."""


def first_line(error: Exception) -> str:
    """The first line of another library's error message, shortened, or the error's class if the message is empty."""
    return textwrap.shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200, placeholder=" ...")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much work a notebook or a command does. The code path is the same at every size."""

    name: str
    pairs: int
    sweep_pairs: int  # pairs of the sweep over all layers, whose table comes with the package
    edits: int  # pairs that each method edits, if the prompts name everything
    words: int  # test words or pairs on which a rate is measured (there are fewer toxic words)
    noises: int = 1  # number of noises from which each edited or guarded prompt is drawn
    sets: tuple[str, ...] = ("book",)  # names in ``prompts.SETS``, in equal parts, for the pairs of localization
    steps: int | None = None  # None: the model's own number of steps


#: ``paper`` has the paper's sizes. Layers are searched on 100 prompts of SimpleBench and 100 of CreativeBench. 300
#: prompts are edited, each from 4 noises. Every toxic word is also drawn from 4 noises. The paper has 400 toxic words.
PRESETS = {
    "smoke": Preset(name="smoke", pairs=4, sweep_pairs=4, edits=4, words=8, steps=6),
    "book": Preset(name="book", pairs=48, sweep_pairs=100, edits=100, words=200),
    "paper": Preset(
        name="paper", pairs=200, sweep_pairs=200, edits=300, words=400, noises=4, sets=("simple", "creative")
    ),
}


def preset(name: str) -> Preset:
    """Look up a preset by name."""
    try:
        return PRESETS[name]
    except KeyError:
        raise TextlocError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}") from None


def check_writable(folder: str | os.PathLike, *, advice: str = "choose another --out") -> Path:
    """Return the folder as a path if it can be written or created. Raises TextlocError otherwise.

    Nothing is created yet. The error message ends with ``advice``.
    """
    folder = Path(folder).absolute()
    try:
        link = next((p for p in (folder, *folder.parents) if p.is_symlink() and not p.exists()), None)
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        longest = os.pathconf(nearest, "PC_NAME_MAX")
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        raise TextlocError(f"cannot write to {folder}: {error.strerror}; {advice}") from None
    reason = None
    if link is not None:
        reason = f"{link} is a link to nothing"
    elif not nearest.is_dir():
        reason = f"{nearest} is not a folder"
    elif any(len(os.fsencode(part)) > longest for part in folder.parts):
        reason = f"a name in it is longer than {longest} bytes"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"no permission in {nearest}"
    elif free < SPARE:
        reason = f"the disk of {nearest} is full"
    if reason:
        raise TextlocError(f"cannot write to {folder}: {reason}; {advice}")
    return folder


def quiet_libraries() -> None:
    """Silence the information lines and progress bars that diffusers and transformers print on loading."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|huggingface_hub")
