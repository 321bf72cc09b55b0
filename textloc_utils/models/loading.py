"""Load a model by name or from a folder. Everything that needs no weights is checked first."""

import contextlib
import copy
import importlib.util
import inspect
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from textloc_utils.models.architectures import architecture
from textloc_utils.models.model import Model
from textloc_utils.models.registry import MINIATURES, ModelSpec, _miniature_spec, read_config, read_table, spec
from textloc_utils.settings import TextlocError, first_line, quiet_libraries

#: Files that can hold a tokenizer's vocabulary. A tokenizer has at least one of them.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
#: The dtypes of weights, in the words of safetensors. Tensors of integers are indices, or quantized weights.
_FRACTIONS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: Components that only check or mark pictures, with the arguments that leave them out.
_OFF = {"safety_checker": None, "requires_safety_checker": False, "watermarker": None, "add_watermarker": False}


def pick_device(device: str) -> torch.device:
    """Return the device for ``auto`` (CUDA if available, else the CPU), ``cpu``, or any other torch device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise TextlocError(f"unknown device {device!r}; allowed: auto, cpu, cuda, cuda:0 ...") from None
    kind: Any = getattr(torch, picked.type, None)
    count = torch.cuda.device_count()
    there = picked.type == "cpu" or (hasattr(kind, "is_available") and kind.is_available())
    if not there or (picked.type == "cuda" and (picked.index or 0) >= count):
        found = f"{count} CUDA devices are present" if picked.type == "cuda" else "this machine has none"
        raise TextlocError(f"device {device!r} was requested, but {found}; use auto or cpu")
    return picked


# --- checks of a folder before any weight is read ---------------------------------------------------------------


def check_folder(folder: Path) -> dict[str, type]:
    """Check a saved pipeline's folder without reading weights. Returns the classes of its components by name.

    Raises TextlocError if the architecture is unknown, if a component's class is not from diffusers or transformers, if
    a file is missing, damaged or not a regular file, or if weights are not in safetensors files or are integers.
    """
    if not (folder / "model_index.json").exists():
        if (folder / "modular_model_index.json").exists():
            raise TextlocError(
                f"{folder} holds a modular pipeline, like that of FLUX.3; modular pipelines cannot be patched"
            )
        raise TextlocError(f"no saved pipeline in {folder} (model_index.json is missing)")
    parts = component_classes(read_config(folder / "model_index.json"), str(folder))
    for part, part_class in parts.items():
        if part not in _OFF:
            _check_part(folder / part, part, part_class)
    return parts


def _check_part(place: Path, part: str, part_class: type) -> None:
    if not place.is_dir():
        raise TextlocError(f"folder {place} is missing; restore it, or train or download the model again")
    for file in place.iterdir():
        if not file.is_file() and not file.is_dir():
            raise TextlocError(f"{file} is missing or not a regular file; restore it")
    if issubclass(part_class, nn.Module):
        config = read_config(place / "config.json")
        if part in ("transformer", "unet"):
            architecture(config.get("_class_name", part_class.__name__))
        _check_weights(place)
    elif issubclass(part_class, SchedulerMixin):
        read_config(place / "scheduler_config.json")
    elif issubclass(part_class, PreTrainedTokenizerBase):
        read_table(place / "tokenizer_config.json")
        if not any(file for name in _VOCABULARIES for file in place.glob(name)):
            raise TextlocError(f"{place} has no vocabulary (tokenizer.json); restore it, or download it again")
        for table in place.glob("*.json"):
            read_table(table)


def component_classes(index: dict, source: str) -> dict[str, type]:
    """Return the classes of the components that a ``model_index.json`` names.

    Raises TextlocError if a class is not from diffusers or transformers, or if the denoiser cannot be patched.
    """
    name = index.get("_class_name")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(pipeline) and issubclass(pipeline, DiffusionPipeline)) or pipeline is DiffusionPipeline:
        raise TextlocError(f"{source} is a pipeline of class {name!r}, which this version of diffusers does not have")
    found = {}
    for part, value in index.items():
        # A setting may also be a list (Krea-2's text_encoder_select_layers).
        named = isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
        if not part.startswith("_") and named:
            library, name = value
            found[part] = _known_class(part, library, name, source)
    denoiser = next((found[part] for part in ("transformer", "unet") if part in found), None)
    if denoiser is None:
        raise TextlocError(f"{source} has no denoiser: neither a transformer nor a unet")
    architecture(denoiser.__name__)
    return found


def _known_class(part: str, library: str, name: str, source: str) -> type:
    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if home is None and re.fullmatch(r"[a-z]\w*", library) and part not in _OFF:
        # Some pipelines define their own component classes.
        own = f"diffusers.pipelines.{library}"
        home = importlib.import_module(own) if importlib.util.find_spec(own) else None
    found = getattr(home, name, None) if re.fullmatch(r"[A-Za-z]\w*", name) else None
    if part in _OFF:
        return object  # it is left out
    if not (inspect.isclass(found) and hasattr(found, "from_pretrained")) or issubclass(found, DiffusionPipeline):
        raise TextlocError(
            f"{source} loads its {part} from {library}.{name}; allowed: classes of diffusers and transformers"
        )
    return found


def _check_weights(folder: Path) -> None:
    files = _weight_files(folder)
    if not files:
        raise TextlocError(f"no weight file (*.safetensors) in {folder}; restore it, or train or download it again")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            what = "missing" if not file.is_file() else f"corrupt ({first_line(error)})"
            raise TextlocError(f"weight file {file} is {what}; restore it, or train or download it again") from None
        for name, kind in kinds.items():
            if kind not in _FRACTIONS and not re.search("(_ids|_index|_tracked)$", name):
                raise TextlocError(f"weight file {file} stores {name} as {kind}; allowed: {', '.join(_FRACTIONS)}")


def _weight_files(folder: Path) -> list[Path]:
    files = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index*.json"):
        listed = read_config(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) and "/" not in v for v in listed.values()):
            raise TextlocError(f"{index} is corrupt: it has no weight_map; restore it, or download it again")
        files |= {folder / name for name in listed.values()}
    return sorted(files)


def _variant(folder: Path, wanted: str | None) -> str | None:
    """The variant of a component's weights: the wanted one if present, else the plain one, else any that is present."""
    pattern = re.compile(r"[\w-]+?(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors")
    found = [match for file in folder.glob("*.safetensors") if (match := pattern.fullmatch(file.name))]
    there = {match[1] or match[2] or "" for match in found}
    return wanted if wanted in there or not there else min(there) or None


