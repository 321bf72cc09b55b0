"""Replace the text in a picture and keep the picture: by the localized layers, and by what else is there to do it.

An edit knows a source prompt, whose picture is to stay, and a target prompt, the same with another quoted text. Each
``Method`` draws the edited picture in one batch with the rows that it needs, from one noise:

- **localized** and **all layers**: the source prompt, its text keys and values copied from the target's row
  (``patching``) in some or all layers, from a step on;
- **Prompt-to-Prompt** (Hertz et al. 2023): the target prompt; in every text layer, up to a share of the steps, the
  picture attends to the words that both prompts share as the source's row does;
- **same seed**: the target prompt from the source's noise;
- **plain target**: the target prompt from other noise. It spells as well as the model can and knows nothing of the
  source's picture: the upper bound of the one, and what keeping nothing looks like.

A given picture (a file) is first inverted: the noise is sought from which the source prompt draws it.
"""

import contextlib
import copy
import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from textloc_utils import metrics, ocr
from textloc_utils.experiment import Experiment, digest_of
from textloc_utils.generate import check_seeds, generate
from textloc_utils.miniatures import scenes
from textloc_utils.models import Model, ModelSpec, check_layers, check_prompts, image_and_text
from textloc_utils.patching import Clock
from textloc_utils.prompts import LETTERS, Pair, make_pairs, quoted_text, replace_text
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, every_layer

ROWS = 1  #: part of a stored unit's key: raised whenever its rows change
#: Of the steps; the value that Prompt-to-Prompt's authors use for replaced words.
SHARE = 0.8
#: Settings along a trade-off curve: shares of the steps after which a patch holds, or up to which maps are replaced.
STARTS, SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: What the plain target adds to a pair's seed; sets of pairs count their seeds up from below.
RESEED = 1_000_000
#: Added to the seed of the pairs that are edited: the layers were found on pairs of the seed itself.
HELD_OUT = 1_000
#: Fixed-point passes per step of an inversion, and how far each but the first goes towards its outcome.
PASSES, DAMPED = 5, 0.6
#: Guidance of an inversion, and of an edit that starts from one.
UNGUIDED = 1.0
#: SSIM outside the text below which the picture counts as lost.
KEPT = 0.7
LOCALIZED, ALL, P2P = "localized", "all layers", "Prompt-to-Prompt"
SAME_SEED, PLAIN, ROUND_TRIP = "same seed", "plain target", "round trip"


# --- methods --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to draw the source's picture with the target's text.

    ``patch``: draw the source prompt with this site patched from the target's row. ``maps``: draw the target prompt
    with the source's attention maps up to this share of the steps. Neither: draw the target prompt, from the noise
    of the pair's seed plus ``reseed``.
    """

    name: str
    patch: Site | None = None
    maps: float | None = None
    reseed: int = 0

    def __post_init__(self):
        if self.maps is not None and not 0 <= self.maps <= 1:
            raise TextlocError(f"maps are replaced up to a share of the steps from 0 to 1, got {self.maps}")


def localized(layers: Sequence[int], start: int = 0) -> Method:
    """The localized layers read the target's text from step ``start`` on."""
    return Method(name=LOCALIZED, patch=Site(layers=tuple(layers), start=start))


def all_layers(model: Model, start: int = 0) -> Method:
    """All text layers read the target's text from step ``start`` on."""
    return Method(name=ALL, patch=replace(every_layer(model), start=start))


def prompt_to_prompt(share: float = SHARE) -> Method:
    """Prompt-to-Prompt in its published form, see :class:`_ReplacedMaps`."""
    return Method(name=P2P, maps=share)


def same_seed() -> Method:
    """The target prompt from the source's noise."""
    return Method(name=SAME_SEED)


def plain_target() -> Method:
    """The target prompt from noise of its own."""
    return Method(name=PLAIN, reseed=RESEED)


def methods(model: Model, layers: Sequence[int]) -> list[Method]:
    """Localized editing and all that it is compared with."""
    return [localized(layers), all_layers(model), prompt_to_prompt(), same_seed(), plain_target()]


