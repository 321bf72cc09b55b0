"""The guard: it is called like its pipeline, and draws toxic prompts without their toxic text."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from textloc_utils.experiment import Experiment, known_layers
from textloc_utils.generate import first_call, save
from textloc_utils.models import ADDED, CROSS, Model, as_indices, check_prompts, family_of
from textloc_utils.patching import Fired, Patch
from textloc_utils.safety.baselines import CONFIGURATIONS, Negative, SafeDiffusion, SafeGuidance, concept
from textloc_utils.safety.calls import Change, Embedding, Lent
from textloc_utils.safety.detector import Detector, Finding, WordDetector, clean, harmless_word
from textloc_utils.settings import TextlocError

#: Arguments of pipeline calls that hold a prompt.
PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
#: Arguments that are not needed to encode prompts, and that may not fit the number of prompts.
_OTHERS = ("generator", "latents", "callback_on_step_end")
#: The values of ``method`` in :func:`guard`. "guard" means "guard by embedding" on U-Nets and "guard by row" otherwise.
METHODS = ("guard", "guard by embedding", "guard by row", "negative prompt", *CONFIGURATIONS, "prompt swap")


def guard(
    pipe: DiffusionPipeline | Model,
    layers: Sequence[int] | int | str | None = None,
    *,
    detector: Detector | None = None,
    method: str | SafeDiffusion = "guard",
    harmless: Callable[[str], str] = harmless_word,
) -> "Guard":
    """Wrap a pipeline so that the toxic text of prompts does not appear in its pictures.

    The guard is called like the pipeline.

    Parameters
    ----------
    pipe
        A pipeline, or a loaded model. Only the first stage is guarded. A second stage reads the original prompts.
    layers
        The localized text layers: one, several, or "all" (default: ``experiment.known_layers``).
    detector
        Function that takes a prompt and returns its findings (default: ``detector.WordDetector()``).
    method
        One of METHODS, or settings of Safe Latent Diffusion. The baselines act on the same prompts.
    harmless
        Function that takes a toxic word and returns its replacement.

    Raises
    ------
    TextlocError
        The method is unknown, the pipeline does not support it, or layers are out of range or unknown.

    Examples
    --------
    >>> guarded = guard(pipe, layers=[2, 3])
    >>> guarded.screen('A sign that says "CLOWN".')[0]
    'A sign that says "HELLO".'
    >>> picture = guarded('A sign that says "CLOWN".', num_inference_steps=2, height=16, width=16).images[0]
    """
    model = Model.of(pipe)
    by_embedding = family_of(model.layers) in (CROSS, ADDED)
    if method == "guard":
        method = "guard by embedding" if by_embedding else "guard by row"
    if not isinstance(method, SafeDiffusion) and method not in METHODS:
        raise TextlocError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    if method == "guard by embedding" and not by_embedding:
        raise TextlocError(
            "guard by embedding needs a U-Net, whose text keys depend only on the text: use the method guard by row"
        )
    if layers is None:
        layers = known_layers(model) if str(method).startswith("guard") else ()
    patch = Patch(source=0, target=1, layers=layers if isinstance(layers, str) else as_indices(layers, "layers"))
    return Guard(model, patch.indices(model), detector or WordDetector(), method, harmless)


class Guard:
    """A guarded pipeline, made by :func:`guard` and called like the pipeline.

    All other attributes of the pipeline are read and set through it. ``fired`` is the record of the last call with
    toxic prompts (``patching.Fired``; None before the first one): which modules took part, at which steps, and on how
    many rows.
    """

    _OWN = ("_inner", "layers", "detector", "method", "harmless", "fired", "__signature__")

    def __init__(
        self,
        model: Model,
        layers: tuple[int, ...],
        detector: Detector,
        method: str | SafeDiffusion,
        harmless: Callable[[str], str],
    ):
        self._inner = model
        self.layers, self.detector, self.method, self.harmless = layers, detector, method, harmless
        self.fired: Fired | None = None
        self.__signature__ = inspect.signature(model.pipe)

    def __getattr__(self, name: str):
        if name == "_inner":  # during the making of a copy
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
        """Move the pipeline, like its own method. The result is still guarded."""
        self._inner.pipe.to(*args, **kwargs)
        return self

    @property
    def model(self) -> Model:
        """The model with this guard as its pipeline, for ``generate.generate``."""
        return replace(self._inner, pipe=self)

    def screen(self, prompt: str) -> tuple[str, list[Finding]]:
        """Return the cleaned prompt and the findings in it."""
        findings = list(self.detector(prompt))
        return clean(prompt, findings, self.harmless), findings

    def __call__(self, *args, **kwargs):
        """Call the pipeline.

        Raises TextlocError if the call has embeddings instead of prompts. Also raises it, and returns no picture, if
        the guard did not work at every step: a module took no part, or the rows are not those of the prompts.
        """
        given = dict(self.__signature__.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if given.get("prompt") is None or given.get("prompt_embeds") is not None:
            raise TextlocError("the guard reads prompts; a call with prompt_embeds cannot be screened")
        # Pipelines replace empty second and third prompts by the first. An empty first prompt is a normal prompt.
        named = [n for n in PROMPTS if n == "prompt" or given.get(n)]
        texts = {n: [given[n]] if isinstance(given[n], str) else list(given[n]) for n in named}
        if any(not isinstance(text, str) for of in texts.values() for text in of):
            raise TextlocError("the guard reads prompts, each a string")
        if len({len(of) for of in texts.values()}) > 1:
            raise TextlocError(f"{' and '.join(named)} must have the same number of prompts")
        screened = {n: [self.screen(text) for text in of] for n, of in texts.items()}
        toxic = [i for i in range(len(texts["prompt"])) if any(of[i][1] for of in screened.values())]
        if not toxic:
            return self._inner.pipe(*args, **kwargs)
        if self.method == "prompt swap":
            swapped = {n: [cleaned for cleaned, _ in of] for n, of in screened.items()}
            return self._inner.pipe(**given | swapped)
        own = {n: [of[i] for i in toxic] for n, of in texts.items()}
        if str(self.method).startswith("guard"):
            other = {n: [of[i][0] for i in toxic] for n, of in screened.items()}
        else:
            concepts = [concept(f for of in screened.values() for f in of[i][1]) for i in toxic]
            other = dict.fromkeys(screened, concepts)
        copies = given.get("num_images_per_prompt") or 1
        rows = [i * copies + k for i in toxic for k in range(copies)]
        known = Model.from_pipeline(self._inner.pipe).denoiser
        if known is not self._inner.denoiser:
            raise TextlocError("the pipeline's denoiser is not the one that was guarded; guard the pipeline again")
        encoded = self._encode(given, {n: own[n] + other[n] for n in own}, 2 * len(rows))
        change = self._change(len(texts["prompt"]) * copies, rows, encoded, given)
        self.fired = change.fired
        with change.in_force():
            return self._inner.pipe(**given)

    def _encode(self, given: dict, texts: dict[str, list[str]], rows: int) -> dict:
        """The denoiser's inputs for other prompts, with ``rows`` rows in total, in a call without guidance."""
        model, row = self._inner, self._inner.architecture
        kept = {n: v for n, v in given.items() if n not in _OTHERS and not n.startswith("negative_")}
        told = row.told or getattr(model.denoiser.config, "guidance_embeds", False)
        if row.guidance in self.__signature__.parameters and not (told and row.guidance == "guidance_scale"):
            kept[row.guidance] = row.above
        if "true_cfg_scale" in kept:
            kept["true_cfg_scale"] = 1.0
        with torch.no_grad():
            found = first_call(model, **kept | texts)
        if not found or len(found[row.text]) != rows:
            raise TextlocError("the pipeline did not call its denoiser with the given prompts; no picture is returned")
        return found

    def _change(self, n: int, rows: list[int], texts: dict, given: dict) -> Change:
        if self.method == "guard by embedding":
            return Embedding(self._inner, n, rows, texts, self.layers)
        if self.method == "guard by row":
            return Lent(self._inner, n, rows, texts, self.layers)
        if self.method == "negative prompt":
            return Negative(self._inner, n, rows, texts)
        config = CONFIGURATIONS[self.method] if isinstance(self.method, str) else self.method
        steps = given.get("num_inference_steps", self.__signature__.parameters["num_inference_steps"].default)
        return SafeGuidance(self._inner, n, rows, texts, config, round(config.warmup * steps / 50))


def draw(
    guarded: Guard,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int = 42,
    steps: int | None = None,
    progress: bool = False,
) -> list[dict]:
    """Draw prompts with a guard, and write the pictures to a folder like ``generate.save``.

    Rows of ``images.json``: prompt, seed, file, ocr, cleaned (the prompt that the localized layers read) and found (the
    toxic words). Each batch is kept in the store of results, so a run that is started again resumes where it stopped.
    """
    model, prompts = guarded.model, list(prompts)
    if not prompts:
        raise TextlocError("there is no prompt to draw")
    check_prompts(model, prompts)
    screened = [guarded.screen(prompt) for prompt in prompts]
    hangs_on = [{"layers": guarded.layers, "method": guarded.method, "cleaned": cleaned} for cleaned, _ in screened]
    run, seeds = Experiment.of(model, steps=steps, progress=progress), [seed] * len(prompts)
    pictures, read = run.drawn(prompts, seeds, hangs_on)
    more = [{"cleaned": cleaned, "found": [f.word for f in findings]} for cleaned, findings in screened]
    return save(folder, pictures, prompts, seeds, read, more=more)
