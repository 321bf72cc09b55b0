"""An experiment: a model, the settings with which it draws, the store of its results, and the key of these results.

Every experiment of the package takes an :class:`Experiment`, works through units that are stored one by one, and
publishes a table under a key. If a table with exactly this key is already published, it is used, and nothing is
computed.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from textloc_utils import ocr
from textloc_utils.generate import Generation, decode, encode, generate, rows_per_call
from textloc_utils.models import Model
from textloc_utils.prompts import Pair
from textloc_utils.results import NotPublishedError, Store
from textloc_utils.settings import PATIENCE, TextlocError, data_dir


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """A model, the settings with which it draws, and what is done with the results. Use :meth:`of` to make one.

    ``steps``, ``guidance`` and ``negative_prompt`` are as in ``generate``. Units of work are kept in ``store``.
    ``progress`` shows a progress bar. ``publish`` computes tables again and writes them to the package's data.
    """

    model: Model
    steps: int
    guidance: float
    negative_prompt: str | None = None
    store: Store
    progress: bool = False
    publish: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise TextlocError(f"steps must be at least 1, got {self.steps}")
        if self.negative_prompt and self.model.evaluations(self.guidance) < 2:
            raise TextlocError(f"{self.name} reads no negative prompt at a guidance of {self.guidance}")

    @classmethod
    def of(cls, subject: "Experiment | Model | DiffusionPipeline", **settings) -> "Experiment":
        """Make an experiment from a model or a pipeline, or from another experiment with some settings changed.

        ``settings`` are the fields of the class. Settings that are missing or None take the model's own values and the
        default store.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if isinstance(subject, cls):
            return replace(subject, **given)
        model = Model.of(subject)
        own: dict[str, Any] = {"steps": model.spec.steps, "guidance": model.spec.guidance, "store": Store()}
        return cls(model=model, **own | given)

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.model.spec.name

    @property
    def settings(self) -> dict:
        """The settings of a pipeline call: steps, guidance and negative_prompt."""
        return {"steps": self.steps, "guidance": self.guidance, "negative_prompt": self.negative_prompt}

    @property
    def key(self) -> dict:
        """The values that every result depends on, in addition to its own inputs."""
        size = {"height": self.model.spec.height, "width": self.model.spec.width}
        return {"model": self.name, "weights": fingerprint(self.model), **self.settings, **size}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], **options) -> Generation:
        """Draw with the experiment's settings. ``options`` are those of ``generate`` and override the settings."""
        return generate(self.model, prompts, seeds, **self.settings | options)

    def drawn(
        self, prompts: Sequence[str], seeds: Sequence[int], more: Sequence[Mapping] = ()
    ) -> tuple[np.ndarray, list[str]]:
        """The pictures of :meth:`draw`, uint8 (n, H, W, 3), and the text that is read in them.

        ``more`` holds further values that each picture depends on. Every batch is stored, so an interrupted run
        continues with the batch at which it stopped.
        """
        size = rows_per_call(self.model)
        told: dict[str, list] = {"prompts": list(prompts), "seeds": list(seeds)}
        told |= {"more": list(more)} if more else {}
        batches = [{name: of[i : i + size] for name, of in told.items()} for i in range(0, len(prompts), size)]

        def compute(batch: dict) -> list[dict]:
            pictures = self.draw(batch["prompts"], batch["seeds"]).images
            return [
                {"read": text, "picture": encode(picture)}
                for text, picture in zip(ocr.read(pictures), pictures, strict=True)
            ]

        rows = self.units("drawn", batches, {}, compute)
        return np.stack([decode(text) for text in rows.picture]), rows["read"].tolist()

    def unit(self, kind: str, inputs: Mapping, compute: Callable[[], pd.DataFrame | list[dict]]) -> pd.DataFrame:
        """The rows of one unit of work, stored under all of its ``inputs``, which include the experiment's key."""
        return self.store.unit(kind, inputs, compute, model=self.model)

    def units(
        self, kind: str, items: Sequence, inputs: Mapping, compute: Callable[..., pd.DataFrame | list[dict]]
    ) -> pd.DataFrame:
        """The rows that ``compute`` returns for each item, with one stored unit per item.

        ``inputs`` holds the values that a unit depends on, in addition to the experiment's key and its item. Processes
        that are started together (``accelerate launch``) divide the items among themselves. Each of them returns all
        rows, in order.
        """
        shared = self.key | dict(inputs)

        def unit(item) -> pd.DataFrame:
            return self.unit(kind, shared | {"item": item}, lambda: compute(item))

        def bar(todo):
            return tqdm(todo, desc=f"{self.name}: {kind}", unit="unit", disable=not self.progress)

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=self.model.device.type == "cpu", timeout=PATIENCE)
            for item in bar(items[state.process_index :: state.num_processes]):
                unit(item)
            state.wait_for_everyone()
        return pd.concat([unit(item) for item in bar(items)], ignore_index=True)

    def table(self, name: str, inputs: Mapping, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The published table ``name`` if its key is that of this experiment and these inputs, else that of ``make()``.

        With ``publish`` the table is always made again and written.
        """
        key = self.key | dict(inputs)
        table = None if self.publish else published_store().load_matching(name, key)
        if table is None:
            spent = Spent(self.store)
            table = make()
            if self.publish:
                self.write(name, table, key=key, seconds=spent.seconds)
        return table

    def write(self, name: str, table: pd.DataFrame, *, seconds: float, **provenance) -> None:
        """Publish a table with its provenance. If several processes were started together, only the first one does so.

        ``seconds`` is the time that the table took (see :class:`Spent`).
        """
        if int(os.environ.get("RANK", 0)) == 0:
            published_store().publish(name, table, {"seconds": seconds, **provenance}, model=self.model)


class Spent:
    """Seconds of work since this object was made, including those of earlier runs for units found in the store."""

    def __init__(self, store: Store):
        self._store, self._began, self._before = store, time.monotonic(), store.seconds_before

    @property
    def seconds(self) -> float:
        """The seconds, rounded to tenths."""
        return round(time.monotonic() - self._began + self._store.seconds_before - self._before, 1)


def check_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs as a list. Raises TextlocError if there is none, or if an item is not a pair."""
    pairs = [pairs] if isinstance(pairs, Pair) else list(pairs)
    if not pairs:
        raise TextlocError("this needs at least one pair of prompts")
    if wrong := [pair for pair in pairs if not isinstance(pair, Pair)]:
        raise TextlocError(f"pairs of prompts are needed (prompts.Pair), got a {type(wrong[0]).__name__}")
    return pairs


def digest_of(pairs: Sequence[Pair]) -> str:
    """Short hash of pairs, for the key of a table that was made with them."""
    return hashlib.sha256(repr([asdict(pair) for pair in pairs]).encode()).hexdigest()[:16]


def fingerprint(model: Model) -> str:
    """Short hash of a model's weights (64 values of each tensor). Stored results of other weights are not used.

    For a miniature the hash covers the denoiser only, because its parts are trained together. Other models may have the
    same denoiser and differ in their encoders, autoencoder, second stage or scheduler.
    """
    digest = hashlib.sha256()

    def take(module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())

    take(model.denoiser)
    if not model.spec.miniature:
        stages = [model.pipe.components, model.stage2.components if model.stage2 else {}]
        for name, part in sorted((f"{i} {n}", part) for i, of in enumerate(stages) for n, part in of.items()):
            digest.update(f"{name} {type(part).__name__}".encode())
            if isinstance(part, nn.Module) and part is not model.denoiser:
                take(part)
        settings = {k: v for k, v in model.pipe.scheduler.config.items() if not k.startswith("_")}
        digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()[:16]


# --- what the package's data holds ------------------------------------------------------------------------------


def published_store() -> Store:
    """The store with the tables that come with the package."""
    return Store(data_dir() / "results")


def published_table(model: Model, name: str) -> pd.DataFrame | None:
    """The published table ``name``, with any settings, if it was made with exactly this model's weights.

    Returns None if there is no such table. Raises TextlocError for a damaged table.
    """
    try:
        table = published_store().load_published(name)
    except NotPublishedError:
        return None
    return table if table.attrs["provenance"]["key"].get("weights") == fingerprint(model) else None


def known_layers(model: Model) -> tuple[int, ...]:
    """The localized layers of a model: from a published search with the same weights, else from the paper.

    Raises TextlocError if neither is known for the model.
    """
    for how in ("exhaustive", "budgeted"):
        table = published_table(model, f"localize_{model.spec.name}_{how}")
        if table is not None:
            return tuple(table.attrs["provenance"]["found"]["layers"])
    if not model.spec.paper_layers:
        name = model.spec.name
        how = f"run textloc localize {name} --publish first" if model.spec.source else "localize the pipeline first"
        raise TextlocError(f"the localized layers of {name} are not known: give the layers, or {how}")
    return model.spec.paper_layers