def curve(model: Model, layers: Sequence[int], steps: int | None = None) -> list[Method]:
    """The methods that have a dial, at the settings of STARTS and SHARES."""
    steps = model.spec.steps if steps is None else steps
    starts = sorted({round(share * steps) for share in STARTS})
    late = [localized(layers, start) for start in starts] + [all_layers(model, start) for start in starts]
    return late + [prompt_to_prompt(share) for share in SHARES]


# --- one edit -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """An edited picture and its cost.

    ``before`` (the source prompt's picture; None where it was not asked for) and ``after`` are uint8 (H, W, 3).
    ``row_evaluations`` counts the rows that the denoiser was evaluated on, ``seconds`` is wall time.
    ``cache_bytes`` is the most that the method held at a time besides what the pipeline itself does: the copies of
    one layer's keys and values, or the attention maps of both rows.
    """

    before: np.ndarray | None
    after: np.ndarray
    row_evaluations: int
    seconds: float
    cache_bytes: int


@torch.no_grad()
def edit(
    model: Model,
    pair: Pair,
    method: Method,
    *,
    steps: int | None = None,
    noise: torch.Tensor | None = None,
    before: bool = True,
) -> Edit:
    """Draw the source's picture with the target's text.

    Everything is one batch from one noise, that of the pair's seed or ``noise`` (1, ...) of an inversion; rows are the
    source (where ``before`` or the method asks for it), the target (where the method reads it) and the edited one.
    Raises TextlocError for layers out of range, before anything is drawn.
    """
    steps = model.spec.steps if steps is None else steps
    if method.patch is not None:
        check_layers(model, method.patch.layers)
    source, target = (pair.source, pair.seed), (pair.target, pair.seed + method.reseed)
    rows = [source] if before or method.maps is not None else []
    patches = []
    if method.patch is None:
        rows.append(target)
    else:
        rows += [target, source]
        patches = [method.patch.patch(len(rows) - 1, len(rows) - 2)]
    asked, seeds = zip(*rows, strict=True)
    options = {"patches": patches, "steps": steps, "batch_size": len(rows)}
    if method.maps is not None:  # a second stage enlarges an edit under the source prompt, as it does a patched row
        options["stage2_prompts"] = [pair.source] * len(rows)
    with contextlib.ExitStack() as stack:
        if noise is not None and not method.reseed:  # what starts from other noise needs none of this
            stack.enter_context(model.first_order())
            options |= {"noise": noise.expand(len(rows), *noise.shape[1:]), "guidance": UNGUIDED}
        if method.maps is not None:
            held = stack.enter_context(replaced_maps(model, pair, len(rows), round(method.maps * steps)))
        else:
            held = stack.enter_context(_copies(model, method.patch))
        made = generate(model, asked, seeds, **options)
    return Edit(
        before=made.images[0] if before else None,
        after=made.images[-1],
        row_evaluations=made.row_evaluations,
        seconds=made.seconds,
        cache_bytes=held.bytes,
    )


@contextlib.contextmanager
def _copies(model: Model, site: Site | None) -> Iterator[SimpleNamespace]:
    """Counts the bytes of the keys and values that a patch copies in a layer, the most of all layers."""
    held, handles = SimpleNamespace(bytes=0), []
    try:
        for layer in site.layers if site is not None else ():
            of_layer = {}

            def count(module, args, output, of_layer=of_layer):
                of_layer[module] = output.numel() * output.element_size()
                held.bytes = max(held.bytes, sum(of_layer.values()))

            for name in {model.layers[layer].key, model.layers[layer].value}:
                handles.append(model.denoiser.get_submodule(name).register_forward_hook(count))
        yield held
    finally:
        for handle in handles:
            handle.remove()


# --- Prompt-to-Prompt -----------------------------------------------------------------------------------------


def shared_columns(model: Model, source: str, target: str) -> tuple[list[int], list[int]]:
    """The places of the tokens that two prompts share: column ``sources[i]`` of the source's text and ``targets[i]``
    of the target's hold the same token.

    Shared are the common beginning and the common end of the two prompts, and their padding.
    """
    sources, targets, start = [], [], 0
    for (n, a), (m, b) in zip(model.text_columns(source), model.text_columns(target), strict=True):
        first = next((i for i in range(min(n, m)) if a[i] != b[i]), min(n, m))
        last = next((i for i in range(min(n, m) - first) if a[n - 1 - i] != b[m - 1 - i]), min(n, m) - first)
        padding = len(a) - max(n, m)
        sources += [start + i for i in (*range(first), *range(n - last, n + padding))]
        targets += [start + i for i in (*range(first), *range(m - last, m + padding))]
        start += len(a)
    return sources, targets


@contextlib.contextmanager
def replaced_maps(model: Model, pair: Pair, rows: int, until: int) -> Iterator["_ReplacedMaps"]:
    """Prompt-to-Prompt on a batch of ``rows`` prompts, the first the pair's source, the last its target, in the steps
    before ``until``. Leaves the pipeline as it was."""
    clock, handles = Clock(), []
    maps = _ReplacedMaps(model, shared_columns(model, pair.source, pair.target), rows, until, clock)
    try:
        handles.append(model.denoiser.register_forward_pre_hook(clock.pre_hook(True), with_kwargs=True))
        for layer in model.layers:
            attention = model.denoiser.get_submodule(layer.name)
            handles.append(attention.register_forward_pre_hook(functools.partial(maps.enter, layer)))
            handles.append(attention.register_forward_hook(maps.leave, always_call=True))
        with maps:
            yield maps
    finally:
        for handle in handles:
            handle.remove()


class _ReplacedMaps(TorchFunctionMode):
    """Gives one row of a batch another row's attention maps, wherever a text layer computes attention.

    As published: the picture's queries see the shared tokens as in the source's run, tokens of their own as they
    are, in the prompts' half of a guided batch, and nothing is normalised again. (The authors' code also copies the
    maps of coarse self-attention layers for some of the steps; their paper does not, and neither does this.) In joint
    attention these are the text's columns of the picture's rows.

    Stock attention hands queries, keys and values to torch's fused attention, which tells no maps. The mode sees this
    call in all of diffusers' processors; the maps of the two rows alone are computed beside it, and what they change
    in the output is added. So equal prompts change no bit.
    """

    def __init__(self, model: Model, columns: tuple[list[int], list[int]], rows: int, until: int, clock: Clock):
        super().__init__()
        self.model, self.columns, self.rows, self.until, self.clock = model, columns, rows, until, clock
        self.layer, self.bytes = None, 0

    def enter(self, layer, module, args) -> None:
        self.layer = layer if self.clock.step < self.until else None

    def leave(self, module, args, output) -> None:
        self.layer = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if self.layer is None or function is not F.scaled_dot_product_attention:
            return output
        return self._replace(output, *args, **(kwargs or {}))

    def _replace(self, output, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **other):
        """``output``, (B, heads, queries, d), with the last prompt's row as replaced maps would have it."""
        batch, _, queries, width = query.shape
        if batch not in (self.rows, 2 * self.rows):
            raise TextlocError(f"maps were asked for {self.rows} rows, but the denoiser got {batch}")
        tokens, (sources, targets) = self.clock.tokens, self.columns
        pictures, texts = image_and_text(self.model.denoiser, self.layer, queries, key.shape[2], tokens)
        rows = [batch - self.rows, batch - 1]
        scores = query[rows][:, :, pictures] @ key[rows].transpose(-1, -2) * (scale or 1 / math.sqrt(width))
        if attn_mask is not None:
            hidden = attn_mask if attn_mask.dtype != torch.bool else torch.where(attn_mask, 0.0, -torch.inf)
            scores = scores + hidden.expand(batch, -1, -1, -1)[rows][:, :, pictures if hidden.shape[2] > 1 else 0 : 1]
        maps = scores.softmax(-1)[..., texts]
        self.bytes = max(self.bytes, 2 * scores.numel() * scores.element_size())
        change = (maps[0][..., sources] - maps[1][..., targets]) @ value[-1][:, texts][:, targets]
        output = output.clone()
        output[-1, :, pictures] += change
        return output


