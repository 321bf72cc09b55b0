"""Options that several commands share, and the allowed values of options.

A value is checked while the command line is read. So nothing is loaded if a value is invalid.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from textloc_utils.settings import PRESETS, TextlocError, check_writable

#: Largest seed. Experiments also use the seeds after it, and the largest seed of a generator is 2^63 - 1.
MOST_SEED = 2**62
#: No scheduler here was trained with more noise levels.
MOST_STEPS = 1000
#: Larger numbers of pictures, pairs or words are typing errors.
MOST = 100_000
#: Names of ``prompts.SETS``, without the import.
SETS = ("book", "simple", "creative")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are TextlocErrors, so they are one line like all other errors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str):
        """Raise argparse's message as an error. argparse itself would print it with the whole usage."""
        raise TextlocError(f"{message}; see {self.prog} --help")


def check_arguments(argv: Sequence[str]) -> None:
    """Raise TextlocError for an argument that is not text, and for an option whose value is two dashes.

    An argument is not text if it has bytes that are not UTF-8, or a zero byte. argparse would ignore two dashes.
    """
    for i, argument in enumerate(argv, 1):
        if re.fullmatch(r"--?[\w-]+=--", argument):
            raise TextlocError(f"{argument.removesuffix('=--')} needs a value, got '--'")
        if "\0" in argument or not argument.isascii() and any("\ud800" <= c <= "\udfff" for c in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise TextlocError(f"argument {i} is not UTF-8 text: {shown!r}")


# --- kinds of values ----------------------------------------------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """The argument type of a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        # int() also accepts digits of other scripts, underscores, and numbers of any length.
        if re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text) and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed, got {text!r}")

    return read


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """The argument type of a finite number from ``low`` to ``high``. With ``above``, ``low`` itself is not allowed."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and not (above and value == low):
            return value
        since = "above" if above else "from"
        raise argparse.ArgumentTypeError(f"a number {since} {low:g} to {high:g} is needed, got {text!r}")

    return read


def path(text: str) -> str:
    """The argument type of a file or folder: a name that the system allows."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is needed, got an empty one")
    if any(len(os.fsencode(part)) > 255 for part in Path(text).parts) or len(os.fsencode(text)) > 4000:
        raise argparse.ArgumentTypeError(f"the name is too long: {text[:40]!r}...")
    return text


def folder(text: str) -> Path:
    """The argument type of a folder to write to. The folder is not created yet."""
    try:
        return check_writable(path(text))
    except TextlocError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def file(text: str) -> Path:
    """The argument type of a file to write. The file is not created yet."""
    folder(os.path.dirname(path(text)) or ".")
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return Path(text)


def device(text: str) -> str:
    """The argument type of a device's name. Whether the device is present is checked when it is needed."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text) is None:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; allowed: auto, cpu, cuda, cuda:0 ..., mps")
    return text


def size(text: str) -> int:
    """The argument type of a picture's height or width."""
    value = whole(64, 4096)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"a multiple of 16 is needed, got {text!r}")
    return value


steps = whole(1, MOST_STEPS)
seed = whole(0, MOST_SEED)
count = whole(1, MOST)
layer = whole(0, 9999)
guidance = number(0, 100)


# --- shared options -----------------------------------------------------------------------------------------------


