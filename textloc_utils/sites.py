"""Places to patch. A site says what a patch changes: which layers, steps, heads and tensors, and the pooled text.

A table has one row per picture. Its columns COLUMNS say which site was patched in that picture. The column ``site`` is
a name for readers. Code does not read it, but uses ``kind`` and the columns behind it.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from textloc_utils.models import Model, as_indices
from textloc_utils.patching import Patch
from textloc_utils.prompts import Pair

#: What a table says of a site: its name; its kind; its layers and heads, indices joined by spaces (no heads: all of
#: them); whether the pooled text is patched; the steps from ``start`` up to, not including, ``stop``; keys or values.
COLUMNS = ("site", "kind", "layers", "pooled", "start", "stop", "heads", "tensors")
#: Names of the kinds that are not called by their kind alone.
NAMES = {
    "layer": "layer {layers}",
    "set": "layers {layers}",
    "all": "all layers",
    "all + pooled": "all layers + pooled",
    "found": "found layers",
    "found + pooled": "found layers + pooled",
    "others": "all but the found",
    "head": "head {heads}",
    "from step": "from step {start}",
    "until step": "until step {stop}",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place to patch: what a ``patching.Patch`` has besides its rows, and the ``kind`` of place that it is.

    ``tokens`` names one of :func:`token_groups`, as the places of tokens differ from pair to pair. ``layer_heads`` are
    pairs of a layer and one of its heads, where not all of the ``layers`` have the same heads patched.
    """

    kind: str = "set"
    layers: tuple[int, ...] = ()
    pooled: bool = False
    start: int = 0
    stop: int | None = None
    heads: tuple[int, ...] | None = None
    tensors: str = "kv"
    tokens: str = ""
    layer_heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "layers", as_indices(self.layers, "layers"))

    def patches(self, source: int, target: int, tokens: Mapping[str, tuple[int, ...]] | None = None) -> list[Patch]:
        """The patches of row ``source`` from row ``target`` here; ``tokens`` are :func:`token_groups`' groups."""
        settings = {name: value for name, value in vars(self).items() if name not in ("kind", "layer_heads")}
        settings["tokens"] = (tokens or {})[self.tokens] if self.tokens else None
        whole = Patch(source=source, target=target, **settings)
        if not self.layer_heads:
            return [whole]
        return [replace(whole, layers=(layer,), heads=(head,)) for layer, head in self.layer_heads]

    def columns(self, steps: int) -> dict:
        """The COLUMNS of a run of this many steps."""
        heads = self.heads or [f"{layer}.{head}" for layer, head in self.layer_heads]
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(heads)}
        told["stop"] = steps if self.stop is None else self.stop
        return {"site": self.name} | {column: told[column] for column in COLUMNS[1:]}

    @property
    def name(self) -> str:
        """What readers see."""
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(self.heads or ())}
        return NAMES.get(self.kind, self.kind).format(**told)


SOURCE, TARGET = Site(kind="source"), Site(kind="target")  #: plain pictures


def token_groups(model: Model, pair: Pair) -> dict[str, tuple[int, ...]]:
    """The text's places at which the two prompts of a pair hold different tokens, and those at which they do not.

    Keys: "different" and "same"; and "different 0", "different 1"... for each text that the denoiser reads, where it
    reads several (Stable Diffusion 3: that of both CLIPs, and T5's).
    """
    groups: dict[str, list[int]] = {"different": [], "same": []}
    texts = list(zip(model.text_columns(pair.source), model.text_columns(pair.target), strict=True))
    start = 0
    for number, ((_, a), (_, b)) in enumerate(texts):
        names = ["different", f"different {number}"] if len(texts) > 1 else ["different"]
        for name in names:
            groups.setdefault(name, []).extend(start + i for i in range(len(a)) if a[i] != b[i])
        groups["same"] += [start + i for i in range(len(a)) if a[i] == b[i]]
        start += len(a)
    return {name: tuple(places) for name, places in groups.items()}


def joined(indices: Iterable[int | str]) -> str:
    """Indices as a table holds them: joined by spaces."""
    return " ".join(map(str, indices))


def together(layers: int | Iterable[int]) -> Site:
    """The site of one layer, or of several that are patched together."""
    site = Site(layers=as_indices(layers, "layers"))
    return replace(site, kind="layer") if len(site.layers) == 1 else site


def every_layer(model: Model) -> Site:
    """The site of all text layers."""
    return Site(kind="all", layers=tuple(range(len(model.layers))))


def single_layers(model: Model) -> list[Site]:
    """The sites of a sweep: each text layer alone, all layers, the pooled text where there is one, and everything."""
    every = every_layer(model)
    sites = [*(together([i]) for i in every.layers), every]
    if model.pooled_site is not None:
        sites += [Site(kind="pooled", pooled=True), Site(kind="all + pooled", layers=every.layers, pooled=True)]
    return sites


def random_layers(model: Model, layers: Sequence[int], seed: int | str) -> tuple[int, ...]:
    """As many text layers as there are ``layers``, drawn from the others (from all where the others are too few)."""
    every = range(len(model.layers))
    others = [i for i in every if i not in layers]
    pool = others if len(others) >= len(layers) else list(every)
    return tuple(sorted(random.Random(f"random layers {seed}").sample(pool, len(layers))))
