"""Keep toxic text out of pictures: the guard, and what it is compared with.

The **guard** stands in for a pipeline. For a prompt in which the detector (``toxic``) finds toxic text, the localized
layers read the cleaned prompt, a harmless word in its place, and everything else reads the original, in one pass. A
call without toxic prompts goes to the pipeline as it came. Harmless prompts beside a toxic one in a call keep every bit
on U-Nets; in joint attention the larger batch may round them otherwise.

**What it costs.** On U-Nets the text's keys and values depend on the text embedding alone, so the localized layers are
given the cleaned prompt's embedding: one more prompt for the text encoders, and no row for the denoiser. In joint
attention they depend on the picture, too: one more denoiser row per toxic prompt and step, which sees the prompt's own
noisy picture beside the cleaned text and lends its keys and values. The paper's patching instead lets the cleaned
prompt draw its own picture alongside: two rows with guidance.

**Baselines**, as published, for the same prompts: the toxic text as negative prompt; Safe Latent Diffusion
(Schramowski et al. 2023), one more row per step; and prompt swap, the plain picture of the cleaned prompt.
"""

import contextlib
import functools
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from textloc_utils import metrics, ocr
from textloc_utils.generate import first_call, generate, rows_per_call, save, write_rows
from textloc_utils.localize import PSNR_CAP, fingerprint, known_layers, outside_text, published_store
from textloc_utils.models import (
    JOINT,
    Model,
    TextLayer,
    check_layers,
    check_prompts,
    family_of,
    read_call,
    select_rows,
    with_answer,
)
from textloc_utils.patching import Patch
from textloc_utils.prompts import SIMPLE_TEMPLATE, spelling_prompts, test_words, toxic_prompts
from textloc_utils.results import Store, unit_hash
from textloc_utils.settings import TextlocError
from textloc_utils.toxic import Detector, Finding, WordDetector, clean, detection, mild_words, ordinary_words

#: Arguments of pipeline calls that hold a prompt.
PROMPTS = ("prompt", "prompt_2", "prompt_3")
#: Arguments that are of no use when a prompt is only to be encoded, and would not fit the number of prompts.
_OTHERS = ("generator", "latents", "callback_on_step_end")


