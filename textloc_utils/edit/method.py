"""The methods that edit a picture, and one edit by any of them."""

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

#: What the plain target adds to a pair's seed; sets of pairs count their seeds up from below.
RESEED = 1_000_000
LOCALIZED, ALL, P2P = "localized", "all layers", "Prompt-to-Prompt"
P2P_OWN, FLOW = "Prompt-to-Prompt, own maps", "FlowEdit"
SAME_SEED, PLAIN = "same seed", "plain target"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to draw the source's picture with the target's text.

    ``patch``: draw the source prompt with this site patched from the target's row. ``maps``: draw the target prompt
    with the source's attention maps up to this share of the steps, and up to the share ``own_maps`` with those by which
    the picture attends to itself. ``flow_from``: carry the source's picture over by FlowEdit, from this step on. None
    of them: draw the target prompt, from the noise of the pair's seed plus ``reseed``.
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
                raise TextlocError(f"maps are replaced up to a share of the steps from 0 to 1, got {share}")


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
    """Prompt-to-Prompt with the picture's own maps copied, too: those for half as many steps, as its code has it."""
    return Method(name=P2P_OWN, maps=share, own_maps=share / 2)


def flow_edit(start: int) -> Method:
    """FlowEdit from step ``start`` on, see :func:`.carried_over`."""
    return Method(name=FLOW, flow_from=start)


def same_seed() -> Method:
    """The target prompt from the source's noise."""
    return Method(name=SAME_SEED)


def plain_target() -> Method:
    """The target prompt from noise of its own."""
    return Method(name=PLAIN, reseed=RESEED)


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
    subject: Experiment | Model | DiffusionPipeline,
    pair: Pair,
    method: Method,
    *,
    noise: torch.Tensor | None = None,
    picture: np.ndarray | None = None,
    before: bool = True,
    **settings,
) -> Edit:
    """Draw the source's picture with the target's text; ``settings`` are those of ``experiment.Experiment``.

    Everything is one batch from one noise, that of the pair's seed or ``noise`` (1, ...) of an inversion; rows are the
    source (where ``before`` or the method asks for it), the target (where the method reads it) and the edited one.
    FlowEdit starts from the source's ``picture``, uint8 (H, W, 3), and draws it first where it is not given.
    Raises TextlocError for layers out of range, before anything is drawn.
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
    if method.maps is not None:  # a second stage enlarges an edit under the source prompt, as it does a patched row
        options["stage2_prompts"] = [pair.source] * len(rows)
    with contextlib.ExitStack() as stack:
        if noise is not None and not method.reseed:  # what starts from other noise needs none of this
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
    """Counts the bytes of the keys and values that a patch copies in a layer, the most of all layers."""
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