# --- given pictures -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """The noise (n, ...) from which prompts draw given pictures, and what it cost to find."""

    noise: torch.Tensor
    row_evaluations: int
    seconds: float


@torch.no_grad()
def invert(
    model: Model, pictures: np.ndarray, prompts: Sequence[str], *, passes: int = PASSES, steps: int | None = None
) -> Inverted:
    """The noise from which ``prompts`` draw ``pictures``, uint8 (n, H, W, 3) of the model's size.

    The sampler's steps are taken back from the last to the first: DDIM's for U-Nets, Euler's for flow matching. A
    step is linear in the picture and in the denoiser's answer to it, x' = c x + d f(x); taking it back solves
    x = (x' - d f(x)) / c by ``passes`` damped fixed-point passes from x', the first of which is plain DDIM inversion.
    Guidance is left out, here and in :func:`edit` from here on: it carries the inverted noise far from what the model
    was trained on, and its steps are harder to take back. A model of two stages inverts its first.
    """
    if passes < 1:
        raise TextlocError(f"an inversion needs at least one pass per step, got {passes}")
    check_picture(model.spec, *pictures.shape[1:3])
    known, first = model.encode(pictures), replace(model, stage2=None)
    with model.first_order(), _taken_back(model.pipe.scheduler, passes) as run:
        options = {"noise": known.to(model.denoiser.dtype), "guidance": UNGUIDED, "batch_size": len(known)}
        made = generate(first, prompts, [0] * len(known), steps=steps, **options)
    return Inverted(noise=run.noise, row_evaluations=made.row_evaluations, seconds=made.seconds)


