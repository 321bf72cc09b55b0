"""The one patching engine: rows of a batch take the text keys and values of other rows (the paper's section 3).

**Row convention.** Rows count the prompts of one pipeline call, 0 to n - 1. Without guidance the denoiser sees
those n rows; with classifier-free guidance it sees 2n, ``[negative x n, prompt x n]``, and a patch then copies in
both halves: row ``target`` over row ``source``, and row n + ``target`` over row n + ``source``. Pipelines that call
the denoiser once for the prompts and once for the negatives (FLUX with ``true_cfg_scale``) show it n rows each time.

**Steps.** Step s of a run is its (s + 1)-th noise level: the count rises whenever the timestep falls and starts
again at 0 whenever the timestep rises, so that one block serves several pipeline calls. Repeated calls at one
timestep (FLUX's negatives, the doubled timestep of PNDM) belong to one step.

Source and target run together, so nothing is stored and the target's text stream is always that of the same step.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from textloc_utils.models import Model, TextLayer, check_layers, read_call
from textloc_utils.settings import TextlocError

TENSORS = ("k", "v", "kv")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Row ``source`` takes the text keys and values of row ``target`` in ``layers``.

    Rows count the pipeline call's prompts (see the module's row convention); ``layers`` are indices of the model's
    text layers. The patch holds at steps ``start`` <= s < ``stop`` (None: to the end), in the attention heads named
    in ``heads`` (None: all), for ``tensors`` "k", "v" or "kv". ``pooled`` copies the pooled text embedding as well,
    a site of its own that has neither layers nor heads.
    """

    source: int
    target: int
    layers: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None
    heads: tuple[int, ...] | None = None
    tensors: str = "kv"
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """One gather and scatter at one module: all patches that share steps and heads there."""

    start: int
    stop: int | None
    heads: tuple[int, ...] | None
    sources: list[int]
    targets: list[int]

    def holds(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)