# --- loading ----------------------------------------------------------------------------------------------------


def check_no_file(path: str | Path, chosen: ModelSpec) -> None:
    """Raise TextlocError for a checkpoint that is a single file. The message says how to convert it to a folder."""
    if Path(path).is_file():
        convert = f"P.from_single_file('{path}').save_pretrained('FOLDER')"
        raise TextlocError(
            f"{path} is a single file, but a folder in diffusers' format is needed; convert it once with "
            f'python -c "from diffusers import {chosen.pipeline} as P; {convert}"'
        )


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    model_path: str | Path | None = None,
    variant: str | None = None,
) -> Model:
    """Load a model by name, or from ``model_path``, which is a saved pipeline's folder or a hub repository.

    If a component has several sets of weight files, ``variant`` says which set to use, for example ``fp16``.

    Full-size models use their spec's dtype on CUDA. Miniatures, and all models on the CPU, compute in float32 unless
    ``dtype`` is given. Raises TextlocError for an unknown model, a missing or corrupt file, weights that cannot be
    downloaded, or a device that is not present.
    """
    if model_path is not None and name in MINIATURES:
        chosen = _miniature_spec(name, Path(model_path))
    else:
        chosen = spec(name)
        if model_path is not None:
            check_no_file(model_path, chosen)
            chosen = replace(chosen, source=str(model_path), revision=None)
    if variant is not None:
        chosen = replace(chosen, variant=variant)
    local = chosen.miniature or (model_path is not None and not _is_repository(str(model_path)))
    place = pick_device(device)
    if dtype is None:
        dtype = chosen.dtype if place.type == "cuda" and not chosen.miniature else torch.float32
    elif place.type == "cpu" and dtype not in (torch.float32, "float32"):
        raise TextlocError(f"dtype {dtype} was requested, but the CPU computes only in float32")
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise TextlocError(f"unknown dtype {dtype!r}; allowed: float32, float16, bfloat16")
        dtype = getattr(torch, dtype)
    quiet_libraries()
    folder = Path(chosen.source) if local else _fetched(chosen)
    if variant is not None and not any(folder.glob(f"*/*.{variant}*.safetensors")):
        raise TextlocError(
            f"{folder} has no weight files of the variant {variant!r}; omit --variant, or give another one"
        )
    pipe = _from_folder(chosen, folder, dtype)
    # Only the device is given. With the dtype, this call would also convert the parts of T5 that must stay in float32.
    pipe.to(place)
    stage2 = _load_stage2(chosen, pipe, local, dtype)
    if seeing := (chosen.trained or {}).get("seeing"):
        from textloc_utils.miniatures import planted

        planted.install(pipe, chosen, seeing)  # it was trained like this, and writes nothing otherwise
    return Model.from_pipeline(pipe, chosen, stage2 and stage2.to(place))


