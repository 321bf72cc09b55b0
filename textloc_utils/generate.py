"""Sampling of pictures in batches, with a seed per picture, that counts the denoiser's evaluations."""

import base64
import contextlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from textloc_utils import files
from textloc_utils.models import Model, as_indices, as_integer, call_rows, check_prompts, join_rows, read_call
from textloc_utils.patching import Patch, patched
from textloc_utils.settings import TextlocError

#: Default number of rows per pipeline call.
BATCH_MINIATURE, BATCH_FULL_SIZE = 32, 4
INDEX = "images.json"  #: file in a folder of pictures: prompt, seed and reading of each picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """Pictures and their cost.

    ``images`` is uint8 (n, height, width, 3), one per prompt. ``row_evaluations`` is the number of rows on which the
    denoiser was evaluated (guidance counts twice). This cost does not depend on the machine. ``seconds`` is wall time.
    A second stage that enlarges the pictures has another denoiser, which is not counted.
    """

    images: np.ndarray
    row_evaluations: int
    seconds: float


class RowCounter:
    """Counts the denoiser's calls and the rows evaluated in them."""

    def __init__(self, bar: tqdm | None = None):
        self.calls, self.rows, self._bar = 0, 0, bar

    def __call__(self, denoiser, args, kwargs) -> None:
        self.calls += 1
        self.rows += read_call(denoiser, args, kwargs).rows
        if self._bar is not None:
            self._bar.update()

    def check(self, denoiser, args, output) -> None:
        """Raise TextlocError if the output of the last counted call is not finite."""
        if not _is_finite(output):
            raise TextlocError(
                f"the denoiser's output of call {self.calls} is not finite; choose another dtype or other weights"
            )


def step_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded with a tuple of integers (seed, step, process...), for training that can be resumed."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def _is_finite(output) -> bool:
    """Whether all tensors of a module's output are finite. It is a tensor, a list, a tuple, a dict or a named tuple."""
    if isinstance(output, torch.Tensor):
        return bool(output.isfinite().all())
    parts = output.values() if isinstance(output, Mapping) else output
    return not isinstance(parts, Iterable) or isinstance(parts, str) or all(map(_is_finite, parts))


@contextlib.contextmanager
def counted(model: Model, bar: tqdm | None = None) -> Iterator[RowCounter]:
    """Count the model's denoiser evaluations inside the block.

    Raises TextlocError at the first output that is not finite, because the result could still look like a picture.
    """
    counter = RowCounter(bar)
    with (
        model.denoiser.register_forward_pre_hook(counter, with_kwargs=True),
        model.denoiser.register_forward_hook(counter.check),
    ):
        yield counter