@contextlib.contextmanager
def patched(model: Model, patches: Iterable[Patch], rows: int) -> Iterator[None]:
    """Run the model's pipeline on ``rows`` prompts with ``patches`` in force inside the block.

    The block works by forward hooks and leaves the pipeline as it was, also after an exception. Raises
    TextlocError before anything runs for rows, layers, heads or tensors out of range, a target row that is itself
    a source, two patches that write different targets to one place, or pooled patches on a model without a pooled
    embedding; and inside the block for a batch that holds neither ``rows`` nor 2 x ``rows`` rows.
    """
    patches = tuple(patches)
    check_patches(model, patches, rows)
    clock = Clock()
    indices: dict = {}
    handles = []
    try:
        for name, (copies, layer) in _sites(model, patches).items():
            hook = _CopyRows(copies, layer, rows, clock, indices)
            handles.append(model.denoiser.get_submodule(name).register_forward_hook(hook))
        if handles:
            timed = any(p.start or p.stop is not None for p in patches)
            hook = clock.pre_hook(timed)
            handles.append(model.denoiser.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_patches(model: Model, patches: Iterable[Patch], rows: int) -> None:
    """Raise TextlocError for patches that cannot be carried out on ``rows`` prompts of this model."""
    patches = tuple(patches)
    sources = {p.source for p in patches}
    for p in patches:
        for row in (p.source, p.target):
            if not 0 <= row < rows:
                raise TextlocError(f"row {row} is out of range; this batch's rows are 0 to {rows - 1}")
        if p.target in sources:
            raise TextlocError(f"row {p.target} is both a target and a source; a target row must stay unpatched")
        check_layers(model, p.layers)
        if p.tensors not in TENSORS:
            raise TextlocError(f"unknown tensors {p.tensors!r}; allowed: {', '.join(TENSORS)}")
        if p.start < 0 or (p.stop is not None and p.stop < p.start):
            raise TextlocError(f"steps {p.start} to {p.stop} are no range; allowed: 0 <= start <= stop")
        for layer in p.layers:
            last = model.layers[layer].heads - 1
            if any(not 0 <= h <= last for h in p.heads or ()):
                raise TextlocError(f"heads {p.heads} are out of range; layer {layer} has heads 0 to {last}")
            if getattr(model.denoiser.get_submodule(model.layers[layer].name), "fused_projections", False):
                raise TextlocError("the pipeline's projections are fused; call unfuse_qkv_projections() first")
        if p.pooled and model.pooled_site is None:
            raise TextlocError(f"{model.spec.name} has no pooled text embedding to patch")
    _check_conflicts(patches)


def _check_conflicts(patches: tuple[Patch, ...]) -> None:
    by_source = defaultdict(list)
    for p in patches:
        for other in by_source[p.source]:
            apart_in_steps = (p.stop is not None and p.stop <= other.start) or (
                other.stop is not None and other.stop <= p.start
            )
            same_place = (
                set(p.layers) & set(other.layers)
                and set(p.tensors) & set(other.tensors)
                and (p.heads is None or other.heads is None or set(p.heads) & set(other.heads))
            )
            if p.target != other.target and not apart_in_steps and (same_place or (p.pooled and other.pooled)):
                raise TextlocError(f"row {p.source} is patched from rows {other.target} and {p.target} at one place")
        by_source[p.source].append(p)


def _sites(model: Model, patches: tuple[Patch, ...]) -> dict[str, tuple[list[_Copy], TextLayer | None]]:
    """Dotted module name to its copies and its layer (None: the pooled site)."""
    grouped = defaultdict(lambda: defaultdict(list))
    layer_at = {}
    for p in patches:
        places = [(model.layers[i], letter) for i in sorted(set(p.layers)) for letter in p.tensors]
        for layer, letter in places:
            name = layer.key if letter == "k" else layer.value
            layer_at[name] = layer
            grouped[name][p.start, p.stop, p.heads].append((p.source, p.target))
        if p.pooled:
            layer_at[model.pooled_site] = None
            grouped[model.pooled_site][p.start, p.stop, None].append((p.source, p.target))
    sites = {}
    for name, groups in grouped.items():
        copies = []
        for (start, stop, heads), pairs in groups.items():
            sources, targets = map(list, zip(*pairs, strict=True))
            copies.append(_Copy(start=start, stop=stop, heads=heads, sources=sources, targets=targets))
        sites[name] = copies, layer_at[name]
    return sites


class Clock:
    """The step and the number of text tokens of the denoiser call under way."""

    def __init__(self):
        self.step, self.tokens, self._timestep = 0, 0, None

    def pre_hook(self, timed: bool):
        def before(denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
            call = read_call(denoiser, args, kwargs)
            self.tokens = call.tokens
            if timed:  # reading a timestep waits for the GPU, so only patches with a step range do it
                self._advance(float(torch.as_tensor(call.timestep).max()))

        return before

    def _advance(self, timestep: float) -> None:
        if self._timestep is None or timestep > self._timestep:
            self.step = 0
        elif timestep < self._timestep:
            self.step += 1
        self._timestep = timestep


class _CopyRows:
    """Forward hook: returns the output with target rows copied over source rows; the original is left alone."""

    def __init__(self, copies: list[_Copy], layer: TextLayer | None, rows: int, clock: Clock, indices: dict):
        self.copies, self.layer, self.rows, self.clock, self.indices = copies, layer, rows, clock, indices

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        copies = [c for c in self.copies if c.holds(self.clock.step)]
        if not copies:
            return None
        batch = output.shape[0]
        if batch not in (self.rows, 2 * self.rows):
            raise TextlocError(
                f"patches were made for {self.rows} rows, but the denoiser got {batch}; "
                f"allowed: {self.rows} (no guidance) or {2 * self.rows} (guidance)"
            )
        patched_output = output.clone()
        into, from_ = patched_output, output
        if self.layer is not None and self.layer.context is not None:
            into, from_ = into[:, : self.clock.tokens], from_[:, : self.clock.tokens]
        for copy in copies:
            source = self._index(tuple(copy.sources), batch, output.device)
            target = self._index(tuple(copy.targets), batch, output.device)
            if copy.heads is None:
                into[source] = from_[target]
            else:
                heads = torch.tensor(copy.heads, device=output.device)
                split = (self.layer.heads, -1)
                picked = from_.unflatten(-1, split)[target[:, None], :, heads]
                into.unflatten(-1, split)[source[:, None], :, heads] = picked  # unflatten gives a view
        return patched_output

    def _index(self, rows: tuple[int, ...], batch: int, device: torch.device) -> torch.Tensor:
        # Shared by all hooks of a block: one copy to the device per set of rows.
        key = rows, batch, device
        if key not in self.indices:
            halves = range(0, batch, self.rows)
            self.indices[key] = torch.tensor([half + row for half in halves for row in rows], device=device)
        return self.indices[key]
