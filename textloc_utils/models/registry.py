"""The models with a name: the miniatures in the data folder, and the public checkpoints in ``registry.toml``."""

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
    """The facts about a model that are known before it is loaded.

    ``source`` is a hub repository or a local folder. ``dtype`` is used only on CUDA (the CPU computes in float32).
    ``height`` and ``width`` are those of the finished picture. ``paper_layers`` are the layers that the paper found.
    ``max_sequence_length`` is the prompt length of the long text encoder, in tokens, if the pipeline has such an
    argument (T5's length in Stable Diffusion 3 and FLUX). ``unverified`` says which of these facts could not be
    checked. ``trained`` holds a miniature's device, number of samples, and spelling rates.

    Three fields describe a model of two stages (DeepFloyd IF). ``stage1`` is the (height, width) of its first pictures.
    ``stage2`` is the place of the second pipeline: a hub repository, or a folder below a local ``source``.
    ``stage2_arguments`` are the arguments of that pipeline's call.
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
    """The configuration of a full-size model's denoiser, as diffusers writes it. It is enough to list the layers.

    Raises TextlocError if the configuration is not public.
    """
    path = _configuration_file(name)
    if not path.is_file():
        raise TextlocError(f"the configuration of {name}'s denoiser is not public; load the model to number its layers")
    return json.loads(path.read_text(encoding="utf-8"))


def _miniature_spec(name: str, folder: Path) -> ModelSpec:
    """A miniature's spec, from the ``textloc.json`` in the folder of its ``model_index.json``."""
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
        raise TextlocError(f"{path} has no values for {', '.join(needed)}")
    for key, value in values.items():
        if value is not None and not _fits(key, value):
            raise TextlocError(f"{path} holds {value!r} as {key}; restore it, or train the model again")
    return ModelSpec(name=name, source=str(folder), miniature=True, **values)


#: The fields that follow from a miniature's folder and name.
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
    """All available models by name: first the miniatures whose folders exist, then the full-size models."""
    folders = {name: data_dir() / "miniatures" / name for name in MINIATURES}
    # A training that is still running has a folder, too. Its textloc.json is written with the finished pipeline.
    return {n: _miniature_spec(n, f) for n, f in folders.items() if (f / "textloc.json").is_file()} | FULL_SIZE


def spec(name: str) -> ModelSpec:
    """Look up a model. For an unknown name, raises a TextlocError that lists the known names."""
    known = registry()
    if name in known:
        return known[name]
    if name in MINIATURES and not data_dir().is_dir():
        raise TextlocError(f"{name} comes with a clone of the project; set TEXTLOC_DATA to a clone's data folder")
    hint = f"; textloc train {name} makes this one" if name in MINIATURES else ""
    raise TextlocError(f"unknown model {name!r}; known models: {', '.join(known)}{hint}")


def training_log(chosen: ModelSpec) -> dict | None:
    """A miniature's ``training.json``: ``report`` (budget, device, losses) and ``evaluations``. None if missing."""
    path = Path(chosen.source) / "training.json"
    return json.loads(path.read_text()) if chosen.miniature and path.is_file() else None


# --- description ------------------------------------------------------------------------------------------------


def meta_denoiser(chosen: ModelSpec) -> nn.Module:
    """A model's denoiser on torch's meta device: it has shapes, but needs no weights and no download."""
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
    """The facts about a model that ``textloc models --json`` prints.

    ``parameters`` is the number of the denoiser's parameters. ``text_layers`` are module names in execution order.
    ``kv_share`` is, for each layer, the fraction of the denoiser's parameters in that layer's text key and value
    modules. If the denoiser's configuration is not public, ``parameters`` is None and the other two are empty.
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
    """Read a configuration in a model's folder. Raises TextlocError for a damaged file and for impossible sizes."""
    found = read_table(path)
    _check_sizes(path, found)
    return found


def read_table(path: Path) -> dict:
    """Read a JSON file of a model's folder that holds a table. Raises TextlocError for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise TextlocError(f"{path} is not a regular file; restore it")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise TextlocError(f"{path} is missing; restore it, or download or train the model again") from None
    except (ValueError, RecursionError):
        raise TextlocError(f"{path} is corrupt: not JSON") from None
    if not isinstance(found, dict):
        raise TextlocError(f"{path} is corrupt: a table was expected")
    return found


#: Largest allowed value of a setting, by a pattern of its name. No model has more.
_MOST = {"layers|blocks|depth": 1000, "sample_size|pos_embed": 10**4, "timesteps": 10**5}
_MOST |= {"size|dim|channels|heads|embeddings": 10**8}


def _check_sizes(path: Path, config: dict) -> None:
    """Raise TextlocError for a size that no model has. Building such a model would never end or take all memory."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number) and key != "lambda_min_clipped":  # in schedulers
                raise TextlocError(f"{path} is corrupt: {key} is {number}")
            many = next((n for pattern, n in _MOST.items() if re.search(pattern, key)), 10**10)
            if isinstance(number, int) and not isinstance(number, bool) and abs(number) > many:
                raise TextlocError(f"{path} is corrupt: {key} is {number}, more than any model has")