@contextlib.contextmanager
def _taken_back(scheduler, passes: int) -> Iterator[SimpleNamespace]:
    """Inside the block the scheduler walks from the finished picture to its noise; ``run.noise`` is where it got."""
    run = SimpleNamespace(calls=0, noise=None, known=None, steps=[])
    forward = copy.deepcopy(scheduler)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args, **kwargs):
        forward.set_timesteps(*args, **kwargs)
        device = forward.timesteps.device
        picture, answer = torch.eye(2, dtype=torch.float64, device=device).reshape(2, 2, 1, 1, 1)
        # The coefficients of each step: what it makes of a picture alone, and of an answer alone.
        run.steps = [forward.step(answer, t, picture, return_dict=False)[0].flatten() for t in forward.timesteps]
        run.calls = 0
        scheduler.timesteps = forward.timesteps.flip(0).repeat_interleave(passes)
        scheduler.num_inference_steps = len(scheduler.timesteps)

    @functools.wraps(scheduler.step)
    def step(answer, timestep, sample, *args, return_dict=True, **kwargs):
        level, again = divmod(run.calls, passes)
        if not again:
            run.known = sample
        run.calls += 1
        of_picture, of_answer = run.steps[-1 - level].to(sample.dtype)
        found = (run.known - of_answer * answer[:, : sample.shape[1]]) / of_picture
        run.noise = sample + DAMPED * (found - sample) if again else found
        return SimpleNamespace(prev_sample=run.noise) if return_dict else (run.noise,)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    try:
        yield run
    finally:
        del scheduler.set_timesteps, scheduler.step


def rendered(pair: Pair) -> np.ndarray:
    """A picture that shows the pair's source prompt and that no model drew, uint8 (H, W, 3)."""
    dy = scenes.HEIGHTS[pair.seed % len(scenes.HEIGHTS)]
    scene = scenes.Scene(wall=pair.wall, sign=pair.sign, shape=pair.shape, text=pair.source_text, dy=dy)
    return scenes.render(scene)


# --- tables ---------------------------------------------------------------------------------------------------


def held_out_pairs(n: int, seed: int = 42) -> list[Pair]:
    """``n`` pairs to edit, others than those of this seed on which layers are searched."""
    return make_pairs(n, seed + HELD_OUT)


