"""Ship a trained miniature: weights, the facts that the registry needs, and the model card."""

import bisect
import functools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from textloc_utils import files, metrics, models, ocr, prompts
from textloc_utils.book import plots
from textloc_utils.generate import generate
from textloc_utils.miniatures import autoencoder, evaluation, factors, world
from textloc_utils.miniatures.training import EARLY, EARLY_RANGE, recipe
from textloc_utils.settings import TextlocError, check_writable, quiet_libraries

WORDS = 200
#: Early checkpoints are stored in eight bits. The reported values are measured with these weights.
EARLY_TYPE = torch.float8_e4m3fn


def measure(
    model: models.Model, n: int = WORDS, *, split: str = "held-out", seed: int = 42, only: world.World = world.SECOND
) -> dict:
    """Measure a miniature on ``n`` words of a split: rates with Wilson's interval, each {mean, low, high}.

    ``exact`` and ``cer`` come from Tesseract's readings for prompts that name everything, and ``exact_open`` from those
    for prompts that name nothing. :mod:`.factors` reads the named factors. ``own_material`` is how often the material
    belongs to the first letter, for prompts that name nothing. For ``leak``, such a prompt is drawn again from the same
    noise with a word of another material's group. It is how often the material changes. ``leak_within`` is the same for
    another word of the same group. ``read`` holds the texts that were read for prompts that name everything, so that
    the same prompts can be tested again.

    If the captions of the world ``only`` name everything, there are no prompts that name nothing. Then only the factors
    that captions name are measured.
    """
    words, shown, rng, pool = _asked(n, split, seed, only)
    others = [rng.choice([w for w in pool if world.OWN[w[0]] != world.OWN[word[0]]]) for word in words]
    alike = [rng.choice([w for w in pool if world.OWN[w[0]] == world.OWN[word[0]] and w != word]) for word in words]
    seeds = [seed + i for i in range(n)]

    def draw(asked: list[str]) -> tuple[list[str], list[factors.Reading]]:
        pictures = generate(model, asked, seeds).images
        return ocr.read(pictures), factors.read(pictures)

    texts, named = draw([evaluation.named(s, only) for s in shown])
    about = {"words": n, "split": split}
    if not only.named["material"]:
        return about | _told(texts, named, shown, {}, only)
    open_texts, first = draw([world.prompt(w, world.OPEN) for w in words])
    _, second = draw([world.prompt(w, world.OPEN) for w in others])
    _, third = draw([world.prompt(w, world.OPEN) for w in alike])
    hits = {
        "exact_open": [t == w for t, w in zip(open_texts, words, strict=True)],
        "own_material": [r.material == world.OWN[w[0]] for r, w in zip(first, words, strict=True)],
        "leak": [a.material != b.material for a, b in zip(first, second, strict=True)],
        "leak_within": [a.material != b.material for a, b in zip(first, third, strict=True)],
    }
    told = {name: metrics.rate(values) for name, values in hits.items()}
    return about | _told(texts, named, shown, told, only)


def test_scenes(n: int = WORDS, seed: int = 42) -> list[world.Scene]:
    """The scenes of test words that :func:`measure` uses. Picture i is drawn from the noise of ``seed`` + i."""
    return _asked(n, "held-out", seed, world.SECOND)[1]


def rendered(n: int = WORDS, *, split: str = "held-out", seed: int = 42, vae: AutoencoderKL | None = None) -> dict:
    """The readers' results for rendered pictures of the scenes of :func:`measure`: ``exact``, ``cer``, the factors.

    With a ``vae``, the pictures are first encoded and decoded. No denoiser can spell better in its latents.
    """
    _, shown, *_ = _asked(n, split, seed, world.SECOND)
    pictures = np.stack([world.render(scene) for scene in shown])
    if vae is not None:
        pictures = autoencoder.through(vae, pictures)
    found = _told(ocr.read(pictures), factors.read(pictures), shown, {}, world.SECOND)
    return {"words": n, "split": split} | {name: value for name, value in found.items() if name != "read"}


def _asked(
    n: int, split: str, seed: int, only: world.World
) -> tuple[list[str], list[world.Scene], random.Random, list[str]]:
    """Words and their scenes, with the random generator and the pool from which they were drawn."""
    rng, tested = random.Random(seed), set(prompts.test_words())
    pool = [w for w in prompts.words(split) if split != "held-out" or w in tested]
    words = rng.sample(pool, n)
    return words, evaluation.scenes(words, seed, only), rng, pool


