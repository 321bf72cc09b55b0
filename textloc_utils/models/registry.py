"""The models that have a name: the miniatures in the data folder, and the public checkpoints in ``registry.toml``."""

import functools
import json
import math
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from textloc_utils.models.architectures import architecture as row_of
from textloc_utils.models.architectures import key_value_numbers, text_layers, with_tuples
from textloc_utils.prompts import TEMPLATE
from textloc_utils.settings import TextlocError, data_dir, quiet_libraries

MINIATURES = ("sd3-mini", "sdxl-mini", "if-mini", "ldm-mini")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known about a model before it is loaded.

    ``source`` is a hub repository or a local folder; ``dtype`` holds on CUDA only (the CPU computes in float32).
    ``height`` and ``width`` are the finished picture's. A model of two stages (DeepFloyd IF) names in ``stage1`` the
    (height, width) of its first pictures, in ``stage2`` where the second pipeline is (a hub repository, or a folder
    below a local ``source``) and in ``stage2_arguments`` what that pipeline is called with.
    ``unverified`` says what of all this could not be checked. ``paper_layers`` are the layers that the paper found.
    ``max_sequence_length`` is the long text encoder's prompt length in tokens where the pipeline takes one (T5's in
    Stable Diffusion 3 and FLUX). ``trained`` tells a miniature's device, samples and spelling.
    """

    name: str
    family: str
    pipeline: str
    source: str
    steps: int
    guidance: float
    height: int
    width: int
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"
    licence: str = ""
    unverified: str = ""
    gated: bool = False
    paper_layers: tuple[int, ...] = ()
    prompt_template: str = TEMPLATE
    max_sequence_length: int | None = None
    miniature: bool = False
    stage1: tuple[int, int] | None = None
    stage2: str | None = None
    stage2_arguments: dict | None = None
    trained: dict | None = None


def _full_size() -> dict[str, ModelSpec]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {name: ModelSpec(name=name, **with_tuples(values)) for name, values in table.items()}


#: The public checkpoints by name.
FULL_SIZE = _full_size()


def _configuration_file(name: str) -> Path:
    return Path(__file__).parent / "configurations" / f"{name}.json"


@functools.cache
def configuration(name: str) -> dict:
    """A full-size model's denoiser configuration, as diffusers writes it: enough to number and count its layers.

    Raises TextlocError where it is not public.
    """
    path = _configuration_file(name)
    if not path.is_file():
        raise TextlocError(f"the configuration of {name}'s denoiser is not public; load the model to number its layers")
    return json.loads(path.read_text(encoding="utf-8"))


def _miniature_spec(name: str, folder: Path) -> ModelSpec:
    """A miniature's spec from the ``textloc.json`` beside its ``model_index.json``."""
    path = folder / "textloc.json"
    try:
        known = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        raise TextlocError(f"{path} is missing or corrupt; textloc train {name} writes it")
    values = with_tuples({f.name: known[f.name] for f in fields(ModelSpec) if f.name in known and f.name not in _GIVEN})
    needed = [f.name for f in fields(ModelSpec) if f.default is MISSING and f.name not in (*values, *_GIVEN)]
    if needed:
        raise TextlocError(f"{path} lacks keys, among {', '.join(needed)}")
    for key, value in values.items():
        if value is not None and not _fits(key, value):
            raise TextlocError(f"{path} holds {value!r} as {key}; restore it, or train the model again")
    return ModelSpec(name=name, source=str(folder), miniature=True, **values)


#: What a miniature's folder and name say already.
_GIVEN = ("name", "source", "miniature")


def _fits(key: str, value) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key in ("steps", "height", "width", "max_sequence_length"):
        return whole and 1 <= value <= 10**6
    if key == "guidance":
        return (whole or isinstance(value, float)) and math.isfinite(value)
    if key in ("stage1", "paper_layers"):
        return isinstance(value, tuple) and all(isinstance(v, int) and 0 <= v < 10**6 for v in value)
    kinds = {"gated": bool, "trained": dict, "stage2_arguments": dict}
    return isinstance(value, kinds.get(key, str))


