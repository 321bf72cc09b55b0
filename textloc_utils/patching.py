"""The patching engine: rows of a batch take the text keys and values of other rows (the paper's section 3).

**Row convention.** Rows are the prompts of one pipeline call, numbered from 0 to n - 1. Without guidance the denoiser
gets these n rows. With classifier-free guidance it gets 2n rows: ``[negative x n, prompt x n]`` (in Z-Image, the
prompts come first). A patch then copies in both halves: row ``target`` over row ``source``, and row n + ``target`` over
row n + ``source``. Some pipelines call the denoiser once for the prompts and once for the negatives (FLUX with
``true_cfg_scale``). Each of these calls has n rows.

**Steps.** Step 0 of a run is its first noise level, step 1 is the second, and so on. The count rises whenever the
noise level falls. It starts again at 0 whenever the noise level rises, so one block can serve several pipeline calls.
Repeated calls at one timestep (FLUX's negatives, the doubled timestep of PNDM) belong to one step.

**Check.** A block knows which modules must take part in each call of the denoiser. It raises an error if one of them
did not. So a patch that had no effect is always noticed, for example on a pipeline with fused projections, with caches
or after compilation.

Source and target run together in one batch. So nothing is stored, and both are always at the same step.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from textloc_utils.models import (
    DenoiserCall,
    Model,
    TextLayer,
    as_indices,
    as_integer,
    check_hookable,
    check_layers,
    read_call,
)
from textloc_utils.settings import TextlocError

TENSORS = ("k", "v", "kv")
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Row ``source`` takes the text keys and values of row ``target`` in ``layers``.

    Rows are the prompts of the pipeline call (see the module's row convention). ``layers`` are indices of the model's
    text layers: one, several, or "all". The patch is active at steps ``start`` <= s < ``stop`` (None: to the end).
    ``heads`` are the attention heads to patch: one, several, or all of them (None or "all"). ``tensors`` is "k", "v" or
    "kv". ``tokens`` are the text positions to patch, given in the same way as ``heads``. ``Model.text_columns`` says
    which token is at which position. ``pooled`` also copies the pooled text embedding. It is a separate site, which has
    neither layers nor heads.

    >>> Patch(source=0, target=1, layers=3).layers
    (3,)
    """

    source: int
    target: int
    layers: Sequence[int] | int | str = ()
    start: int = 0
    stop: int | None = None
    heads: tuple[int, ...] | None = None
    tensors: str = "kv"
    pooled: bool = False
    tokens: tuple[int, ...] | None = None

    def __post_init__(self):
        layers = ALL if self._all(self.layers) else as_indices(self.layers, "layers")
        for name in ("heads", "tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None or self._all(value) else as_indices(value, name))
        object.__setattr__(self, "layers", layers)
        for name in ("source", "target", "start", "stop"):
            value = getattr(self, name)
            if value is not None or name != "stop":
                object.__setattr__(self, name, as_integer(value, name))

    @staticmethod
    def _all(value) -> bool:
        return isinstance(value, str) and value == ALL

    def indices(self, model: Model) -> tuple[int, ...]:
        """Return the layers as ascending indices. Raises TextlocError for a layer that the model does not have."""
        layers = range(len(model.layers)) if isinstance(self.layers, str) else as_indices(self.layers, "layers")
        check_layers(model, layers)
        return tuple(sorted(set(layers)))


class Clock:
    """The step and the number of text tokens of the current denoiser call."""

    def __init__(self):
        self.step, self.tokens, self._noise = 0, 0, None

    def advance(self, noise: float) -> int:
        """Take the noise level of a call, in any unit, and return the call's step."""
        if self._noise is None or noise > self._noise:
            self.step = 0
        elif noise < self._noise:
            self.step += 1
        self._noise = noise
        return self.step


class Fired:
    """What the hooks of a block did in each call of the denoiser.

    ``sites`` maps each site (dotted module name) to the step ranges, (start, stop or None), in which it must take
    part. The hooks of a site report that they took part with :meth:`note`. ``calls`` counts the denoiser's calls inside
    the block. At the end of each call, TextlocError is raised if a site had to take part and did not. :meth:`close` is
    called at the end of the block. It raises TextlocError if the denoiser was not called, or if no call of the denoiser
    fell into one of the step ranges.
    """

    def __init__(self, sites: Mapping[str, Iterable[tuple[int, int | None]]]):
        self.sites = {name: {(start, stop) for start, stop in ranges} for name, ranges in sites.items()}
        self.calls, self.clock = 0, Clock()
        self._timed = any(span != (0, None) for spans in self.sites.values() for span in spans)
        self._events: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._noise: list = []  # of each call; stays on the GPU until it is needed
        self._steps: list[int] = []

    def watch(self, denoiser: nn.Module) -> list:
        """Register the hooks that count and check the denoiser's calls. Returns their handles."""
        return [
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True),
            denoiser.register_forward_hook(self._end),
        ]

    def note(self, site: str, rows: int) -> None:
        """Record that a site's hook wrote this many rows of the batch in the current call."""
        self._events[site].append((self.calls - 1, rows))

    def due(self, site: str, step: int) -> bool:
        """Say whether a site must take part at a step."""
        return any(start <= step and (stop is None or step < stop) for start, stop in self.sites[site])

    @property
    def steps(self) -> dict[str, dict[int, int]]:
        """A dict from site to {step: rows written}, summed over the step's calls (two with separate negatives)."""
        per_call = self._call_steps()
        found: dict[str, dict[int, int]] = {}
        for site, events in self._events.items():
            found[site] = defaultdict(int)
            for call, rows in events:
                found[site][per_call[call]] += rows
        return {site: dict(steps) for site, steps in found.items()}

    def _call_steps(self) -> list[int]:
        if not self._timed:  # the clock has not run yet
            clock = Clock()
            return [clock.advance(float(noise)) for noise in self._noise]
        return self._steps

    def _begin(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        call = read_call(denoiser, args, kwargs)
        self.calls += 1
        self.clock.tokens = call.tokens
        self._noise.append(call.noise)
        if self._timed:
            self._steps.append(self.clock.advance(float(call.noise)))

    def _end(self, denoiser: nn.Module, args: tuple, output) -> None:
        now = self.calls - 1
        for site in self.sites:
            took_part = self._events[site] and self._events[site][-1][0] == now
            if self.due(site, self.clock.step) and not took_part:
                raise TextlocError(
                    f"{site} took no part in the denoiser's call {self.calls}, so a patch there would have no effect; "
                    f"undo what bypasses it (fused projections, an attention processor, a cache, compilation)"
                )

    def close(self) -> None:
        """Raise TextlocError unless every site took part when it had to."""
        wanted = {name: [(a, b) for a, b in spans if b is None or a < b] for name, spans in self.sites.items()}
        if any(wanted.values()) and not self.calls:
            raise TextlocError(
                "this model's denoiser was not called while the patches were active; call the pipeline inside the "
                "block (torch.compile must also be called inside the block, or not at all)"
            )
        for site, spans in wanted.items():
            for start, stop in spans:
                if self._timed and not any(start <= s and (stop is None or s < stop) for s in self._steps):
                    span = f"from {start} on" if stop is None else f"{start} to {stop - 1}"
                    steps = max(self._steps) + 1
                    raise TextlocError(f"{site} should be patched at steps {span}, but the run had {steps} steps")


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """One gather and scatter at one module, for all patches there that share steps, heads and tokens."""

    start: int
    stop: int | None
    heads: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    letter: str
    sources: list[int]
    targets: list[int]

    def holds(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)


@contextlib.contextmanager
def patched(model: Model, patches: Patch | Iterable[Patch], rows: int) -> Iterator[Fired]:
    """Apply ``patches`` to each call of the model's pipeline on ``rows`` prompts inside the block.

    The block uses forward hooks. At its end the pipeline is as it was before, also after an exception.

    Parameters
    ----------
    model
        A wrapped model, or a diffusers pipeline whose architecture is known.
    patches
        One patch or several.
    rows
        Number of prompts in each pipeline call inside the block. Copies (``num_images_per_prompt``) count, too.

    Yields
    ------
    Fired
        The record of what took part so far. ``fired.steps`` maps each patched module to {step: rows written}.

    Raises
    ------
    TextlocError
        Before anything runs: rows, layers, heads or tensors are out of range, a target row is also a source row, two
        patches write different targets to one place, or the model has no pooled embedding to patch.
        Inside the block: a batch has neither ``rows`` nor 2 x ``rows`` rows, a module took no part, or the lengths of
        the texts differ and the model does not allow this.
        At the end of the block: the denoiser was not called, the run never reached the steps to be patched, or the two
        halves of a batch were not guidance halves.

    Examples
    --------
    >>> prompts = ['A sign that says "HELLO".', 'A sign that says "WORLD".']
    >>> with patched(pipe, Patch(source=0, target=1, layers="all"), rows=2) as fired:
    ...     drawn = pipe(prompts, num_inference_steps=2, height=16, width=16)
    >>> fired.calls
    2
    """
    model = Model.of(model)
    patches = (patches,) if isinstance(patches, Patch) else tuple(patches)
    check_patches(model, patches, rows)
    sites = patch_sites(model, patches)
    fired = Fired({name: {(c.start, c.stop) for c in copies} for name, (copies, _) in sites.items()})
    batch = Batch(model, patches, rows, fired)
    handles = []
    try:
        if sites:
            handles += fired.watch(model.denoiser)
            handles += copy_hooks(model, sites, batch)
        yield fired
        fired.close()
        batch.close()
    finally:
        for handle in handles:
            handle.remove()


def copy_hooks(model: Model, sites: dict, batch: "Batch") -> list:
    """Register the hooks that copy rows at the sites of :func:`patch_sites`. Returns their handles."""
    handles = [model.denoiser.register_forward_pre_hook(batch.check, with_kwargs=True)]
    for name, (copies, layer) in sites.items():
        hook = _CopyRows(name, copies, layer, batch)
        handles.append(model.denoiser.get_submodule(name).register_forward_hook(hook))
    for layer, copies in _masked(model, sites).items():
        attention = model.denoiser.get_submodule(layer)
        handles.append(attention.register_forward_pre_hook(_CopyMasks(copies, batch), with_kwargs=True))
    return handles


def check_patches(model: Model, patches: Iterable[Patch], rows: int) -> None:
    """Raise TextlocError for patches that cannot be applied to ``rows`` prompts of this model."""
    patches = tuple(patches)
    if as_integer(rows, "rows") < 1:
        raise TextlocError(f"rows must be at least 1, got {rows}")
    for p in patches:
        if not isinstance(p, Patch):
            raise TextlocError(f"patches must be of class Patch, got {type(p).__name__}")
    check_hookable(model.denoiser)
    sources = {p.source for p in patches}
    for p in patches:
        for row in (p.source, p.target):
            if not 0 <= row < rows:
                raise TextlocError(f"row {row} is out of range; this batch's rows are 0 to {rows - 1}")
        if p.target in sources:
            raise TextlocError(f"row {p.target} is both a target and a source; a target row must stay unpatched")
        layers = p.indices(model)
        if p.tensors not in TENSORS:
            raise TextlocError(f"unknown tensors {p.tensors!r}; allowed: {', '.join(TENSORS)}")
        if p.start < 0 or (p.stop is not None and p.stop < p.start):
            raise TextlocError(f"steps {p.start} to {p.stop} are not a range; allowed: 0 <= start <= stop")
        for layer in layers:
            last = model.layers[layer].heads - 1
            if any(not 0 <= h <= last for h in p.heads or ()):
                raise TextlocError(f"heads {p.heads} are out of range; layer {layer} has heads 0 to {last}")
            if getattr(model.denoiser.get_submodule(model.layers[layer].name), "fused_projections", False):
                raise TextlocError("the pipeline's projections are fused; call unfuse_qkv_projections() first")
        if any(t < 0 for t in p.tokens or ()):
            raise TextlocError(f"tokens {p.tokens} are out of range; text positions count from 0")
        if p.pooled and model.pooled_site is None:
            raise TextlocError(f"{model.spec.name} has no pooled text embedding to patch")
    _check_conflicts(model, patches)


def _check_conflicts(model: Model, patches: tuple[Patch, ...]) -> None:
    by_source: dict[int, list[tuple[Patch, set[int]]]] = defaultdict(list)
    for p in patches:
        layers = set(p.indices(model))
        for other, others in by_source[p.source]:
            apart_in_steps = (p.stop is not None and p.stop <= other.start) or (
                other.stop is not None and other.stop <= p.start
            )
            same_place = (
                layers & others
                and set(p.tensors) & set(other.tensors)
                and (p.heads is None or other.heads is None or set(p.heads) & set(other.heads))
                and (p.tokens is None or other.tokens is None or set(p.tokens) & set(other.tokens))
            )
            if p.target != other.target and not apart_in_steps and (same_place or (p.pooled and other.pooled)):
                raise TextlocError(f"row {p.source} is patched from rows {other.target} and {p.target} at one place")
        by_source[p.source].append((p, layers))


def patch_sites(model: Model, patches: tuple[Patch, ...]) -> dict[str, tuple[list[_Copy], TextLayer | None]]:
    """Map each dotted module name to its copies and its layer (None for the pooled site)."""
    grouped: dict[str, dict[tuple, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    layer_at: dict[str, TextLayer | None] = {}
    for p in patches:
        places = [(model.layers[i], letter) for i in p.indices(model) for letter in p.tensors]
        for layer, letter in places:
            name = layer.key if letter == "k" else layer.value
            layer_at[name] = layer
            grouped[name][p.start, p.stop, p.heads, p.tokens, letter].append((p.source, p.target))
        if p.pooled and model.pooled_site is not None:
            layer_at[model.pooled_site] = None
            grouped[model.pooled_site][p.start, p.stop, None, None, ""].append((p.source, p.target))
    sites = {}
    for name, groups in grouped.items():
        copies = []
        for (start, stop, heads, tokens, letter), pairs in groups.items():
            sources, targets = map(list, zip(*pairs, strict=True))
            part = {"start": start, "stop": stop, "heads": heads, "tokens": tokens, "letter": letter}
            copies.append(_Copy(**part, sources=sources, targets=targets))
        sites[name] = copies, layer_at[name]
    return sites


def _masked(model: Model, sites: dict) -> dict[str, list[_Copy]]:
    """Map each attention module to the copies of its keys and values: the text masks are copied along with them."""
    found: dict[str, list[_Copy]] = defaultdict(list)
    for copies, layer in sites.values():
        if layer is not None:
            found[layer.name] += copies
    return found


class Batch:
    """Which rows of the denoiser's batch belong to which prompt."""

    def __init__(self, model: Model, patches: tuple[Patch, ...], rows: int, fired: Fired):
        self.rows, self.fired, self.row, self._doubled = rows, fired, model.architecture, model.doubled
        self.pairs = {(p.source, p.target) for p in patches if p.indices(model)}
        self._indices: dict = {}
        # Whether the halves of a doubled batch ever held different pictures. This flag stays on the GPU.
        self._unlike: torch.Tensor | None = None
        self._lengths: list[int] | torch.Tensor | None = None
        self.size = 0  # rows of the current call
        self.picture_tokens: int | None = None

    def check(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        """Check a batch before the denoiser runs: guidance halves must be two copies of the same noisy pictures."""
        call = read_call(denoiser, args, kwargs)
        self.size, self.picture_tokens = call.rows, call.picture_tokens
        self.check_size(call.rows)
        self._check_lengths(call)
        if call.rows == 2 * self.rows:
            halves = [torch.stack([*part]) for part in (call.picture[: self.rows], call.picture[self.rows :])]
            unlike = ((halves[0] != halves[1]) & ~halves[0].isnan()).any()
            self._unlike = unlike if self._unlike is None else self._unlike | unlike

    def _check_lengths(self, call: DenoiserCall) -> None:
        """Refuse texts of different lengths if the picture tokens' positions depend on the length."""
        told = call.lengths
        if told is None or told is self._lengths:
            return
        lengths: list[int] = told if isinstance(told, list) else told.tolist()
        self._lengths = told
        for half in range(0, call.rows, self.rows):
            for source, target in self.pairs:
                if lengths[half + source] != lengths[half + target]:
                    of = f" (in steps of {self.row.multiple} tokens)" if self.row.multiple > 1 else ""
                    raise TextlocError(
                        f"the prompts of rows {source} and {target} have different lengths{of}, and this model's "
                        f"picture depends on the length; use prompts with the same number of tokens"
                    )

    def check_size(self, batch: int) -> None:
        """Raise TextlocError unless a module's output has the number of rows that the patches were made for."""
        allowed = {self.rows: f"{self.rows} (no guidance)", 2 * self.rows: f"{2 * self.rows} (guidance)"}
        if not self._doubled:
            allowed = {self.rows: f"{self.rows}"}
        if batch not in allowed:
            raise TextlocError(
                f"patches were made for {self.rows} rows, but the denoiser got {batch}; "
                f"allowed: {' or '.join(allowed.values())}"
            )

    def close(self) -> None:
        """Raise TextlocError if a batch had twice the rows, but its halves were not guidance halves."""
        if self._unlike is not None and bool(self._unlike):
            raise TextlocError(
                f"the denoiser got {2 * self.rows} rows for {self.rows} prompts, and they are not guidance halves; "
                f"with num_images_per_prompt, count every picture as a row"
            )

    def index(self, rows: Iterable[int], batch: int, device: torch.device) -> torch.Tensor:
        """Positions of the prompts' rows in a batch, in all its halves."""
        # All hooks of a block share the indices, so each set of rows is copied to the device once.
        key = tuple(rows), batch, device
        if key not in self._indices:
            halves = range(0, batch, self.rows)
            self._indices[key] = torch.tensor([half + row for half in halves for row in key[0]], device=device)
        return self._indices[key]


class _CopyRows:
    """Forward hook that returns a copy of the output, with target rows copied over source rows."""

    def __init__(self, name: str, copies: list[_Copy], layer: TextLayer | None, batch: Batch):
        self.name, self.copies, self.layer, self.batch = name, copies, layer, batch

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        fired = self.batch.fired
        copies = [c for c in self.copies if c.holds(fired.clock.step)]
        if not copies:
            return None
        size = output.shape[0]
        self.batch.check_size(size)
        self._check_length(output)
        patched_output = output.clone()
        written = set()
        for copy in copies:
            into, from_ = patched_output, output
            if self.layer is not None:
                into, from_ = (self.layer.text(x, copy.letter, fired.clock.tokens) for x in (into, from_))
            source = self.batch.index(copy.sources, size, output.device)
            target = self.batch.index(copy.targets, size, output.device)
            if self.layer is None or (copy.heads is None and copy.tokens is None):
                into[source] = from_[target]
            else:
                into, from_ = (x.unflatten(-1, (self.layer.heads, -1)) for x in (into, from_))  # views
                places, heads = self._chosen(copy, into)
                into[source[:, None, None], places, heads] = from_[target[:, None, None], places, heads]
            written |= set(copy.sources)
        fired.note(self.name, len(written) * (size // self.batch.rows))
        return patched_output

    def _chosen(self, copy: _Copy, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy's tokens (n, 1) and heads (m) in the text's keys or values (rows, tokens, heads, channels)."""
        if any(place >= text.shape[1] for place in copy.tokens or ()):
            raise TextlocError(f"tokens {copy.tokens} are out of range; this text has places 0 to {text.shape[1] - 1}")
        places, heads = (
            torch.tensor(range(size) if some is None else some, device=text.device, dtype=torch.long)
            for some, size in ((copy.tokens, text.shape[1]), (copy.heads, text.shape[2]))
        )
        return places[:, None], heads

    def _check_length(self, output: torch.Tensor) -> None:
        """Refuse an output without its text: some models cache the text's keys and compute only the picture's."""
        if self.layer is None or self.layer.context is None:
            return
        length, text, picture = output.shape[1], self.batch.fired.clock.tokens, self.batch.picture_tokens
        if length <= text or (picture is not None and length != text + picture):
            raise TextlocError(
                f"{self.name} gave {length} tokens, but the text has {text} tokens and the picture has "
                f"{picture or 'more'}; call the pipeline without a cache of keys and values, and without input pictures"
            )


class _CopyMasks:
    """Forward pre-hook of an attention module that copies the rows of its masks like the keys and values."""

    def __init__(self, copies: list[_Copy], batch: Batch):
        self.copies, self.batch = copies, batch

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        copies = [c for c in self.copies if c.holds(self.batch.fired.clock.step)]
        size = self.batch.size
        masks = {
            name: value
            for name, value in kwargs.items()
            if any(m in name for m in self.batch.row.masks) and value is not None
        }
        if not copies or not masks:
            return None
        for name, value in masks.items():
            if not isinstance(value, torch.Tensor):
                raise TextlocError(
                    f"the attention's {name} is a {type(value).__name__}, and its rows cannot be patched; "
                    f"allowed: a tensor"
                )
        masks = {name: value for name, value in masks.items() if value.ndim > 1 and value.shape[0] == size}
        changed = {}
        for name, mask in masks.items():
            changed[name] = mask.clone()
            for copy in copies:
                source = self.batch.index(copy.sources, size, mask.device)
                target = self.batch.index(copy.targets, size, mask.device)
                all_of_it = [c for c in copies if c.heads is c.tokens is None and c.sources == copy.sources]
                whole = {"k", "v"} <= {c.letter for c in all_of_it}
                if not whole and not torch.equal(mask[source], mask[target]):
                    raise TextlocError(
                        "source and target prompt have different lengths, so single heads or tokens, or keys or values "
                        "alone, cannot be patched; patch kv in all heads, or use prompts with the same number of tokens"
                    )
                changed[name][source] = mask[target]
        return args, kwargs | changed
