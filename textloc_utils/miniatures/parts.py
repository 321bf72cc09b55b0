"""The parts that several miniatures share: autoencoders and text encoders, stored under a hash of their inputs."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from textloc_utils import files, prompts
from textloc_utils.miniatures import autoencoder, encoders, world
from textloc_utils.settings import data_dir

VERSION = 1  #: raise it when parts are made in another way, but with the same inputs


def default_folder() -> Path:
    """The default folder of parts."""
    return data_dir() / "runs" / "parts"


def world_digest() -> str:
    """Short hash of the world's scenes, captions and words. If they change, parts are made again."""
    rng = random.Random(0)
    digest = hashlib.sha256(" ".join(prompts.words("train")).encode())
    for _ in range(32):
        scene = world.random_scene(rng, world.EVERYWHERE)
        digest.update(np.ascontiguousarray(world.render(scene)).data)
        digest.update(world.caption(scene, rng).encode())
    return digest.hexdigest()[:16]


def _part(folder: Path, name: str, inputs: dict, make: Callable[[Path], tuple[nn.Module, dict]]) -> tuple[Path, dict]:
    """The folder of a part and its report. A missing part is made with ``make``, which gets a path for a checkpoint."""
    inputs = inputs | {"world": world_digest(), "version": VERSION}
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    place = folder / f"{name}-{key}"
    checkpoint = folder / f"{name}-{key}.checkpoint.pt"
    if not (place / "report.json").is_file():
        module, report = make(checkpoint)
        with files.whole_folder(place) as part:
            module.save_pretrained(part)
            files.write_json(part / "report.json", report | {"inputs": inputs})
        checkpoint.unlink(missing_ok=True)
    return place, json.loads((place / "report.json").read_text())


def make_autoencoder(
    channels: int, *, folder: Path, steps: int, seed: int, device: str, log=print, **config
) -> tuple[Path, dict]:
    """The folder of a trained autoencoder with ``channels`` latent channels, and its report."""

    def make(checkpoint: Path) -> tuple[AutoencoderKL, dict]:
        torch.manual_seed(seed)
        vae = autoencoder.build(channels, **config).to(device)
        report = autoencoder.train(vae, checkpoint, steps=steps, seed=seed, log=log)
        autoencoder.set_latent_statistics(vae)
        return vae, report

    return _part(folder, f"autoencoder-{channels}", {"steps": steps, "seed": seed, "config": config}, make)


def make_encoder(kind: str, *, folder: Path, steps: int, seed: int, device: str, log=print) -> tuple[Path, dict]:
    """The folder of a text encoder of one of ``encoders.KINDS``, trained only on captions, and its report."""

    def make(checkpoint: Path) -> tuple[nn.Module, dict]:
        encoder, right = encoders.pretrain(encoders.KINDS[kind], seed=seed, steps=steps, device=device)
        log(f"text encoder {kind}, seed {seed}: {right:.4f} of letters and factors named correctly")
        return encoder, {"steps": steps, "right": round(right, 4)}

    return _part(folder, f"{kind}-{seed}", {"kind": kind, "steps": steps, "seed": seed}, make)