def add_place(command: argparse.ArgumentParser) -> None:
    """Add the option for the device."""
    command.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, mps (default: auto)")


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the model, its folder or repository, the variant of its weights, and the device."""
    command.add_argument("model", metavar="MODEL", help="a name from `textloc models`")
    command.add_argument(
        "--model-path",
        type=path,
        metavar="DIR",
        help="a local folder, or another repository with a model of the same family",
    )
    command.add_argument("--variant", type=path, metavar="NAME", help="variant of the weight files, such as fp16")
    add_place(command)


def add_drawing(command: argparse.ArgumentParser) -> None:
    """Add the settings of drawing: steps, guidance, negative prompt, size."""
    command.add_argument("--steps", type=steps, help="denoising steps (default: the model's own)")
    command.add_argument("--guidance", type=guidance, help="guidance scale (default: the model's own)")
    command.add_argument("--negative-prompt", metavar="PROMPT", help="description of what the picture should not show")
    command.add_argument("--height", type=size, help="height of the pictures in pixels (default: the model's own)")
    command.add_argument("--width", type=size, help="width of the pictures in pixels (default: the model's own)")


def add_seed(
    command: argparse.ArgumentParser, what: str = "seed for words, colours and noise", default: int = 42
) -> None:
    """Add the seed."""
    command.add_argument("--seed", type=seed, default=default, help=f"{what} (default: {default})")


def add_noises(command: argparse.ArgumentParser, default: int | None = 1) -> None:
    """Add the number of noises from which each prompt is drawn."""
    said = "the preset's" if default is None else default
    command.add_argument(
        "--noises",
        type=whole(1, 100),
        default=default,
        metavar="N",
        help=f"number of noises per prompt (default: {said})",
    )


def add_layers(command: argparse.ArgumentParser) -> None:
    """Add the localized layers, by number."""
    command.add_argument(
        "--layers",
        type=layer,
        nargs="+",
        metavar="L",
        help="numbers of the localized layers (default: those of the published search)",
    )


def add_preset(command: argparse.ArgumentParser, what: str) -> None:
    """Add the preset, which sets the amount of work."""
    command.add_argument("--preset", default="book", choices=PRESETS, help=f"{what} (default: book)")


def add_publish(command: argparse.ArgumentParser, what: str = "the table") -> None:
    """Add the option that replaces the book's tables."""
    command.add_argument("--publish", action="store_true", help=f"write {what} to the data folder, for the book")


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """Add the option for JSON output, which other programs can read."""
    command.add_argument("--json", action="store_true", help=f"print {what}")


# --- first steps of the commands ----------------------------------------------------------------------------------


def spec_of(args):
    """The model's spec with the values of the command's options, after all checks. Nothing is loaded."""
    from textloc_utils import models

    spec = models.spec(args.model)
    check_model_path(args.model_path, spec)
    given: dict[str, Any] = {name: getattr(args, name, None) for name in ("steps", "guidance", "height", "width")}
    given = {name: value for name, value in given.items() if value is not None}
    if spec.miniature and {"height", "width"} & given.keys():
        raise TextlocError(
            f"{spec.name} draws only pictures of {spec.width}x{spec.height} pixels; omit --height and --width"
        )
    chosen = replace(spec, **given)
    if getattr(args, "negative_prompt", None) and spec.miniature and chosen.guidance <= 1:
        raise TextlocError(f"a negative prompt needs a guidance above 1, got {chosen.guidance:g}")
    return chosen


def check_model_path(text: str | None, spec) -> None:
    """Raise TextlocError for a ``--model-path`` that is neither a folder nor the name of a hub repository."""
    from textloc_utils.models import check_no_file

    if text is None or Path(text).is_dir():
        return
    check_no_file(text, spec)
    repository = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None
    if spec.miniature or not repository or Path(text).parent.is_dir():
        raise TextlocError(f"there is no folder {text}; --model-path takes a saved pipeline's folder or OWNER/NAME")


def loaded(args, spec=None):
    """Load the model of a command, with the spec of :func:`spec_of`."""
    from textloc_utils import models

    spec = spec_of(args) if spec is None else spec
    options = {"variant": args.variant} if getattr(args, "variant", None) else {}
    model = models.load(args.model, device=process_device(args.device), model_path=args.model_path, **options)
    drawing = {name: getattr(spec, name) for name in ("steps", "guidance", "height", "width")}
    asked = {name: value for name, value in drawing.items() if getattr(args, name, None) is not None}
    if getattr(args, "negative_prompt", None) and model.evaluations(spec.guidance) < 2:
        raise TextlocError(f"{spec.name} reads no negative prompt at a guidance of {spec.guidance:g}")
    return replace(model, spec=replace(model.spec, **asked)) if asked else model


def experiment(args, model, **settings):
    """The experiment of a command on its model, with the values of its options and a preset's ``settings``."""
    from textloc_utils.experiment import Experiment

    asked = {name: getattr(args, name, None) for name in ("steps", "guidance", "negative_prompt", "publish")}
    return Experiment.of(model, progress=progress(), **settings | {k: v for k, v in asked.items() if v is not None})


def progress() -> bool:
    """Whether to show a progress bar: only on a terminal, and only in the first of several processes."""
    return sys.stderr.isatty() and rank() == 0


def rank() -> int:
    """The rank of this process among those that were launched together."""
    return int(os.environ.get("RANK", 0))


def process_device(name: str) -> str:
    """The device of this process. Each process of a launch uses the GPU with the number of its own rank."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and name in ("auto", "cuda") and torch.cuda.is_available() else name