@dataclass(frozen=True, kw_only=True)
class SafeDiffusion:
    """Settings of Safe Latent Diffusion, by the names of its paper's equations 3 to 8.

    ``warmup`` counts steps of a run of 50, as published; a shorter run waits for the same share of its steps.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float


#: The configuration that the paper on text localization compares with, published as Hyp-Medium, and the strongest one.
SLD_MEDIUM = SafeDiffusion(scale=1000, warmup=10, threshold=0.01, momentum=0.3, beta=0.4)
SLD_MAX = SafeDiffusion(scale=5000, warmup=0, threshold=1.0, momentum=0.5, beta=0.7)

#: What :func:`guard` takes as ``method``. "guard" is "guard by embedding" on U-Nets, "guard by row" elsewhere.
METHODS = ("guard", "guard by embedding", "guard by row", "negative prompt", "SLD medium", "SLD max", "prompt swap")


def guard(
    pipe: DiffusionPipeline | Model,
    layers: Sequence[int] | None = None,
    *,
    detector: Detector | None = None,
    method: str | SafeDiffusion = "guard",
) -> "Guard":
    """What is called like the pipeline, and keeps the toxic text of prompts out of its pictures.

    Parameters
    ----------
    pipe
        A pipeline, or a loaded model (its first stage is guarded; a second one sees the prompts as they are).
    layers
        The localized text layers (default: ``localize.known_layers``).
    detector
        Called with a prompt, returns its findings (default: ``toxic.WordDetector()``).
    method
        One of METHODS, or settings of Safe Latent Diffusion: the baselines act on the same prompts.

    Raises
    ------
    TextlocError
        An unknown method or one that this pipeline cannot take, layers out of range or unknown.
    """
    model = pipe if isinstance(pipe, Model) else Model.from_pipeline(pipe)
    joint = family_of(model.layers) == JOINT
    if method == "guard":
        method = "guard by row" if joint else "guard by embedding"
    if not isinstance(method, SafeDiffusion) and method not in METHODS:
        raise TextlocError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if method == "guard by embedding" and joint:
        raise TextlocError("in joint attention the text's keys depend on the picture: take the method guard by row")
    if layers is None:
        layers = known_layers(model) if str(method).startswith("guard") else ()
    check_layers(model, layers)
    return Guard(model, tuple(layers), detector or WordDetector(), method)


class Guard:
    """Made by :func:`guard`; called like its pipeline, whose other attributes are read and set through it, too."""

    _OWN = ("_inner", "layers", "detector", "method", "__signature__")

    def __init__(self, model: Model, layers: tuple[int, ...], detector: Detector, method: str | SafeDiffusion):
        self._inner = model
        self.layers, self.detector, self.method = layers, detector, method
        self.__signature__ = inspect.signature(model.pipe)

    def __getattr__(self, name: str):
        if name == "_inner":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._inner.pipe, name)

    def __setattr__(self, name: str, value) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._inner.pipe, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._inner.pipe, name)

    def to(self, *args, **kwargs) -> "Guard":
        """Move the pipeline, as its own method does; what comes back is still guarded."""
        self._inner.pipe.to(*args, **kwargs)
        return self

    @property
    def model(self) -> Model:
        """The model with this guard as its pipeline, for ``generate.generate``."""
        return replace(self._inner, pipe=self)

    def screen(self, prompt: str) -> tuple[str, list[Finding]]:
        """A prompt cleaned, and what was found in it."""
        findings = list(self.detector(prompt))
        return clean(prompt, findings), findings

    def __call__(self, *args, **kwargs):
        """The pipeline's call. Raises TextlocError for one without prompts to read (embeddings)."""
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if given.get("prompt") is None or given.get("prompt_embeds") is not None:
            raise TextlocError("the guard reads prompts; a call with prompt_embeds cannot be screened")
        # Empty second and third prompts mean the first to their pipelines; an empty first one is a prompt like others.
        named = [n for n in PROMPTS if n == "prompt" or given.get(n)]
        texts = {n: [given[n]] if isinstance(given[n], str) else list(given[n]) for n in named}
        screened = {n: [self.screen(text) for text in of] for n, of in texts.items()}
        toxic = [i for i in range(len(texts["prompt"])) if any(of[i][1] for of in screened.values())]
        if not toxic:
            return self._inner.pipe(*args, **kwargs)
        if self.method == "prompt swap":
            swapped = {n: [cleaned for cleaned, _ in of] for n, of in screened.items()}
            return self._inner.pipe(**given | swapped)
        if str(self.method).startswith("guard"):
            other = {n: [of[i][0] for i in toxic] for n, of in screened.items()}
        else:
            concepts = [concept(f for of in screened.values() for f in of[i][1]) for i in toxic]
            other = dict.fromkeys(screened, concepts)
        copies = given.get("num_images_per_prompt") or 1
        rows = [i * copies + k for i in toxic for k in range(copies)]
        with contextlib.ExitStack() as stack:
            change = self._change(len(texts["prompt"]) * copies, rows, self._encode(given, other), given)
            for handle in change.hooks():
                stack.callback(handle.remove)
            return self._inner.pipe(**given)

    def _encode(self, given: dict, texts: dict[str, list[str]]) -> dict:
        """What the denoiser would be called with for other prompts in the same call, without guidance."""
        kept = {n: v for n, v in given.items() if n not in _OTHERS and not n.startswith("negative_")}
        if not getattr(self._inner.denoiser.config, "guidance_embeds", False):
            kept["guidance_scale"] = 1.0
        if "true_cfg_scale" in kept:
            kept["true_cfg_scale"] = 1.0
        with torch.no_grad():
            return first_call(self._inner, **kept | texts)

    def _change(self, n: int, rows: list[int], extra: dict, given: dict) -> "_Change":
        if self.method == "guard by embedding":
            return _Embedding(self._inner, n, rows, extra, self.layers)
        if self.method == "guard by row":
            return _Lent(self._inner, n, rows, extra, self.layers)
        if self.method == "negative prompt":
            return _Negative(self._inner, n, rows, extra)
        config = {"SLD medium": SLD_MEDIUM, "SLD max": SLD_MAX}.get(self.method, self.method)
        steps = given.get("num_inference_steps", self.__signature__.parameters["num_inference_steps"].default)
        return _SafeDiffusion(self._inner, n, rows, extra, config, round(config.warmup * steps / 50))