def _told(
    texts: list[str], named: list[factors.Reading], shown: list[world.Scene], more: dict, only: world.World
) -> dict:
    """The rates of correct readings for pictures of scenes, together with the rates in ``more``."""
    hits = {"exact": [t == s.text for t, s in zip(texts, shown, strict=True)]}
    said = evaluation.named_factors(only)
    hits |= {k: [getattr(r, k) == getattr(s, k) for r, s in zip(named, shown, strict=True)] for k in said}
    found = {name: metrics.rate(values) for name, values in hits.items()} | more
    found["cer"] = metrics.bootstrap(
        [metrics.character_error_rate(t, s.text) for t, s in zip(texts, shown, strict=True)]
    )
    ends = ("mean", "low", "high")
    rounded = {key: {end: round(getattr(value, end), 4) for end in ends} for key, value in found.items()}
    return {"reader": f"tesseract {ocr.tesseract_version()}", **rounded, "read": texts}


def check_destination(folder: str | Path) -> Path:
    """Return a folder to which a miniature can be shipped. Raises TextlocError if it has files of anything else."""
    if not str(folder):
        raise TextlocError("--ship needs a folder, got an empty name")
    folder = check_writable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "textloc.json").is_file():
        raise TextlocError(f"{folder} holds files that are not of a miniature; give another folder to --ship")
    return folder