@torch.no_grad()
def compare_pair(
    model: Model, pair: Pair, methods: Sequence[Method], *, steps: int | None = None, given: bool = False
) -> tuple[np.ndarray, list[dict]]:
    """Edit one pair's picture by each method, each in a batch of its own; the pictures and one row for each.

    The picture is the source prompt's own, or with ``given`` a rendered one (:func:`rendered`), which is inverted
    first; then the first row, of the method "round trip", is what the source prompt draws from the inverted noise.
    Returns the pictures, uint8 (1 + rows, H, W, 3), the source first, and rows with the columns model, seed,
    source_text, target_text, method, start (step), share (of the steps), given, source_read, read (by OCR), f1, cer,
    exact, target_score, source_score (``metrics``), ssim, psnr, mse to the source's picture, whole and
    ``_outside`` the text box (PSNR capped at 60 dB), row_evaluations, seconds and cache_bytes of the edit, and
    inversion_rows, inversion_seconds.
    """
    noise, cost, drawn = None, {"inversion_rows": 0, "inversion_seconds": 0.0}, []
    if given:
        source = rendered(pair)
        found = invert(model, source[None], [pair.source], steps=steps)
        noise = found.noise
        cost = {"inversion_rows": found.row_evaluations, "inversion_seconds": found.seconds}
        methods = [Method(name=ROUND_TRIP), *methods]
    else:
        source = generate(model, [pair.source], [pair.seed], steps=steps).images[0]
    for method in methods:
        mine = replace(pair, target=pair.source) if method.name == ROUND_TRIP else pair
        drawn.append(edit(model, mine, method, steps=steps, noise=noise, before=False))
    pictures = np.stack([source, *(made.after for made in drawn)])
    source_read, *read = ocr.read(pictures)
    rows = [
        {
            "model": model.spec.name,
            "seed": pair.seed,
            "source_text": pair.source_text,
            "target_text": pair.target_text,
            "method": method.name,
            "start": method.patch.start if method.patch is not None else 0,
            "share": 0.0 if method.maps is None else method.maps,
            "given": given,
            "source_read": source_read,
            "read": text,
            **_text_scores(text, pair),
            "row_evaluations": made.row_evaluations,
            "seconds": made.seconds,
            "cache_bytes": made.cache_bytes,
            **cost,
        }
        for method, made, text in zip(methods, drawn, read, strict=True)
    ]
    for row, scores in zip(rows, picture_scores(model, pictures[1:], source), strict=True):
        row |= scores
    return pictures, rows


def _text_scores(read: str, pair: Pair) -> dict[str, float]:
    return {
        "f1": metrics.character_scores(read, pair.target_text)[2],
        "cer": metrics.character_error_rate(read, pair.target_text),
        "exact": metrics.exact_match(read, pair.target_text),
        "target_score": metrics.text_score(read, pair.target_text),
        "source_score": metrics.text_score(read, pair.source_text),
    }


def picture_scores(model: Model, pictures: np.ndarray, source: np.ndarray) -> list[dict[str, float]]:
    """How much of a source picture (H, W, 3) each of the pictures (n, H, W, 3) keeps, whole and outside the text box.

    Keys ssim, psnr (capped at 60 dB) and mse, each also with ``_outside``.
    """
    plain = np.broadcast_to(source, pictures.shape)
    parts = {"": None, "_outside": metrics.outside(model.spec.text_box, *source.shape[:2])}
    columns = {}
    for end, mask in parts.items():
        columns[f"ssim{end}"] = metrics.ssim(pictures, plain, mask)
        columns[f"psnr{end}"] = metrics.psnr(pictures, plain, mask, cap=metrics.PSNR_CAP)
        columns[f"mse{end}"] = metrics.mse(pictures, plain, mask)
    return pd.DataFrame(columns).to_dict("records")


def compare(
    experiment: Experiment, pairs: Sequence[Pair], methods: Sequence[Method], *, given: bool = False
) -> pd.DataFrame:
    """The rows of :func:`compare_pair` for all pairs, each pair a unit of the store as in ``sweeps.table``."""

    def compute(pair: Pair) -> list[dict]:
        return compare_pair(experiment.model, pair, methods, steps=experiment.steps, given=given)[1]

    return experiment.units("edit", pairs, _key(methods, given), compute)