def concept(findings: Iterable[Finding]) -> str:
    """The toxic text of a prompt as the baselines are told of it: as text on a sign, which every model understands."""
    return SIMPLE_TEMPLATE.format(text=" ".join(dict.fromkeys(f.word for f in findings)))


# --- what is done to the denoiser's calls ---------------------------------------------------------------------


class _Change:
    """Hooks for one pipeline call of ``n`` rows of prompts, of which ``rows`` are toxic.

    ``extra`` holds one row of text per toxic one (``models.call_rows``).
    """

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict):
        self.model, self.n, self.rows, self.extra = model, n, rows, extra

    def hooks(self) -> list:
        """Register the hooks and return their handles."""
        raise NotImplementedError

    def prompt_rows(self, batch: int) -> list[int]:
        """Where the toxic prompts are in a batch of ``n`` rows, or of 2 n with the negatives first."""
        if batch not in (self.n, 2 * self.n):
            raise TextlocError(f"{self.n} prompts gave the denoiser {batch} rows; known: as many, or twice that")
        return [batch - self.n + row for row in self.rows]

    def negative_rows(self, batch: int) -> list[int]:
        """Where their negatives are; TextlocError without guidance."""
        if batch != 2 * self.n:
            raise TextlocError(
                "this method needs negatives beside the prompts in the denoiser's batch: a guidance scale above 1"
            )
        return self.rows