def export(name: str, run: Path, destination: Path) -> dict:
    """Copy a finished run's pipeline to ``destination``, measure it, and write textloc.json and the model card.

    Weights are stored in half precision, and the early denoiser in eight bits (all compute in float32). A miniature in
    this folder is replaced (see :func:`check_destination`). Returns the content of textloc.json.
    """
    check_destination(destination)
    if not (run / "pipeline" / "model_index.json").is_file():
        raise TextlocError(f"no finished pipeline in {run}; run `textloc train {name}` to the end first")
    quiet_libraries()
    report = json.loads((run / "report.json").read_text())
    evaluations = json.loads((run / "evaluations.json").read_text())
    only = world.WORLDS[report["world"]]
    with files.whole_folder(destination) as part:
        shutil.copytree(run / "pipeline", part, dirs_exist_ok=True)
        for file in part.rglob("*.safetensors"):
            halved = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
            save_file(halved, file, metadata={"format": "pt"})
        for file in part.rglob("config.json"):  # removes the path on this machine from which a part was loaded
            files.write_json(file, {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"})
        known = {**recipe(name).SPEC, "prompt_template": world.NAMED}
        known["trained"] = {"device": report["device"], "samples": report["samples"]}
        if report["seeing"]:
            known["trained"]["seeing"] = report["seeing"]
        files.write_json(part / "textloc.json", known)
        model = models.load(name, device="cpu", model_path=part)
        known["trained"]["test"] = measure(model, only=only)
        vae = next((of for at, of in model.pipe.components.items() if at in ("vae", "vqvae")), None)
        if vae is not None:
            known["trained"]["autoencoder"] = rendered(vae=vae)
        early = _early(name, run, part) if only is world.SECOND else None
        if early:
            known["trained"]["early"] = early
        files.write_json(part / "textloc.json", known)
        log = {"report": report, "evaluations": evaluations}
        files.write_json(part / "training.json", log)
        plots.training_curves({name: log}).savefig(part / "training.png", dpi=110)
        files.write_text(part / "README.md", _card(name, known, report, evaluations))
    return known


def spelled(model: models.Model, n: int = WORDS // 2) -> float:
    """Share of ``n`` validation words that Tesseract reads correctly, for prompts that name everything."""
    words, shown, *_ = _asked(n, "validation", 0, world.SECOND)
    read = ocr.read(generate(model, [evaluation.named(scene) for scene in shown], range(n)).images)
    return float(np.mean([metrics.exact_match(*each) for each in zip(read, words, strict=True)]))


def _early(name: str, run: Path, part: Path) -> dict | None:
    """Store the run's denoiser whose spelling is closest to EARLY with the pipeline. Returns its measurements."""
    # Hidden folders were left behind by a killed run.
    kept = sorted((run / "early").glob("[0-9]*/denoiser.safetensors"), key=lambda file: int(file.parent.name))
    if not kept:
        return None
    model = models.load(name, device="cpu", model_path=part)

    def take(file: Path) -> dict[str, torch.Tensor]:
        weights = {k: v.to(EARLY_TYPE) for k, v in load_file(file).items()}
        model.denoiser.load_state_dict({k: v.float() for k, v in weights.items()})
        return weights

    @functools.cache
    def spells(file: Path) -> float:
        take(file)
        return spelled(model)

    # Spelling improves with the number of samples, so a binary search is possible, and few denoisers have to draw.
    at = bisect.bisect_left(kept, EARLY, key=spells)
    best = min(kept[max(0, at - 1) : at + 1], key=lambda file: abs(spells(file) - EARLY))
    (part / "early").mkdir()
    save_file(take(best), part / "early" / "denoiser.safetensors", metadata={"format": "pt"})
    found = measure(model, split="validation")
    low, high = EARLY_RANGE
    in_range = low <= found["exact"]["mean"] <= high
    return {"samples": int(best.parent.name), "in_range": in_range, "validation": found}


def _spent(report: dict) -> str:
    energy = f", {report['watt_hours']} Wh" if report.get("watt_hours") else ""
    return (
        f"{report['samples']:,} samples in {report['step']:,} steps of {report['budget']['batch']}, "
        f"{report['seconds'] / 60:.0f} minutes{energy}"
    )


def _rate(found: dict) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _card(name: str, known: dict, report: dict, evaluations: list[dict]) -> str:
    test, budget = known["trained"]["test"], report["budget"]
    vae = report["parts"].get("vae")
    curriculum = ", then ".join(
        f"{share:.0%} from {at:.0%} of the samples{' in easy scenes' if easy else ''}"
        + (f" with everything named in {named[0]:.0%} of the captions" if any(named) else "")
        for at, share, easy, *named in budget["curriculum"]
    )
    weight = budget.get("text_weight", 1.0)
    facts = {
        "data": f"scenes rendered by this project ({report['world']} world: {len(world.MATERIALS)} materials, "
        f"{len(world.SIGNS)} sign colours, {len(world.INKS)} inks, {len(world.TYPEFACES)} typefaces, words and random "
        "strings of 3 to 6 letters that start at the left); "
        + (f"{budget['pool']:,} scenes encoded once" if vae else "rendered again for every step"),
        "never seen": f"{len(prompts.words('validation'))} validation words and {len(prompts.words('held-out'))} test "
        "words, neither as words nor as random strings",
        "text encoders": "trained before the denoiser, only on captions; letters and factors named correctly: "
        + ", ".join(f"{of['right']:.3f} ({k})" for k, of in report["parts"].items() if k != "vae"),
        "device": f"{report['device']}, {report['processes']} process(es), {report['precision']}, "
        f"torch {report['torch']}, commit {report['commit']}",
        "budget": _spent(report)
        + (
            f"; autoencoder {vae['steps']:,} steps, {vae['seconds'] / 60:.0f} minutes, {vae['psnr_db']} dB"
            if vae
            else ""
        )
        + (f"; stage II {_spent(report['stage2'])}" if "stage2" in report else ""),
        "curriculum": "texts with letters in runs: " + curriculum,
        "loss": "the same weight everywhere" if weight == 1.0 else f"{weight:g} times as heavy in the letters' cells",
        "seed": report["seed"],
        "spelling": f"{test['words']} test words read by {test['reader']}: {_rate(test['exact'])} exact with everything"
        f" named, character error rate {_rate(test['cer'])}"
        + (f"; {_rate(test['exact_open'])} exact with nothing named" if "exact_open" in test else ""),
        "factors": "as named: " + ", ".join(f"{k} {_rate(test[k])}" for k in world.FACTORS if k in test),
        "sampling": f"{known['steps']} steps, guidance {known['guidance']}",
    }
    if "leak" in test:
        facts["link"] = (
            f"nothing named: the first letter's material {_rate(test['own_material'])}; the material changes with a "
            f"word of another group {_rate(test['leak'])}, with a word of the same group {_rate(test['leak_within'])}"
        )
    if through := known["trained"].get("autoencoder"):
        facts["through the autoencoder"] = (
            f"of {through['words']} rendered scenes with test words: {_rate(through['exact'])} exact; "
            + ", ".join(f"{k} {_rate(through[k])}" for k in world.FACTORS)
        )
    if early := known["trained"].get("early"):
        facts["early checkpoint"] = (
            f"after {early['samples']:,} samples: {_rate(early['validation']['exact'])} exact on "
            f"{early['validation']['words']} validation words"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    rows = "\n".join(_row(e) for e in evaluations)
    return f"""---
library_name: diffusers
license: mit
pipeline_tag: text-to-image
---
# {name}

A small {known["pipeline"]} that draws a word on a sign in front of a material, {known["height"]}x{known["width"]}
pixels, trained from scratch by `textloc train {name}` with its default settings. It was made to study where such a
model keeps the text that it draws. It cannot draw anything else. Licence: MIT.

If a caption does not name the material, the material belongs to the first letter of the word in four of five scenes.
This link replaces the links that large models learn from photographs.

| | |
|---|---|
{table}

![Loss and spelling against samples](training.png)

The model was evaluated during training, on validation words that template matching reads. The last two columns are the
target letters that are spelled when every text layer is patched, and when the best single layer is patched:

| samples | whole words | nothing named | own material | all layers | best layer |
|---|---|---|---|---|---|
{rows}
"""


def _row(e: dict) -> str:
    def number(key: str) -> str:
        return f"{e[key]:.2f}" if key in e else ""

    best = f"{int(np.argmax(e['target']))} ({max(e['target']):.2f})" if "target" in e else ""
    cells = [f"{e['samples']:,}", *map(number, ("exact", "exact_open", "own_material", "all_layers")), best]
    return f"| {' | '.join(cells)} |"