def registry() -> dict[str, ModelSpec]:
    """All models that can be named now: the miniatures whose folders exist, then the full-size ones."""
    folders = {name: data_dir() / "miniatures" / name for name in MINIATURES}
    # A training under way has a folder too; its textloc.json is written with the finished pipeline.
    return {n: _miniature_spec(n, f) for n, f in folders.items() if (f / "textloc.json").is_file()} | FULL_SIZE


def spec(name: str) -> ModelSpec:
    """Look a model up; an unknown name raises TextlocError that lists the known ones."""
    known = registry()
    if name in known:
        return known[name]
    if name in MINIATURES and not data_dir().is_dir():
        raise TextlocError(f"{name} comes with a clone of the project; name a clone's data folder in TEXTLOC_DATA")
    hint = f"; textloc train {name} makes this one" if name in MINIATURES else ""
    raise TextlocError(f"unknown model {name!r}; known models: {', '.join(known)}{hint}")


def training_log(chosen: ModelSpec) -> dict | None:
    """A miniature's ``training.json``: ``report`` (budget, device, losses) and ``evaluations``; None without one."""
    path = Path(chosen.source) / "training.json"
    return json.loads(path.read_text()) if chosen.miniature and path.is_file() else None


# --- description ------------------------------------------------------------------------------------------------


def meta_denoiser(chosen: ModelSpec) -> nn.Module:
    """A model's denoiser on torch's meta device: its shapes, without weights and without a download."""
    import diffusers

    if not chosen.miniature:
        config = configuration(chosen.name)
    else:
        folder = Path(chosen.source)
        path = folder / ("transformer" if (folder / "transformer").is_dir() else "unet") / "config.json"
        config = read_config(path)
    row_of(config.get("_class_name"))
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def describe(chosen: ModelSpec | str) -> dict:
    """What ``textloc models --json`` prints about a model.

    ``parameters`` counts the denoiser's; ``text_layers`` are module names in execution order; ``kv_share`` is, per
    layer, the fraction of the denoiser's parameters in that layer's text key and value modules. The first is None and
    the others are empty where the denoiser's configuration is not public.
    """
    quiet_libraries()
    if isinstance(chosen, str):
        chosen = spec(chosen)
    numbers: dict = {"parameters": None, "text_layers": [], "kv_share": []}
    if chosen.miniature or _configuration_file(chosen.name).is_file():
        denoiser = meta_denoiser(chosen)
        layers, parameters = text_layers(denoiser), sum(p.numel() for p in denoiser.parameters())
        shares = [key_value_numbers(denoiser, layer) / parameters for layer in layers]
        numbers = {"parameters": parameters, "text_layers": [layer.name for layer in layers], "kv_share": shares}
    return {
        "name": chosen.name,
        "family": chosen.family,
        "pipeline": chosen.pipeline,
        **numbers,
        "licence": chosen.licence,
        "gated": chosen.gated,
        "unverified": chosen.unverified,
        "prompt_template": chosen.prompt_template,
        "trained": chosen.trained,
    }


def read_config(path: Path) -> dict:
    """A configuration in a model's folder. Raises TextlocError for what is none, and for sizes that no model has."""
    found = read_table(path)
    _check_sizes(path, found)
    return found


def read_table(path: Path) -> dict:
    """A JSON file of a model's folder that holds a table. Raises TextlocError for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise TextlocError(f"{path} is no regular file; restore it")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise TextlocError(f"{path} is missing; restore it, or download or train the model again") from None
    except (ValueError, RecursionError):
        raise TextlocError(f"{path} is corrupt: not JSON") from None
    if not isinstance(found, dict):
        raise TextlocError(f"{path} is corrupt: a table was expected")
    return found


#: More than any model has, by a pattern of the setting's name.
_MOST = {"layers|blocks|depth": 1000, "sample_size|pos_embed": 10**4, "timesteps": 10**5}
_MOST |= {"size|dim|channels|heads|embeddings": 10**8}


def _check_sizes(path: Path, config: dict) -> None:
    """Raise TextlocError for a size that no model has: building it would take for ever, or all memory."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number) and key != "lambda_min_clipped":  # a scheduler's
                raise TextlocError(f"{path} is corrupt: {key} is {number}")
            many = next((n for pattern, n in _MOST.items() if re.search(pattern, key)), 10**10)
            if isinstance(number, int) and not isinstance(number, bool) and abs(number) > many:
                raise TextlocError(f"{path} is corrupt: {key} is {number}, more than any model has")