def rows_per_call(model: Model) -> int:
    """The default number of prompts of a pipeline call."""
    return BATCH_MINIATURE if model.spec.miniature else BATCH_FULL_SIZE


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise TextlocError for a seed that a generator does not accept."""
    if any(not 0 <= s < 2**63 for s in seeds):
        raise TextlocError("a seed is out of range; allowed: 0 to 2^63 - 1")


def generate(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    patches: Sequence[Patch] = (),
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int | None = None,
    noise: torch.Tensor | None = None,
    stage2_prompts: Sequence[str] | None = None,
    progress: bool = False,
    **pipeline_arguments,
) -> Generation:
    """Sample one picture per prompt.

    The noise of each row comes from a CPU generator with the row's seed. So it depends neither on the other rows of the
    batch nor on the device, and rows with the same seed have the same noise. ``steps`` and ``guidance`` default to the
    model's own values. With ``patches`` (rows are the prompts, see ``patching``) all prompts are one batch. ``noise``
    replaces the noise of the seeds. It has one row per prompt, in the shape that the denoiser takes. Further keyword
    arguments are passed to the pipeline.

    Raises TextlocError if there is not one seed per prompt, if a prompt is longer than a tokenizer allows, or if a
    patch cannot be applied.

    With a second stage (DeepFloyd IF), every picture is enlarged with its own prompt, or with that of
    ``stage2_prompts``. The own prompt of a patched row is the source prompt. Patches are active in stage I only.
    """
    model = Model.of(model)
    alone = isinstance(prompts, str) or not isinstance(prompts, Iterable)
    prompts, seeds = [] if alone else list(prompts), as_indices(seeds, "seeds")
    if not prompts or any(not isinstance(p, str) for p in prompts):
        raise TextlocError("generate needs a list of at least one prompt, each a string")
    if len(prompts) != len(seeds):
        raise TextlocError(f"{len(prompts)} prompts came with {len(seeds)} seeds; give one seed per prompt")
    check_seeds(seeds)
    check_prompts(model, [*prompts, *([negative_prompt] if negative_prompt else [])])
    steps = model.spec.steps if steps is None else as_integer(steps, "steps")
    guidance = model.spec.guidance if guidance is None else guidance
    if steps < 1:
        raise TextlocError(f"steps must be at least 1, got {steps}")
    if not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise TextlocError(f"guidance must be a finite number, got {guidance!r}")
    batch_size = rows_per_call(model) if batch_size is None else as_integer(batch_size, "batch size")
    if batch_size < 1:
        raise TextlocError(f"batch size must be at least 1, got {batch_size}")
    if noise is not None and len(noise) != len(prompts):
        raise TextlocError(f"{len(prompts)} prompts came with {len(noise)} rows of noise; give one row per prompt")
    if patches:
        batch_size = len(prompts)

    starts = range(0, len(prompts), batch_size)
    images = []
    began = time.perf_counter()
    with (
        tqdm(total=len(starts) * steps, unit="step", desc=model.spec.name, disable=not progress) as bar,
        counted(model, bar) as counter,
        patched(model, patches, len(prompts)),
    ):
        for start in starts:
            part = slice(start, start + batch_size)
            arguments = model.call_arguments(
                prompts[part], steps=steps, guidance=guidance, negative_prompt=negative_prompt, **pipeline_arguments
            )
            generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[part]]
            with model.starting_from(None if noise is None else noise[part], guidance) as begin:
                second = None if stage2_prompts is None else {"prompt": list(stage2_prompts[part])}
                images.append(_sample(model, arguments | begin, generators, second))
    seconds = time.perf_counter() - began
    return Generation(images=np.concatenate(images), row_evaluations=counter.rows, seconds=seconds)


def _sample(model: Model, arguments: dict, generators: list[torch.Generator], second: dict | None = None) -> np.ndarray:
    """Make one pipeline call: uint8 (rows, height, width, 3). ``second`` overrides arguments of the second stage."""
    if model.stage2 is None:
        pictures = model.pictures(model.pipe(**arguments, generator=generators, output_type="np"))
    else:
        small = model.pipe(**arguments, generator=generators, output_type="pt").images.clamp(-1, 1)
        enlarge = model.stage2_arguments(arguments | (second or {}))
        pictures = model.stage2(**enlarge, image=small, generator=generators, output_type="np").images
    for row, picture in enumerate(pictures):
        if not np.isfinite(picture).all():
            raise TextlocError(
                f"picture {row} of {len(pictures)} is not finite (seed {generators[row].initial_seed()}); "
                "choose another dtype or other weights"
            )
    return np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


class EnoughError(Exception):
    """Ends a pipeline call whose remaining steps are not needed."""


def conditions(model: Model, prompts: Sequence[str], *, batch_size: int = 64) -> dict:
    """The denoiser's inputs for prompts, except the picture and the timestep: embeddings, pooled texts, sizes.

    Returns a dict of keyword arguments. Its tensors have one row per prompt, without guidance. ``models.take_rows``
    selects rows of it. Nothing is drawn: the pipeline of each batch stops at its first denoiser call.
    """
    prompts, parts = list(prompts), []
    check_prompts(model, prompts)
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        arguments = model.call_arguments(part, steps=model.spec.steps, guidance=1.0, negative_prompt=None)
        parts.append(first_call(model, **arguments))
    return join_rows(parts)


def first_call(model: Model, take: Callable = call_rows, **arguments):
    """Call the pipeline with ``arguments`` until its first denoiser call, and return what ``take`` makes of that call.

    The pipeline's call ends there, and this denoiser call is not counted. Returns None if there was no call.
    """
    found = []

    def stop(*call):
        found.append(take(*call))
        raise EnoughError

    # This hook runs before all others, so counters do not count the call.
    stopping = model.denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    with stopping, contextlib.suppress(EnoughError):
        model.pipe(**{"generator": torch.Generator("cpu").manual_seed(0)} | arguments)
    return found[0] if found else None


def encode(picture: np.ndarray) -> str:
    """Encode a picture, uint8 (H, W, 3), without loss as a text that a stored row can hold."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def decode(text: str) -> np.ndarray:
    """Return the picture that :func:`encode` turned into a text."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def save(
    folder: Path,
    images: Sequence[np.ndarray] | np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    read: Sequence[str],
    *,
    more: Sequence[dict] | None = None,
) -> list[dict]:
    """Write pictures as PNG files, and ``images.json``: a list of {prompt, seed, file, ocr}, which is returned.

    ``more`` holds further entries for each row. Every file is first written elsewhere and then renamed. While pictures
    are replaced, ``images.json`` is an empty list. So it never names a picture that is missing or wrong.
    """
    rows: list[dict] = []
    more = [{}] * len(prompts) if more is None else more
    with files.whole_files(folder, INDEX) as aside:
        for image, prompt, seed, text, other in zip(images, prompts, seeds, read, more, strict=True):
            rows.append({"prompt": prompt, "seed": seed, "file": f"{len(rows):03d}.png", "ocr": text, **other})
            Image.fromarray(image).save(aside / rows[-1]["file"])
        files.write_json(aside / INDEX, rows)
        if (folder / INDEX).exists():
            files.write_json(folder / INDEX, [])
    return rows
