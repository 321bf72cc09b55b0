"""The training data of denoisers: scenes with captions, encoded once or rendered again for every batch."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from textloc_utils import files
from textloc_utils.miniatures import autoencoder, world

EMPTY = 0.1  #: share of the captions that are empty, for guidance
#: Kinds of scenes, by their texts and whether they are easy, and the number of scenes of each, in shares of a pool.
KINDS = {"runs": 1 / 3, "words": 2 / 3, "easy-runs": 1 / 6, "easy-words": 1 / 3}


def _kind(runs: bool, easy: bool) -> str:
    return ("easy-" if easy else "") + ("runs" if runs else "words")


def _caption(scene: world.Scene, rng: random.Random, only: world.World, named: float) -> str:
    """A caption of a scene, or none; a share ``named`` of those that are there names everything."""
    if rng.random() < EMPTY:
        return ""
    # Where no caption names more than the world's, no random number is drawn for it.
    if named and rng.random() < named:
        only = replace(only, named=dict.fromkeys(only.named, 1.0))
    return world.caption(scene, rng, only)


def letter_cells(scenes: Sequence[world.Scene], scale: int) -> torch.Tensor:
    """Where the letters of scenes stand, float32 (n, 1, HEIGHT / scale, WIDTH / scale): 1 in their cells, else 0."""
    cells = torch.zeros(len(scenes), 1, world.HEIGHT // scale, world.WIDTH // scale)
    for cell, scene in zip(cells, scenes, strict=True):
        left, top, right, bottom = world.text_box(scene)
        cell[0, top // scale : -(-bottom // scale), left // scale : -(-right // scale)] = 1
    return cells


def draw_scene(rng: random.Random, kind: str, only: world.World) -> world.Scene:
    """A training scene of one of KINDS."""
    while True:
        scene = world.random_scene(rng, only, runs=kind.endswith("runs"))
        if not kind.startswith("easy") or world.is_easy(scene):
            return scene


@torch.no_grad()
def encode_scenes(vae, n: int, kind: str, only: world.World, seed: int, path: Path) -> None:
    """Encode ``n`` random scenes of one kind to normalised latents at ``path``.

    The file holds ``latents``, float16 (n, C, h, w): the autoencoder's mean, shifted and scaled as the pipeline expects
    it. The scenes are written to a JSON file in the same folder.
    """
    rng = random.Random(f"{seed} {kind}")
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last)
    todo = [draw_scene(rng, kind, only) for _ in range(n)]
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    out = []
    for start in tqdm(range(0, n, 64), desc=f"encoding scenes, {kind}", mininterval=5):
        x = autoencoder.to_tensor(np.stack([world.render(s) for s in todo[start : start + 64]])).to(device)
        # The rounding error of bfloat16 is much smaller than the error of the autoencoder.
        with torch.autocast(device.type, torch.bfloat16, enabled=autoencoder.has_bf16(device)):
            mean = vae.encode(x).latent_dist.mean
        out.append(((mean.float() - shift) * scale).half().cpu())
    with files.whole_files(path.parent, path.with_suffix(".json").name, path.name) as aside:
        files.write_json(aside / path.with_suffix(".json").name, [asdict(s) for s in todo])
        save_file({"latents": torch.cat(out).contiguous()}, aside / path.name)


class Pool:
    """Encoded scenes by kind. Each kind is read from its file when it is first used."""

    def __init__(self, folder: Path, only: world.World):
        self.folder, self.only = folder, only
        self.parts: dict[str, tuple[torch.Tensor, list[world.Scene]]] = {}

    def path(self, kind: str) -> Path:
        """The file of one kind."""
        return self.folder / f"pool-{kind}.safetensors"

    def part(self, kind: str) -> tuple[torch.Tensor, list[world.Scene]]:
        """Latents and scenes of one kind."""
        if kind not in self.parts:
            known = json.loads(self.path(kind).with_suffix(".json").read_text())
            known = [world.Scene(**s | {"phase": tuple(s["phase"])}) for s in known]
            self.parts[kind] = load_file(self.path(kind))["latents"], known
        return self.parts[kind]

    def batch(self, n: int, runs: float, easy: bool, named: float, rng: random.Random):
        """(latents float32 (n, C, h, w), captions, cells float32 (n, 1, h, w)).

        A share ``runs`` of them has letters in runs, and a share ``named`` of the captions names everything. ``cells``
        is 1 in the cells of the letters and 0 elsewhere.
        """
        latents, captions, scenes = [], [], []
        for _ in range(n):
            encoded, known = self.part(_kind(rng.random() < runs, easy))
            row = rng.randrange(len(known))
            latents.append(encoded[row])
            captions.append(_caption(known[row], rng, self.only, named))
            scenes.append(known[row])
        batch = torch.stack(latents).float()
        return batch, captions, letter_cells(scenes, world.HEIGHT // batch.shape[-2])


class Drawn:
    """Scenes in pixels, rendered again for every batch. They are for recipes without an autoencoder."""

    def __init__(self, only: world.World):
        self.only = only

    def batch(self, n: int, runs: float, easy: bool, named: float, rng: random.Random):
        """(pictures float32 (n, 3, H, W) in -1..1, captions, cells), otherwise like ``Pool.batch``."""
        known = [draw_scene(rng, _kind(rng.random() < runs, easy), self.only) for _ in range(n)]
        captions = [_caption(s, rng, self.only, named) for s in known]
        return autoencoder.to_tensor(np.stack([world.render(s) for s in known])), captions, letter_cells(known, 1)
