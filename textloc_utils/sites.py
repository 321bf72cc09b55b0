"""Sites: the places to patch. A site names layers, steps, heads and tensors, and whether the pooled text is patched.

A table has one row per picture. Its columns COLUMNS say which site was patched in that picture. The column ``site`` is
a name for readers. Code does not read it. Code uses ``kind`` and the columns after it.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from textloc_utils.models import Model, as_indices
from textloc_utils.patching import Patch
from textloc_utils.prompts import Pair

#: The columns of a table that describe a site: its name, its kind, its layers, whether the pooled text is patched, the
#: steps from ``start`` up to but not including ``stop``, its heads, and keys or values. Layers and heads are indices
#: joined by spaces. An empty ``heads`` means all heads.
COLUMNS = ("site", "kind", "layers", "pooled", "start", "stop", "heads", "tensors")
#: Names of the sites whose name differs from their kind.
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
    """A place to patch: all fields of a ``patching.Patch`` except its rows, and the ``kind`` of the place.

    ``tokens`` is the name of one of :func:`token_groups`, because token positions differ from pair to pair.
    ``layer_heads`` holds pairs of a layer and one of its heads. It is used if different heads are patched in different
    layers.
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
        """The patches of row ``source`` from row ``target`` at this site. ``tokens`` is from :func:`token_groups`."""
        settings = {name: value for name, value in vars(self).items() if name not in ("kind", "layer_heads")}
        settings["tokens"] = (tokens or {})[self.tokens] if self.tokens else None
        whole = Patch(source=source, target=target, **settings)
        if not self.layer_heads:
            return [whole]
        return [replace(whole, layers=(layer,), heads=(head,)) for layer, head in self.layer_heads]

    def columns(self, steps: int) -> dict:
        """The values of COLUMNS for a run with this many steps."""
        heads = self.heads or [f"{layer}.{head}" for layer, head in self.layer_heads]
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(heads)}
        told["stop"] = steps if self.stop is None else self.stop
        return {"site": self.name} | {column: told[column] for column in COLUMNS[1:]}

    @property
    def name(self) -> str:
        """The name that readers see."""
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(self.heads or ())}
        return NAMES.get(self.kind, self.kind).format(**told)


SOURCE, TARGET = Site(kind="source"), Site(kind="target")  #: plain pictures


def token_groups(model: Model, pair: Pair) -> dict[str, tuple[int, ...]]:
    """The text positions at which the two prompts of a pair have different tokens, and those with the same tokens.

    The keys are "different" and "same". If the denoiser reads several texts (Stable Diffusion 3 reads that of both
    CLIPs and that of T5), there are also the keys "different 0", "different 1", and so on, one for each text.
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
    """Join indices with spaces, as in a table."""
    return " ".join(map(str, indices))


def together(layers: int | Iterable[int]) -> Site:
    """The site of one layer, or of several that are patched together."""
    site = Site(layers=as_indices(layers, "layers"))
    return replace(site, kind="layer") if len(site.layers) == 1 else site


def every_layer(model: Model) -> Site:
    """The site of all text layers."""
    return Site(kind="all", layers=tuple(range(len(model.layers))))


def single_layers(model: Model) -> list[Site]:
    """The sites of a sweep: each text layer, all layers, and the pooled text (if any) alone and with all layers."""
    every = every_layer(model)
    sites = [*(together([i]) for i in every.layers), every]
    if model.pooled_site is not None:
        sites += [Site(kind="pooled", pooled=True), Site(kind="all + pooled", layers=every.layers, pooled=True)]
    return sites


def random_layers(model: Model, layers: Sequence[int], seed: int | str) -> tuple[int, ...]:
    """Draw as many text layers as there are in ``layers``, from the others (from all if the others are too few)."""
    every = range(len(model.layers))
    others = [i for i in every if i not in layers]
    pool = others if len(others) >= len(layers) else list(every)
    return tuple(sorted(random.Random(f"random layers {seed}").sample(pool, len(layers))))