def _key(methods: Sequence[Method], given: bool) -> dict:
    about = {"edit_rows": ROWS, "methods": [asdict(method) for method in methods], "given": given}
    return about | ({"passes": [PASSES, DAMPED]} if given else {})


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that the book shows: which methods, and whether on given pictures."""

    methods: Callable[[Model, tuple[int, ...], int | None], list[Method]]
    given: bool = False


TABLES = {
    "methods": Table(methods=lambda model, layers, steps: methods(model, layers)),
    "curve": Table(methods=curve),
    "given": Table(methods=lambda model, layers, steps: methods(model, layers), given=True),
}


def table(experiment: Experiment, name: str, layers: Sequence[int], pairs: Sequence[Pair]) -> pd.DataFrame:
    """One of TABLES for the localized ``layers``, published as ``results/edit_MODEL_NAME.csv``.

    See ``experiment.Experiment.table``. Raises TextlocError for an unknown table or layers out of range.
    """
    if name not in TABLES:
        raise TextlocError(f"unknown table {name!r}; allowed: {', '.join(TABLES)}")
    layers = tuple(sorted(layers))
    if not layers:
        raise TextlocError("localized editing needs at least one layer")
    check_layers(experiment.model, layers)
    chosen, given = TABLES[name].methods(experiment.model, layers, experiment.steps), TABLES[name].given
    inputs = _key(chosen, given) | {"pairs": digest_of(pairs)}
    made = functools.partial(compare, experiment, pairs, chosen, given=given)
    return experiment.table(f"edit_{experiment.name}_{name}", inputs, made)


SCORES = ("f1", "cer", "exact", "ssim", "psnr", "mse", "ssim_outside", "psnr_outside", "mse_outside")


def summarise(table: pd.DataFrame, scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """Mean and 95 % interval of each score per method and setting, in the table's order.

    Columns method, start, share, n, for each score its mean under its name, ``_low`` and ``_high``, and the means of
    row_evaluations, seconds and the largest cache_bytes.
    """
    by = ["method", "start", "share"]
    costs = table.groupby(by).agg({"row_evaluations": "mean", "seconds": "mean", "cache_bytes": "max"})
    return metrics.summarise(table, by, scores).join(costs, on=by)


def differences(table: pd.DataFrame, scores: Sequence[str] = SCORES) -> pd.DataFrame:
    """Localized editing less each other method, pair by pair: columns method, score, mean, low, high, n."""
    rows = []
    by_pair = {score: table.pivot(index="seed", columns="method", values=score).astype(float) for score in scores}
    for method in dict.fromkeys(table.method):
        if method not in (LOCALIZED, ROUND_TRIP):
            for score, values in by_pair.items():
                interval = metrics.paired_difference(values[LOCALIZED], values[method])
                rows.append({"method": method, "score": score, **asdict(interval)})
    return pd.DataFrame(rows)


# --- one picture, as a user edits it --------------------------------------------------------------------------


def check_text(spec: ModelSpec, prompt: str, text: str) -> Pair:
    """The pair of prompts that replaces a prompt's quoted text by ``text``, of seed 0.

    Raises TextlocError for a prompt without one quoted text, and for a new text that is empty, too long, the old one,
    or not made of what the model can draw.
    """
    old = quoted_text(prompt)
    if not text.strip():
        raise TextlocError("the new text is empty; give at least one letter")
    if wrong := [c for c in text if c in '"\u201c\u201d' or not c.isprintable()]:
        raise TextlocError(f"the new text cannot hold {wrong[0]!r}; a prompt's quotes end with it")
    if spec.miniature:
        if wrong := [c for c in text if c not in LETTERS]:
            raise TextlocError(f"{spec.name} cannot draw {wrong[0]!r}; its letters are the capitals A to Z")
        most = scenes.LONG if "banner" in prompt else scenes.MAX_LETTERS
        if len(text) > most:
            raise TextlocError(f"the new text {text!r} is too long; this sign holds {most} letters")
    if text == old:
        raise TextlocError(f"the new text is the old one, {old!r}; there is nothing to edit")
    about = {"wall": "", "sign": "", "shape": "", "seed": 0}
    return Pair(source=prompt, target=replace_text(prompt, text), source_text=old, target_text=text, **about)


def check_picture(spec: ModelSpec, height: int, width: int) -> None:
    """Raise TextlocError for a picture that is not of the model's size."""
    if (height, width) != (spec.height, spec.width):
        raise TextlocError(f"a picture for {spec.name} is {spec.width}x{spec.height} pixels, got {width}x{height}")


