"""Patched against plain generation with a full-size denoiser of random weights, in one process.

    python tests/benchmarks/full_size.py sdxl sd3 --json full_size.json

Measured is one call of the real diffusers pipeline class: the denoising loop at the registry's picture size, steps
and guidance. Text encoders, tokenizers and the autoencoder are left out: random embeddings of the public shapes come
in, latents go out (DeepFloyd IF: stage I's pixels). What is left out costs the same with and without patches, so
that the ratio here is an upper bound of a whole run's, and the peak is that of the denoiser and its weights.

A batch is ``pairs`` source rows, then ``pairs`` target rows; a pair shares its noise. Patched are the layers that the
paper found, or every text layer where it names none and in tiny models. Plain and patched calls alternate: one of
each for warm-up, then three of each, of which the median counts. Peaks are torch.cuda.max_memory_allocated, weights
included, null elsewhere.

One line of JSON per model; ``--json`` writes the list to a file. Exit status: 0; 1 if a patched call takes more than
1.05 times as long as a plain one on CUDA, or if the patches changed no picture; 2 for a mistake in the command.
``--tiny`` puts the tests' tiny denoisers in place of the full ones, so that the command can be tried on a CPU.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn

from textloc_utils.models import FIXED_TOKENS, FULL_SIZE, Model, ModelSpec, configuration, pick_device
from textloc_utils.patching import Patch, patched
from textloc_utils.settings import TextlocError, quiet_libraries

LIMIT = 1.05
ROUNDS = 3
TINY_PIXELS = 32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: The schedule that Stable Diffusion 1, 2 and XL were trained with.
_STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
#: Pipeline classes that take embeddings in place of prompts, with a scheduler that evaluates the denoiser once a step.
SCHEDULERS = {
    "StableDiffusionXLPipeline": lambda: EulerDiscreteScheduler(**_STABLE, timestep_spacing="leading"),
    "StableDiffusionPipeline": lambda: DDIMScheduler(**_STABLE, clip_sample=False, set_alpha_to_one=False),
    "IFPipeline": lambda: DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        sample_max_value=1.5,
    ),
    "StableDiffusion3Pipeline": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FluxPipeline": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
}
#: Without ldm: its pipeline takes prompts only, and so cannot run without its text encoder.
NAMES = tuple(name for name, spec in FULL_SIZE.items() if spec.pipeline in SCHEDULERS)
#: Builders in tests/tiny.py whose denoisers have the class and conditioning of the full-size ones.
TINY = {
    "sdxl": "sdxl",
    "if": "if",
    "sd3": "sd3",
    "sd15": "ldm",
    "sd21": "ldm",
    "sd35-medium": "sd35",
    "sd35-large": "sd35",
    "flux-dev": "flux",
    "flux-schnell": "flux",
}


def build_denoiser(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A full-size denoiser with torch's initial weights, drawn on the device in ``dtype``: no float32 copy anywhere."""
    config = configuration(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            denoiser = getattr(diffusers, config["_class_name"]).from_config(config)
    finally:
        torch.set_default_dtype(before)
    return denoiser.to(dtype)  # buffers that were computed in float32


def build_tiny_denoiser(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The denoiser of tests/tiny.py that stands for this model."""
    folder = str(Path(__file__).resolve().parent.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    import tiny

    pipe = tiny.BUILDERS[TINY[name]]()
    return (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).to(device, dtype)


def build_pipeline(spec: ModelSpec, denoiser: nn.Module) -> DiffusionPipeline:
    """The model's pipeline class around a denoiser and a scheduler; every other component is None."""
    pipeline_class = getattr(diffusers, spec.pipeline)
    takes = inspect.signature(pipeline_class.__init__).parameters
    parts = {n: None for n, p in takes.items() if n != "self" and p.default is inspect.Parameter.empty}
    parts |= {"scheduler": SCHEDULERS[spec.pipeline](), "transformer" if "transformer" in takes else "unet": denoiser}
    off = {"requires_safety_checker": False, "add_watermarker": False}
    pipe = pipeline_class(**parts | {k: v for k, v in off.items() if k in takes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_embeddings(model: Model, rows: int) -> dict:
    """Keyword arguments that stand for ``rows`` prompts and one negative prompt: normal values, (rows, tokens, width).

    Pooled embeddings, (rows, width), where the model takes them; FLUX takes no negatives.
    """
    spec, config = model.spec, model.denoiser.config
    long = spec.max_sequence_length
    tokens = {"StableDiffusion3Pipeline": FIXED_TOKENS + (long or 0), "FluxPipeline": long}.get(
        spec.pipeline, FIXED_TOKENS
    )
    width = config.get("joint_attention_dim") or config.get("encoder_hid_dim") or config["cross_attention_dim"]
    shapes = {"prompt_embeds": (tokens, width)}
    if spec.pipeline == "StableDiffusionXLPipeline":
        # The rest of the projection's input are six numbers on size and crop.
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes["pooled_prompt_embeds"] = (pooled,)
    elif "pooled_projection_dim" in config:
        shapes["pooled_prompt_embeds"] = (config["pooled_projection_dim"],)
    generator = torch.Generator("cpu").manual_seed(0)
    like = {"device": model.device, "dtype": model.denoiser.dtype}
    out = {name: torch.randn(rows, *shape, generator=generator).to(**like) for name, shape in shapes.items()}
    if spec.pipeline != "FluxPipeline":
        for name, shape in shapes.items():
            one = torch.randn(1, *shape, generator=generator).to(**like)
            out[f"negative_{name}"] = one.expand(rows, *shape)
    return out


def build_model(name: str, *, tiny: bool, device: torch.device, dtype: torch.dtype) -> Model:
    """The registry's model with random weights: full-size, or one of the tests' denoisers."""
    quiet_libraries()
    torch.manual_seed(0)
    spec = FULL_SIZE[name]
    if tiny:
        spec = replace(spec, height=TINY_PIXELS, width=TINY_PIXELS, stage1=None)
    denoiser = (build_tiny_denoiser if tiny else build_denoiser)(name, device, dtype)
    denoiser.eval().requires_grad_(False)
    return Model.from_pipeline(build_pipeline(spec, denoiser), spec)


def _generate(model: Model, embeddings: dict, patches: list[Patch], pairs: int, steps: int):
    """One call of the pipeline: latents or pixels, seconds, and peak bytes on the GPU (None elsewhere)."""
    cuda = model.device.type == "cuda"
    height, width = model.spec.stage1 or (model.spec.height, model.spec.width)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in [*range(pairs)] * 2]
    if cuda:
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    began = time.perf_counter()
    with patched(model, patches, 2 * pairs):
        made = model.pipe(
            **embeddings,
            num_inference_steps=steps,
            guidance_scale=model.spec.guidance,
            height=height,
            width=width,
            generator=generators,
            # IFPipeline has no latents; "pt" are its pixels as they leave the loop
            output_type="pt" if model.spec.pipeline == "IFPipeline" else "latent",
        ).images
    if cuda:
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - began
    return made.float().cpu(), seconds, torch.cuda.max_memory_allocated(model.device) if cuda else None


def measure(model: Model, *, pairs: int, steps: int) -> dict:
    """Alternate plain and patched calls on one batch; what the command prints about a model."""
    embeddings = random_embeddings(model, 2 * pairs)
    found = model.spec.paper_layers
    layers = found if found and max(found) < len(model.layers) else tuple(range(len(model.layers)))
    patches = [Patch(source=row, target=pairs + row, layers=layers) for row in range(pairs)]
    runs = {"plain": [], "patched": []}
    for _ in range(1 + ROUNDS):
        for kind, given in (("plain", []), ("patched", patches)):
            runs[kind].append(_generate(model, embeddings, given, pairs, steps))
    timed = {kind: made[1:] for kind, made in runs.items()}
    seconds = {kind: statistics.median(s for _, s, _ in made) for kind, made in timed.items()}
    peaks = {kind: max((p for _, _, p in made if p is not None), default=None) for kind, made in timed.items()}
    plain, changed = runs["plain"][-1][0], runs["patched"][-1][0]
    differs = [not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    cuda = model.device.type == "cuda"
    return {
        "model": model.spec.name,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "layers": list(layers),
        "device": model.device.type,
        "gpu": torch.cuda.get_device_name(model.device) if cuda else None,
        "dtype": str(model.denoiser.dtype).removeprefix("torch."),
        "latents": list(plain.shape[1:]),
        "steps": steps,
        "guidance": model.spec.guidance,
        "batch": 2 * pairs,
        "plain_seconds": seconds["plain"],
        "patched_seconds": seconds["patched"],
        "ratio": seconds["patched"] / seconds["plain"],
        "plain_peak_bytes": peaks["plain"],
        "patched_peak_bytes": peaks["patched"],
        "finite": bool(plain.isfinite().all() and changed.isfinite().all()),
        "source_rows_changed": sum(differs[:pairs]),
        "target_rows_changed": sum(differs[pairs:]),
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }


def complaint(record: dict) -> str | None:
    """What is wrong with a measurement, in one line; None if nothing is."""
    name, pairs = record["model"], record["batch"] // 2
    if not record["finite"]:
        return f"{name}: the latents are not finite, so that nothing can be told about the patches"
    if record["source_rows_changed"] < pairs:
        return f"{name}: the patches changed {record['source_rows_changed']} of {pairs} source rows"
    if record["device"] == "cuda" and record["ratio"] > LIMIT:
        return f"{name}: patched generation took {record['ratio']:.3f} times as long as plain; allowed: {LIMIT}"
    return None


def _check(args: argparse.Namespace) -> None:
    if wrong := [name for name in args.models if name not in NAMES]:
        raise TextlocError(f"unknown model {wrong[0]!r}; allowed: {', '.join(NAMES)}")
    if args.dtype not in DTYPES:
        raise TextlocError(f"unknown dtype {args.dtype!r}; allowed: {', '.join(DTYPES)}")
    if args.pairs < 1 or (args.steps is not None and args.steps < 1):
        raise TextlocError(f"--pairs and --steps must be at least 1, got {args.pairs} and {args.steps}")
    if args.json and not args.json.absolute().parent.is_dir():
        raise TextlocError(f"cannot write {args.json}: its folder does not exist")


def main(argv: list[str] | None = None) -> int:
    """Measure the named models one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(prog="full_size.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--tiny", action="store_true", help="the tests' tiny denoisers in place of the full ones")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="source and target pairs (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the list of results here as well")
    args = parser.parse_args(argv)
    records = []
    try:
        _check(args)
        device = pick_device(args.device)
        for name in args.models:
            model = build_model(name, tiny=args.tiny, device=device, dtype=DTYPES[args.dtype])
            records.append(measure(model, pairs=args.pairs, steps=args.steps or model.spec.steps))
            print(json.dumps(records[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(records, indent=1) + "\n")
            # The next model needs the memory.
            del model
            gc.collect()
            torch.cuda.empty_cache()
    except TextlocError as error:
        print(f"full_size.py: {error}", file=sys.stderr)
        return 2
    complaints = [text for text in map(complaint, records) if text]
    if complaints:
        print(f"full_size.py: {'; '.join(complaints)}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
