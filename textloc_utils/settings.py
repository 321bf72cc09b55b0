"""Paths, run presets and the one error class that reaches users as a single line.

Paths come from the package's own location or from an environment variable, never from the working
directory, so that papermill, nbval and the command line agree on them.
"""

import datetime
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Folder with prompts, paper tables, miniatures and results (``TEXTLOC_DATA`` overrides it)."""
    return Path(os.environ.get("TEXTLOC_DATA", ROOT / "data"))


def results_dir() -> Path:
    """Folder of the result store (``TEXTLOC_RESULTS`` overrides it)."""
    return Path(os.environ.get("TEXTLOC_RESULTS", data_dir() / "results"))


#: How long a process of several waits for the others, which may have most of the work to do.
PATIENCE = datetime.timedelta(days=1)


class TextlocError(Exception):
    """A mistake of the caller's: the message is one line that says what is wrong and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much work a notebook or a command does; the code path is the same at every size."""

    name: str
    pairs: int
    sweep_pairs: int  # of the sweep over all layers, which comes with the package
    words: int
    steps: int | None  # None: the model's own number of steps


PRESETS = {
    "smoke": Preset(name="smoke", pairs=4, sweep_pairs=4, words=8, steps=6),
    "book": Preset(name="book", pairs=48, sweep_pairs=100, words=200, steps=None),
    "paper": Preset(name="paper", pairs=100, sweep_pairs=100, words=200, steps=None),
}


def preset(name: str) -> Preset:
    """Look a preset up by name."""
    try:
        return PRESETS[name]
    except KeyError:
        raise TextlocError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}") from None


def check_writable(folder: str | os.PathLike) -> Path:
    """The folder as a path, if it can be written or made; nothing is made yet. Raises TextlocError otherwise."""
    folder = Path(folder).absolute()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        raise TextlocError(f"cannot write to {folder}: {nearest} is not a folder; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise TextlocError(f"cannot write to {folder}: no permission in {nearest}; choose another --out")
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