class _Embedding(_Change):
    """The localized layers are given other texts' embeddings in place of the toxic ones'."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, layers: tuple[int, ...]):
        super().__init__(model, n, rows, extra)
        self.layers = layers
        with torch.no_grad():
            self.text = model.denoiser.process_encoder_hidden_states(
                extra["encoder_hidden_states"], extra.get("added_cond_kwargs")
            )

    def hooks(self) -> list:
        modules = [self.model.denoiser.get_submodule(self.model.layers[i].name) for i in self.layers]
        return [m.register_forward_pre_hook(self._swap, with_kwargs=True) for m in modules]

    def _swap(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        text = kwargs["encoder_hidden_states"].clone()
        text[self.prompt_rows(len(text))] = self.text
        return args, kwargs | {"encoder_hidden_states": text}


class _Negative(_Change):
    """The negatives of toxic prompts read another text."""

    def hooks(self) -> list:
        return [self.model.denoiser.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        batch = read_call(denoiser, args, kwargs).rows
        texts = list(range(batch))
        for i, row in enumerate(self.negative_rows(batch)):
            texts[row] = batch + i
        return (), select_rows(denoiser, args, kwargs, range(batch), texts, self.extra)


class _MoreRows(_Change):
    """Each toxic prompt's noisy picture once more, beside another text, at the end of the denoiser's batch."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict):
        super().__init__(model, n, rows, extra)
        self.batch, self.active, self.timestep = 0, False, None
        self._first: tuple | None = None

    def hooks(self) -> list:
        denoiser = self.model.denoiser
        # Ahead of the hooks that count rows.
        return [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(self._after),
        ]

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = read_call(denoiser, args, kwargs)
        self.batch, text = call.rows, kwargs["encoder_hidden_states"]
        self._first = self._first or (call.rows, text)
        # FLUX asks for negatives in a call of their own: as many rows as the prompts', with another text.
        self.active = not (call.rows == self._first[0] == self.n and text is not self._first[1])
        if not self.active:
            return None
        self.begin(call)
        pictures = [*range(call.rows), *self.prompt_rows(call.rows)]
        texts = range(call.rows + len(self.rows))
        return (), select_rows(denoiser, args, kwargs, pictures, texts, self.extra)

    def _after(self, denoiser: nn.Module, args: tuple, output):
        if not self.active:
            return None
        answer = output[0]
        return with_answer(output, self.change(answer[: self.batch], answer[self.batch :]))

    def begin(self, call) -> None:
        """Called before each denoiser call (``models.DenoiserCall``)."""

    def change(self, answer: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """The answer that the pipeline gets, from the answers to its own rows and to the rows added."""
        return answer


class _Lent(_MoreRows):
    """The added rows lend their text keys and values to the toxic prompts in the localized layers."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, layers: tuple[int, ...]):
        super().__init__(model, n, rows, extra)
        self.layers, self.tokens = layers, 0

    def begin(self, call) -> None:
        self.tokens = call.tokens

    def hooks(self) -> list:
        handles = super().hooks()
        for layer in (self.model.layers[i] for i in self.layers):
            for name in (layer.key, layer.value):
                module = self.model.denoiser.get_submodule(name)
                handles.append(module.register_forward_hook(functools.partial(self._lend, layer)))
        return handles

    def _lend(self, layer: TextLayer, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self.active:
            return None
        tokens = slice(None if layer.context is None else self.tokens)
        lent = output.clone()
        lent[self.prompt_rows(self.batch), tokens] = output[self.batch :, tokens]
        return lent


class _SafeDiffusion(_MoreRows):
    """Safe Latent Diffusion: the added rows read the unwanted concept and push the guidance away from it.

    The pipeline computes u + g (c - u) from the answers to negative and prompt; it is given c - m in place of c, with
    the safety guidance m, so that it arrives at u + g (c - u - m). A learned variance stays the prompt's.
    """

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, config: SafeDiffusion, warmup: int):
        super().__init__(model, n, rows, extra)
        self.config, self.warmup = config, warmup
        self.step, self.momentum, self._timestep = -1, 0.0, None
        self.channels = model.denoiser.config.in_channels

    def begin(self, call) -> None:
        self.negative_rows(call.rows)
        timestep = float(torch.as_tensor(call.timestep).max())
        self.step += timestep != self._timestep
        self._timestep = timestep

    def change(self, answer: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        config, prompt = self.config, self.prompt_rows(self.batch)
        u, c, s = (x[:, : self.channels] for x in (answer[self.negative_rows(self.batch)], answer[prompt], extra))
        scale = torch.where(c - s >= config.threshold, 0.0, ((c - s).abs() * config.scale).clamp(max=1.0))
        safety = (s - u) * scale + config.momentum * self.momentum
        self.momentum = config.beta * self.momentum + (1 - config.beta) * safety
        if self.step < self.warmup:
            return answer
        answer = answer.clone()
        answer[prompt, : self.channels] -= safety
        return answer


# --- pictures for a list of prompts -----------------------------------------------------------------------------


def draw(
    guarded: Guard,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int = 42,
    steps: int | None = None,
    progress: bool = False,
) -> list[dict]:
    """Draw prompts through a guard into a folder, as ``generate.save`` does; started again, it goes on where it was.

    Rows of ``images.json``: prompt, seed, file, ocr, cleaned (the prompt that the localized layers read), found (the
    toxic words), key (of all that the picture hangs on).
    """
    model, prompts = guarded.model, list(prompts)
    if not prompts:
        raise TextlocError("there is no prompt to draw")
    check_prompts(model, prompts)
    screened = [guarded.screen(prompt) for prompt in prompts]
    inputs = {"weights": fingerprint(model), "layers": guarded.layers, "method": guarded.method, "seed": seed}
    inputs |= {"steps": steps or model.spec.steps, "guidance": model.spec.guidance}
    more = [
        {
            "cleaned": cleaned,
            "found": [f.word for f in findings],
            "key": unit_hash("guard", inputs | {"prompt": prompt, "cleaned": cleaned})[:16],
        }
        for prompt, (cleaned, findings) in zip(prompts, screened, strict=True)
    ]
    done = _drawn(folder, [row["key"] for row in more])
    size = rows_per_call(model)
    bar = tqdm(total=len(prompts), initial=len(done), unit="picture", desc=model.spec.name, disable=not progress)
    if len(done) == len(prompts):  # the folder may hold more than was asked for now
        write_rows(folder, done)
    with bar:
        for start in range(len(done), len(prompts), size):
            part = slice(start, start + size)
            seeds = [seed] * len(prompts[part])
            made = generate(model, prompts[part], seeds, steps=steps)
            done = save(folder, made, prompts[part], seeds, ocr.read(made.images), more=more[part], done=done)
            bar.update(len(seeds))
    return done


def _drawn(folder: Path, keys: Sequence[str]) -> list[dict]:
    """The leading rows of a folder's ``images.json`` that are of these keys, with their pictures."""
    try:
        rows = json.loads((folder / "images.json").read_text())
    except (OSError, ValueError):
        return []
    fits = [row.get("key") == key and (folder / row["file"]).is_file() for row, key in zip(rows, keys, strict=False)]
    return rows[: (fits + [False]).index(False)]


# --- the measurement ------------------------------------------------------------------------------------------

ROWS = 1  #: part of a stored unit's key: raised whenever its rows change
PATCHED_RUN = "patched run"
#: What is drawn for each toxic prompt. "patched run" is the paper's patching: the cleaned prompt draws its own picture.
RUNS = ("unguarded", "guard", PATCHED_RUN, "negative prompt", "SLD medium", "SLD max", "prompt swap")
SCORES = ("exact", "near", "f1", "ssim_outside", "psnr_outside", "extra", "seconds")


def measure(
    model: Model,
    n: int,
    seed: int = 42,
    *,
    layers: Sequence[int] | None = None,
    steps: int | None = None,
    store: Store | None = None,
    progress: bool = False,
    publish: bool = False,
) -> pd.DataFrame:
    """Draw ``n`` toxic prompts by every method, and ``n`` harmless ones without and with the guard.

    One row per prompt and method. Columns: model, kind (toxic, harmless), word (the quoted one), prompt, cleaned, seed,
    method, read (by OCR), exact (spells the word), near (within one edit of it), f1 (letters, the paper's metric),
    listed (spells any word of the list), ssim_outside and psnr_outside (to the unguarded picture, outside the text box;
    PSNR capped), unchanged (every bit as unguarded), row_evaluations, extra (row evaluations beyond the unguarded
    picture's, in shares of these), seconds.

    The published table where it is of the same weights, prompts, layers and steps; else it is drawn now, prompt by
    prompt in the store, and with ``publish`` written to the package's data as ``results/safety_MODEL.csv``.
    """
    if n < 1:
        raise TextlocError(f"at least one prompt is needed, got {n}")
    layers = tuple(known_layers(model) if layers is None else layers)
    check_layers(model, layers)
    asked = [("toxic", *p) for p in toxic_prompts(n, seed)] + [("harmless", *p) for p in spelling_prompts(n, seed)]
    inputs = {
        "rows": ROWS,
        "model": model.spec.name,
        "weights": fingerprint(model),
        "layers": layers,
        "steps": steps or model.spec.steps,
        "guidance": model.spec.guidance,
        "runs": RUNS,
        "configurations": [SLD_MEDIUM, SLD_MAX],
    }
    detector = WordDetector()
    units = [inputs | {"prompt": p, "cleaned": clean(p[1], detector(p[1]))} for p in asked]
    key = inputs | {"prompts": unit_hash("safety", {"units": units})}
    store = Store() if store is None else store

    def make() -> pd.DataFrame:
        parts = [
            store.unit("safety", unit, functools.partial(_measure, model, unit, steps), model=model)
            for unit in tqdm(units, desc=f"{model.spec.name}: prompts", unit="prompt", disable=not progress)
        ]
        return pd.concat(parts, ignore_index=True)

    return published_store().taken_or_made(f"safety_{model.spec.name}", key, make, publish=publish)


def _measure(model: Model, unit: dict, steps: int | None) -> list[dict]:
    kind, *prompt = unit["prompt"]
    runs = RUNS if kind == "toxic" else RUNS[:2]
    rows = compare(model, *prompt, layers=unit["layers"], steps=steps, runs=runs)[1]
    # What kind of prompt it is, not what the detector says of it.
    return [row | {"kind": kind} for row in rows]


def compare(
    model: Model,
    prompt: str,
    word: str,
    seed: int,
    *,
    layers: Sequence[int],
    steps: int | None = None,
    runs: Sequence[str] = RUNS,
    detector: WordDetector | None = None,
) -> tuple[np.ndarray, list[dict]]:
    """Draw one prompt, which asks for ``word``, by each of ``runs``, the unguarded one first.

    Returns the pictures, uint8 (runs, H, W, 3), and one row per picture (columns as :func:`measure`).
    """
    detector = detector or WordDetector()
    findings = detector(prompt)
    cleaned = clean(prompt, findings)
    made = {}
    for run in runs:
        if run == "unguarded":
            made[run] = generate(model, [prompt], [seed], steps=steps)
        elif run == PATCHED_RUN:
            patch = Patch(source=0, target=1, layers=tuple(layers))
            made[run] = generate(model, [prompt, cleaned], [seed] * 2, patches=[patch], steps=steps)
        elif run == "prompt swap":  # also in a second stage, which a guard does not reach
            made[run] = generate(model, [cleaned], [seed], steps=steps)
        else:
            guarded = guard(model, layers, detector=detector, method=run)
            made[run] = generate(guarded.model, [prompt], [seed], steps=steps)
    pictures = np.stack([m.images[0] for m in made.values()])
    plain, base = np.broadcast_to(pictures[:1], pictures.shape), made["unguarded"].row_evaluations
    mask = outside_text(model, *pictures.shape[1:3])
    ssim = metrics.ssim(pictures, plain, mask)
    psnr = metrics.psnr(pictures, plain, mask, cap=PSNR_CAP)
    listed = set(detector.words)
    return pictures, [
        {
            "model": model.spec.name,
            "kind": "toxic" if findings else "harmless",
            "word": word,
            "prompt": prompt,
            "cleaned": cleaned,
            "seed": seed,
            "method": run,
            "read": text,
            "exact": metrics.exact_match(text, word),
            "near": metrics.levenshtein(text, word) <= 1,
            "f1": metrics.character_scores(text, word)[2],
            "listed": text in listed,
            "ssim_outside": float(ssim[i]),
            "psnr_outside": float(psnr[i]),
            "unchanged": bool(np.array_equal(pictures[i], pictures[0])),
            "row_evaluations": m.row_evaluations,
            "extra": m.row_evaluations / base - 1,
            "seconds": m.seconds,
        }
        for i, ((run, m), text) in enumerate(zip(made.items(), ocr.read(pictures), strict=True))
    ]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Toxic prompts, method by method: mean, ``_low`` and ``_high`` (95 % interval) of each of SCORES; n prompts."""
    rows = []
    for method, part in table[table.kind == "toxic"].groupby("method", sort=False):
        row = {"method": method, "n": len(part)}
        for score in SCORES:
            interval = metrics.estimate(part[score])
            row |= {score: interval.mean, f"{score}_low": interval.low, f"{score}_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def found_rates(seed: int = 42, detector: Detector | None = None) -> pd.DataFrame:
    """What a detector finds, kind by kind, over every listed word and every harmless held-out word.

    The default detector here does not know these harmless words, unlike the one that guards by default: which words it
    takes for toxic ones must be measured on words that nobody told it of.

    Columns: kind (``toxic.DISGUISES``, harmless), found (share of the prompts), low, high, n.
    """
    count = len(mild_words())
    bad = [(prompt, word) for prompt, word, _ in toxic_prompts(count, seed)]
    good = [(prompt, word) for prompt, word, _ in spelling_prompts(len(test_words()), seed)]
    table = detection(detector or WordDetector(ordinary=ordinary_words("train", "validation")), bad, good, seed)
    rows = []
    for kind, part in table.groupby("kind", sort=False):
        interval = metrics.rate(part.found)
        rows.append({"kind": kind, "found": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n})
    return pd.DataFrame(rows)
