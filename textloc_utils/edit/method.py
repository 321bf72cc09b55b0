"""The methods that edit a picture, and the function that makes one edit with any of them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from textloc_utils.edit.flowedit import carried_over
from textloc_utils.edit.inversion import UNGUIDED
from textloc_utils.edit.prompt_to_prompt import SHARE, replaced_maps
from textloc_utils.experiment import Experiment
from textloc_utils.models import Model, as_indices, check_layers
from textloc_utils.prompts import Pair
from textloc_utils.settings import TextlocError
from textloc_utils.sites import Site, every_layer

#: The plain target adds this to a pair's seed. The seeds of sets of pairs are smaller.
RESEED = 1_000_000
LOCALIZED, ALL, P2P = "localized", "all layers", "Prompt-to-Prompt"
P2P_OWN, FLOW = "Prompt-to-Prompt, own maps", "FlowEdit"
SAME_SEED, PLAIN = "same seed", "plain target"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to draw the source's picture with the target's text.

    With ``patch``, the source prompt is drawn, and this site is patched from the target's row. With ``maps``, the
    target prompt is drawn with the source's attention maps up to this share of the steps, and with the source's
    self-attention maps up to the share ``own_maps``. With ``flow_from``, FlowEdit changes the source's picture, from
    this step on. Without any of these, the target prompt is drawn from the noise of the pair's seed plus ``reseed``.
    """

    name: str
    patch: Site | None = None
    maps: float | None = None
    own_maps: float = 0.0
    flow_from: int | None = None
    reseed: int = 0

    def __post_init__(self):
        for share in (self.maps or 0.0, self.own_maps):
            if not 0 <= share <= 1:
                raise TextlocError(f"the share of the steps with replaced maps must be from 0 to 1, got {share}")


def localized(layers: Sequence[int], start: int = 0) -> Method:
    """The localized layers read the target's text from step ``start`` on."""
    return Method(name=LOCALIZED, patch=Site(layers=as_indices(layers, "layers"), start=start))


def all_layers(model: Model, start: int = 0) -> Method:
    """All text layers read the target's text from step ``start`` on."""
    return Method(name=ALL, patch=replace(every_layer(model), start=start))


def prompt_to_prompt(share: float = SHARE) -> Method:
    """Prompt-to-Prompt in its published form, see :class:`_ReplacedMaps`."""
    return Method(name=P2P, maps=share)


def prompt_to_prompt_own(share: float) -> Method:
    """Prompt-to-Prompt that also copies the picture's self-attention maps, for half as many steps, as in its code."""
    return Method(name=P2P_OWN, maps=share, own_maps=share / 2)


def flow_edit(start: int) -> Method:
    """FlowEdit from step ``start`` on, see :func:`.carried_over`."""
    return Method(name=FLOW, flow_from=start)


def same_seed() -> Method:
    """The target prompt, drawn from the source's noise."""
    return Method(name=SAME_SEED)


def plain_target() -> Method:
    """The target prompt, drawn from other noise than the source."""
    return Method(name=PLAIN, reseed=RESEED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """An edited picture and its cost.

    ``before`` (the source prompt's picture; None if it was not requested) and ``after`` are uint8 (H, W, 3).
    ``row_evaluations`` is the number of rows on which the denoiser was evaluated. ``seconds`` is wall time.
    ``cache_bytes`` is the largest amount of memory that the method needed at one time, in addition to the pipeline's
    own: for the copies of one layer's keys and values, or for the attention maps of both rows.
    """

    before: np.ndarray | None
    after: np.ndarray
    row_evaluations: int
    seconds: float
    cache_bytes: int


@torch.no_grad()
def edit(
    subject: Experiment | Model | DiffusionPipeline,
    pair: Pair,
    method: Method,
    *,
    noise: torch.Tensor | None = None,
    picture: np.ndarray | None = None,
    before: bool = True,
    **settings,
) -> Edit:
    """Draw the source's picture with the target's text. ``settings`` are those of ``experiment.Experiment``.

    Everything is drawn in one batch from one noise: that of the pair's seed, or the ``noise`` (1, ...) of an inversion.
    The rows are the source (if ``before`` or the method needs it), the target (if the method reads it), and the edited
    picture. FlowEdit starts from the source's ``picture``, uint8 (H, W, 3). If it is not given, it is drawn first.
    Raises TextlocError for layers out of range before anything is drawn.
    """
    run = Experiment.of(subject, **settings)
    model = run.model
    if method.flow_from is not None:
        return _flow_edited(run, pair, method.flow_from, picture)
    if method.patch is not None:
        check_layers(model, method.patch.layers)
    source, target = (pair.source, pair.seed), (pair.target, pair.seed + method.reseed)
    rows = [source] if before or method.maps is not None else []
    patches = []
    if method.patch is None:
        rows.append(target)
    else:
        rows += [target, source]
        patches = method.patch.patches(len(rows) - 1, len(rows) - 2)
    asked, seeds = zip(*rows, strict=True)
    options = {"patches": patches, "batch_size": len(rows)}
    if method.maps is not None:  # a second stage enlarges an edit with the source prompt, as it does for a patched row
        options["stage2_prompts"] = [pair.source] * len(rows)
    with contextlib.ExitStack() as stack:
        if noise is not None and not method.reseed:  # not needed for a method that starts from other noise
            stack.enter_context(model.first_order())
            options |= {"noise": noise.expand(len(rows), *noise.shape[1:]), "guidance": UNGUIDED}
            options |= {"negative_prompt": None}
        if method.maps is not None:
            until, own = round(method.maps * run.steps), round(method.own_maps * run.steps)
            held: Any = stack.enter_context(replaced_maps(model, pair, len(rows), until, own))
        else:
            held = stack.enter_context(_copies(model, method.patch))
        made = run.draw(asked, seeds, **options)
    return Edit(
        before=made.images[0] if before else None,
        after=made.images[-1],
        row_evaluations=made.row_evaluations,
        seconds=made.seconds,
        cache_bytes=held.bytes,
    )


def _flow_edited(run: Experiment, pair: Pair, start: int, picture: np.ndarray | None) -> Edit:
    rows, seconds = 0, 0.0
    if picture is None:
        made = run.draw([pair.source], [pair.seed])
        picture, rows, seconds = made.images[0], made.row_evaluations, made.seconds
    known = run.model.encode(picture[None])
    with carried_over(run.model, known, start, run.steps, pair.seed) as noise:
        made = run.draw([pair.source, pair.target], [pair.seed] * 2, noise=noise, batch_size=2)
    return Edit(
        before=picture,
        after=made.images[-1],
        row_evaluations=rows + made.row_evaluations,
        seconds=seconds + made.seconds,
        cache_bytes=2 * known.numel() * known.element_size(),
    )


@contextlib.contextmanager
def _copies(model: Model, site: Site | None) -> Iterator[SimpleNamespace]:
    """Count the bytes of the keys and values that a patch copies in one layer. Keeps the maximum over all layers."""
    held, handles = SimpleNamespace(bytes=0), []
    try:
        for layer in site.layers if site is not None else ():
            of_layer: dict[object, int] = {}

            def count(module, args, output, of_layer=of_layer):
                of_layer[module] = output.numel() * output.element_size()
                held.bytes = max(held.bytes, sum(of_layer.values()))

            for name in {model.layers[layer].key, model.layers[layer].value}:
                handles.append(model.denoiser.get_submodule(name).register_forward_hook(count))
        yield held
    finally:
        for handle in handles:
            handle.remove()