def _load_stage2(
    chosen: ModelSpec, pipe: DiffusionPipeline, local: bool, dtype: torch.dtype
) -> DiffusionPipeline | None:
    """Load stage II, which uses stage I's text encoder. A local full-size model may have no stage II."""
    source = chosen.stage2
    if source is None:
        return None
    if local:
        folder = Path(chosen.source) / ("stage2" if _is_repository(source) else source)
        if not chosen.miniature and not folder.is_dir():
            return None
    else:
        folder = _fetched(replace(chosen, source=source))
    return _from_folder(chosen, folder, dtype, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)


def _is_repository(path: str) -> bool:
    """Whether a path is the name of a hub repository: "owner/name", if there is no local folder "owner"."""
    here = Path(path)
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None and not here.exists() and not here.parent.is_dir()


def _fetched(chosen: ModelSpec) -> Path:
    """The local folder of a hub repository's pipeline. It is downloaded if needed, after a check of its index."""
    how = {"revision": chosen.revision, "use_safetensors": True}
    try:
        component_classes(DiffusionPipeline.load_config(chosen.source, revision=chosen.revision), chosen.source)
        return Path(DiffusionPipeline.download(chosen.source, variant=chosen.variant, **how))
    except TextlocError:
        raise
    except Exception as error:
        # The libraries raise many unrelated classes here. The first line says which file or host it was.
        licence = f"accept the licence at https://huggingface.co/{chosen.source}, " if chosen.gated else ""
        raise TextlocError(
            f"the weights of {chosen.name} are not on this machine and cannot be downloaded ({first_line(error)}); "
            f"{licence}run 'hf auth login' and try again, or give a downloaded folder with --model-path"
        ) from error


def _from_folder(chosen: ModelSpec, folder: Path, dtype: torch.dtype, **components) -> DiffusionPipeline:
    parts = check_folder(folder)
    with _told_in_one_line(f"{chosen.name} cannot be loaded from {folder}"):
        for part, part_class in parts.items():
            if part not in components and part not in _OFF and issubclass(part_class, nn.Module):
                components[part] = _whole(part_class, folder / part, chosen.variant, dtype)
        pipeline = getattr(diffusers, read_config(folder / "model_index.json")["_class_name"])
        takes = inspect.signature(pipeline.__init__).parameters
        off = {k: v for k, v in _OFF.items() if k in takes}
        pipe = pipeline.from_pretrained(folder, local_files_only=True, **off, **components)
        _try_parts(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _try_parts(pipe: DiffusionPipeline) -> None:
    """Use the scheduler and each tokenizer once, because wrong settings show only in a call."""
    for name, part in pipe.components.items():
        if isinstance(part, SchedulerMixin):
            part = copy.deepcopy(part)
            part.set_timesteps(2, **({"mu": 1.0} if part.config.get("use_dynamic_shifting") else {}))
        elif isinstance(part, PreTrainedTokenizerBase):
            tokens = part("A sign", padding="max_length", max_length=8, truncation=True).input_ids
            encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
            known = getattr(getattr(encoder, "config", None), "vocab_size", None)
            if known is not None and max(tokens) >= known:
                raise TextlocError(
                    f"{name} gives token {max(tokens)}, but its text encoder knows only {known} tokens; restore both"
                )
            if not isinstance(part.model_max_length, int) or part.model_max_length < 1:
                raise TextlocError(f"{name} has {part.model_max_length!r} as model_max_length; restore it")


def _whole(part_class: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """Load a component and require that every tensor comes from its files. The libraries make missing ones random.

    The dtype must be given. Otherwise a text encoder takes the dtype of its file.
    """
    how = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, told = part_class.from_pretrained(folder, variant=_variant(folder, variant), dtype=dtype, **how)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in first_line(error):
            raise
        raise TextlocError(f"the weights in {folder} do not have the shapes in its config.json; restore both") from None
    lost = sorted(told["missing_keys"])
    if lost:
        raise TextlocError(
            f"the tensor {lost[0]} is missing in the weight files of {folder}; restore them, or train again"
        )
    return module


@contextlib.contextmanager
def _told_in_one_line(what: str):
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except TextlocError:
        raise
    except Exception as error:
        raise TextlocError(f"{what}: {first_line(error)}") from error
