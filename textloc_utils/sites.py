"""Places to patch. A site says what a patch changes: which layers, steps, heads and tensors, and the pooled text.

A table has one row per picture. Its columns COLUMNS say which site was patched in that picture. The column ``site`` is
a name for readers. Code does not read it, but uses ``kind`` and the columns behind it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from textloc_utils.models import Model, as_indices
from textloc_utils.patching import Patch

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
    """A place to patch: what a ``patching.Patch`` has besides its rows, and the ``kind`` of place that it is."""

    kind: str = "set"
    layers: tuple[int, ...] = ()
    pooled: bool = False
    start: int = 0
    stop: int | None = None
    heads: tuple[int, ...] | None = None
    tensors: str = "kv"

    def __post_init__(self):
        object.__setattr__(self, "layers", as_indices(self.layers, "layers"))

    def patch(self, source: int, target: int) -> Patch:
        """The patch of row ``source`` from row ``target`` at this site."""
        settings = {name: value for name, value in vars(self).items() if name != "kind"}
        return Patch(source=source, target=target, **settings)

    def columns(self, steps: int) -> dict:
        """The COLUMNS of a run of this many steps."""
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(self.heads or ())}
        told["stop"] = steps if self.stop is None else self.stop
        return {"site": self.name} | {column: told[column] for column in COLUMNS[1:]}

    @property
    def name(self) -> str:
        """What readers see."""
        told = vars(self) | {"layers": joined(self.layers), "heads": joined(self.heads or ())}
        return NAMES.get(self.kind, self.kind).format(**told)


SOURCE, TARGET = Site(kind="source"), Site(kind="target")  #: plain pictures


def joined(indices: Iterable[int]) -> str:
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