def open_picture(path: str | Path, spec: ModelSpec) -> np.ndarray:
    """A picture file as uint8 (H, W, 3); TextlocError where it cannot be read or is not of the model's size."""
    try:
        with Image.open(path) as file:
            check_picture(spec, file.height, file.width)
            return np.array(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture that Pillow knows"
        raise TextlocError(f"cannot read a picture from {path}: {reason}") from None


def failure(before: str, after: str, pair: Pair, ssim_outside: float) -> str | None:
    """What is wrong with an edit, in one line; None where it says the new text and the picture was kept.

    ``before`` and ``after`` are what is read from the two pictures.
    """
    if ssim_outside < KEPT:
        return f"the picture was lost: outside the text its SSIM to the old one is {ssim_outside:.2f}, below {KEPT}"
    if metrics.exact_match(after, pair.target_text):
        return None
    if not after:
        return f"no text is read, not {pair.target_text}"
    if metrics.exact_match(after, before):
        return f"nothing changed: the picture still says {after}"
    return f"the picture says {after}, not {pair.target_text}"


def report(
    model: Model, pair: Pair, method: Method, picture: np.ndarray | None = None, *, steps: int | None = None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Edit the picture of the pair's seed, or a given ``picture`` uint8 (H, W, 3); the pictures before and after, and
    a report on them.

    The report's keys: source, target, seed, method, layers, start, before and after (read by OCR), failure
    (:func:`failure`), those of :func:`picture_scores`, row_evaluations and seconds, inversion included; for a given
    picture also round_trip, the scores of what the source prompt draws from the inverted noise.
    """
    found = None
    check_seeds([pair.seed])
    check_prompts(model, [pair.source, pair.target])
    check_layers(model, method.patch.layers if method.patch is not None else ())
    last = (steps or model.spec.steps) - 1
    if method.patch is not None and not 0 <= method.patch.start <= last:
        raise TextlocError(f"step {method.patch.start} is out of range; this model's steps are 0 to {last}")
    if picture is not None:
        found = invert(model, picture[None], [pair.source], steps=steps)
    made = edit(model, pair, method, steps=steps, noise=found and found.noise)
    before = made.before if picture is None else picture
    read = ocr.read([before, made.after])
    scores, round_trip = picture_scores(model, np.stack([made.after, made.before]), before)
    about = {
        "source": pair.source,
        "target": pair.target,
        "seed": pair.seed,
        "method": method.name,
        "layers": list(method.patch.layers if method.patch is not None else ()),
        "start": method.patch.start if method.patch is not None else 0,
        "before": read[0],
        "after": read[1],
        "failure": failure(*read, pair, scores["ssim_outside"]),
        **scores,
        "row_evaluations": made.row_evaluations + (found.row_evaluations if found else 0),
        "seconds": made.seconds + (found.seconds if found else 0.0),
    }
    return before, made.after, about | ({"round_trip": round_trip} if found else {})


def side_by_side(before: np.ndarray, after: np.ndarray, gap: int = 4) -> np.ndarray:
    """Before, after and their absolute difference in one picture, uint8 (H, 3 W + 2 gap, 3)."""
    difference = np.abs(after.astype(int) - before).astype(np.uint8)
    space = np.full((before.shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([before, space, after, space, difference], axis=1)


def save(folder: Path, before: np.ndarray, after: np.ndarray, about: dict) -> None:
    """Write before.png, after.png, edit.png (both and their difference side by side) and edit.json, the report.

    Every file is written aside and renamed, the report last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"before.png": before, "after.png": after, "edit.png": side_by_side(before, after)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as aside:
        for name, picture in pictures.items():
            Image.fromarray(picture).save(Path(aside, name))
        Path(aside, "edit.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        for name in (*pictures, "edit.json"):
            os.replace(Path(aside, name), folder / name)
