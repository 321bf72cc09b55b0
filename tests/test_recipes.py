"""The recipes of the miniatures: what they build, that they learn, sample, resume and ship."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, IFSuperResolutionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file, save_file

from textloc_utils import models, prompts
from textloc_utils.generate import generate
from textloc_utils.miniatures import autoencoder, card, data, encoders, evaluation, training, world
from textloc_utils.models import Model, ModelSpec
from textloc_utils.patching import Patch
from textloc_utils.settings import TextlocError, quiet_libraries

quiet_libraries()

#: name -> family, number of text layers
EXPECTED = {
    "sd3-mini": (models.JOINT, 12),
    "sdxl-mini": (models.CROSS, 23),
    "if-mini": (models.ADDED, 10),
    "ldm-mini": (models.CROSS, 11),
}
UNETS = ("sdxl-mini", "if-mini", "ldm-mini")
PROMPT = world.prompt("HELLO", sign="red", shape="sign", material="brick", typeface="serif", ink="white")
TINY = training.Budget(samples=8, autoencoder_steps=2, encoder_steps=2, pool=12, batch=2, evaluations=0, pairs=1)


def ready(rules):
    """The parts of a run as initialised."""
    kinds = {component: encoders.KINDS[kind] for component, (kind, _) in rules.TEXT.items()}
    tokenizers = {component: kind.make_tokenizer() for component, kind in kinds.items()}
    made = {
        component: kind.build(tokenizers[component]).eval().requires_grad_(False) for component, kind in kinds.items()
    }
    vae = autoencoder.build(**rules.LATENTS).eval() if hasattr(rules, "LATENTS") else None
    return training.Prepared(encoders=made, tokenizers=tokenizers, vae=vae, report={})


def build(name):
    rules = training.recipe(name)
    torch.manual_seed(0)
    pipe = rules.pipeline(ready(rules))
    pipe.set_progress_bar_config(disable=True)
    return rules, pipe


def spec(name):
    return ModelSpec(name=name, source="", miniature=True, **training.recipe(name).SPEC)


def batch(name, rules, pipe, n=2):
    """What the trainer hands to an objective: pictures or stand-ins for latents, tokens, noise, and weights."""
    pictures, captions, cells = data.Drawn(world.SECOND).batch(n, 0.5, False, 0.0, random.Random(0))
    if hasattr(rules, "LATENTS"):
        pictures = torch.randn(n, rules.LATENTS["channels"], 8, 16, generator=torch.Generator().manual_seed(0))
        cells = torch.nn.functional.max_pool2d(cells, 8)
    return pictures, rules.tokenize(pipe, captions), training.step_generator(0), 1 + cells


def one_stage_or_two(name, tmp_path):
    """(rules, pipe) of every stage of a recipe."""
    rules, pipe = build(name)
    yield rules, pipe
    if hasattr(rules, "Stage2"):
        pipe.save_pretrained(tmp_path / "first")
        rules = rules.Stage2(tmp_path / "first")
        yield rules, rules.pipeline(None)


@pytest.mark.parametrize("name", EXPECTED)
def test_text_layers_and_weight(name):
    rules, pipe = build(name)
    model = Model.from_pipeline(pipe, spec(name))
    family, layers = EXPECTED[name]
    assert models.family_of(model.layers) == model.spec.family == family
    assert len(model.layers) == layers
    assert type(pipe).__name__ == model.spec.pipeline
    assert (model.pooled_site is None) == (name == "ldm-mini")
    assert sum(p.numel() for p in model.denoiser.parameters()) * 2 < 13e6  # bytes in half precision


def test_layouts_are_the_full_models():
    unet = build("sdxl-mini")[1].unet.config
    full = models.configuration("sdxl")
    assert list(unet.down_block_types) == full["down_block_types"]
    depths = unet.transformer_layers_per_block
    assert depths == sorted(depths) and depths[-1] > depths[0]
    unet = build("if-mini")[1].unet.config
    full = models.configuration("if")
    for key in ("mid_block_type", "addition_embed_type", "cross_attention_norm", "resnet_time_scale_shift", "act_fn"):
        assert unet[key] == full[key]
    assert list(unet.down_block_types) == full["down_block_types"] and unet.out_channels == 2 * unet.in_channels


@pytest.mark.parametrize("name", UNETS)
def test_every_trained_parameter_gets_a_gradient(name, tmp_path):
    """Processes that train together would wait for ever for one that does not."""
    for rules, pipe in one_stage_or_two(name, tmp_path):
        objective = rules.Objective(pipe)
        objective(*batch(name, rules, pipe)).backward()
        assert [n for n, p in objective.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize("name", UNETS)
def test_sixty_steps_on_one_batch_lower_the_loss(name, tmp_path):
    for rules, pipe in one_stage_or_two(name, tmp_path):
        objective = rules.Objective(pipe)
        x, tokens, _, weights = batch(name, rules, pipe)
        optimiser = torch.optim.AdamW(objective.parameters(), lr=1.5e-3, betas=(0.9, 0.98), fused=True)
        losses = []
        for _ in range(60):
            loss = objective(x, tokens, training.step_generator(0), weights)  # the same noise at every step
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        assert np.isfinite(losses).all() and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", UNETS)
def test_the_last_timestep_is_pure_noise_and_the_first_one_sampled(name):
    rules, pipe = build(name)
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-7
    pipe.scheduler.set_timesteps(rules.SPEC["steps"])
    assert pipe.scheduler.timesteps[0] == len(pipe.scheduler.alphas_cumprod) - 1
    objective = rules.Objective(pipe)
    x = torch.randn(2000, 1, 1, 1)
    noisy, velocity, t = objective.diffuse(x, training.step_generator(0))
    assert t.min() < 100 and t.max() > 990 and 0.5 < t.float().mean() / 1000 < 0.72
    clean = objective.alphas[t].sqrt() * noisy[:, 0, 0, 0] - (1 - objective.alphas[t]).sqrt() * velocity[:, 0, 0, 0]
    torch.testing.assert_close(clean, x[:, 0, 0, 0], atol=1e-4, rtol=1e-4)


def ideal_denoiser(alphas, x):
    """What a perfectly trained denoiser answers if ``x`` (B, C, h, w) is the only picture there is."""

    def forward(sample, timestep, *args, return_dict=True, **kwargs):
        at = alphas[torch.as_tensor(timestep).long().reshape(-1)[0]]
        noise = (sample[:, : x.shape[1]] - at.sqrt() * x) / (1 - at).sqrt()
        velocity = at.sqrt() * noise - (1 - at).sqrt() * x
        if return_dict:
            return UNet2DConditionOutput(sample=velocity)
        least = torch.full_like(velocity, -1.0)
        return (torch.cat([velocity, least], dim=1) if x.shape[1] == 3 else velocity,)

    return forward


@pytest.mark.parametrize("name", UNETS)
def test_pipelines_sample_what_the_objective_trains(name, tmp_path, monkeypatch):
    """An ideal denoiser leads both the training's and the pipeline's convention to the one picture."""
    stages = list(one_stage_or_two(name, tmp_path))
    rules, pipe = stages[0]
    x, *_ = batch(name, rules, pipe)
    x = x[:1]
    objective = rules.Objective(pipe)
    model = Model.from_pipeline(pipe, spec(name))
    if len(stages) == 2:
        small = torch.nn.functional.avg_pool2d(x, 2)
        stage2 = IFSuperResolutionPipeline(
            **stages[1][1].components | {k: getattr(pipe, k) for k in ("text_encoder", "tokenizer")},
            requires_safety_checker=False,
        )
        stage2.set_progress_bar_config(disable=True)
        monkeypatch.setattr(pipe.unet, "forward", ideal_denoiser(objective.alphas, small))
        made = generate(model, [PROMPT], [0], guidance=1.0).images
        np.testing.assert_allclose(made[0] / 127.5 - 1, small[0].permute(1, 2, 0), atol=0.02)
        monkeypatch.setattr(stage2.unet, "forward", ideal_denoiser(objective.alphas, x))
        model, wanted = replace(model, stage2=stage2), x
    else:
        monkeypatch.setattr(pipe.unet, "forward", ideal_denoiser(objective.alphas, x))
        vae = pipe.vqvae if name == "ldm-mini" else pipe.vae
        with torch.no_grad():
            wanted = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    made = generate(model, [PROMPT], [0], guidance=1.0).images
    np.testing.assert_allclose(made[0] / 127.5 - 1, wanted[0].permute(1, 2, 0), atol=0.02)


@pytest.mark.parametrize("name", EXPECTED)
def test_evaluation_during_training(name, monkeypatch):
    for key, value in {"WORDS": 2, "STEPS": 1, "SPELLS": -1.0}.items():
        monkeypatch.setattr(evaluation, key, value)
    guided, draw = [], evaluation.generate

    def drawn(*arguments, patches=(), guidance=None, **options):
        guided.append((bool(patches), guidance))
        return draw(*arguments, patches=patches, guidance=guidance, **options)

    monkeypatch.setattr(evaluation, "generate", drawn)
    result = evaluation.evaluate(build(name)[1], spec(name), pairs=1)
    # What is spelled is drawn as the miniature draws; patched pictures are many, and are drawn without guidance.
    assert set(guided) == {(False, None), (True, 1.0)}
    assert len(result["target"]) == len(result["source"]) == len(result["exact_layers"]) == EXPECTED[name][1]
    assert {"exact", "characters", "exact_open", "own_material", "all_layers", *world.FACTORS} <= set(result)
    monkeypatch.setattr(evaluation, "SPELLS", 0.5)  # it spells nothing: no layer is patched alone
    early = evaluation.evaluate(build(name)[1], spec(name), pairs=1)
    assert {"plain_target", "all_layers", "exact_all_layers"} <= early.keys() and "target" not in early


def test_layers_are_patched_alone_as_soon_as_a_patch_of_all_writes(monkeypatch):
    whole = {"plain_target": 0.0, "plain_source": 0.0, "all_layers": 0.5, "exact_all_layers": 0.0}
    asked = []

    def patched(model, pairs, only, *, alone):
        asked.append(alone)
        return whole | ({"target": [0.5]} if alone else {})

    for key, value in {"WORDS": 2, "STEPS": 1, "SPELLS": 0.4, "_patched": patched}.items():
        monkeypatch.setattr(evaluation, key, value)
    assert evaluation.evaluate(build("sd3-mini")[1], spec("sd3-mini"), pairs=1)["target"] == [0.5]
    whole["all_layers"] = 0.3
    assert "target" not in evaluation.evaluate(build("sd3-mini")[1], spec("sd3-mini"), pairs=1)
    assert asked == [False, True, False]


def test_variance_bound_is_zero_for_the_true_step():
    rules, pipe = build("if-mini")
    objective = rules.Objective(pipe)
    x = torch.rand(64, 3, 4, 4) * 2 - 1
    noisy, velocity, t = objective.diffuse(x, training.step_generator(0))
    least, most = (torch.full_like(x, value) for value in (-1.0, 1.0))
    assert objective.bound(velocity, least, x, noisy, t).abs() < 1e-3
    assert objective.bound(velocity, most, x, noisy, t) > objective.bound(velocity, least, x, noisy, t)
    # Nor does a wrong guess make it explode at either end of the schedule.
    for end in (0, 1, 998, 999):
        at = torch.full((64,), end)
        part = objective.alphas[at][:, None, None, None]
        noise, wrong = torch.randn(2, *x.shape, generator=training.step_generator(end))
        assert objective.bound(wrong, least, x, part.sqrt() * x + (1 - part).sqrt() * noise, at) < 10


# --- prompts ----------------------------------------------------------------------------------------------------


def test_if_reads_captions_as_its_pipeline_cleans_them():
    rules, pipe = build("if-mini")
    rng = random.Random(1)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(50)]
    clean = pipe._text_preprocessing(captions, clean_caption=True)
    ours = rules.tokenize(pipe, captions)
    theirs = pipe.tokenizer(clean, padding="max_length", return_tensors="pt")
    assert torch.equal(ours["t5"], theirs.input_ids) and torch.equal(ours["mask"], theirs.attention_mask)


@pytest.mark.parametrize("name", EXPECTED)
def test_pipelines_and_objectives_give_the_denoiser_the_same_text(name, monkeypatch):
    """What the trainer makes of captions is what the pipeline makes of prompts."""
    rules, pipe = build(name)
    model = Model.from_pipeline(pipe, spec(name))
    seen = []

    def look(module, args, kwargs):
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        seen.append(text.chunk(2)[1] if len(text) == 4 else text)

    handle = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    asked = [PROMPT, world.prompt("AB", world.OPEN)]
    generate(model, asked, [1, 1], steps=1)
    handle.remove()
    tokens = rules.tokenize(pipe, asked)
    condition = rules.Objective(pipe).condition(tokens)
    text = condition[0] if isinstance(condition, tuple) else condition["encoder_hidden_states"]
    torch.testing.assert_close(seen[0], text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_an_encoder_learns_from_captions_to_be_read(kind):
    """A hundred steps name letters and factors far better than two; it is then out of training."""
    (_, little), (encoder, much) = (encoders.pretrain(encoders.KINDS[kind], seed=0, steps=n) for n in (2, 100))
    assert much > little + 0.3
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_prompts_that_are_too_long():
    model = Model.from_pipeline(build("sdxl-mini")[1], spec("sdxl-mini"))
    with pytest.raises(TextlocError, match="too long; sdxl-mini takes 24"):
        models.check_prompts(model, [PROMPT.replace("HELLO", "HELLO" * 5)])


# --- training, sampling, shipping -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module", params=EXPECTED)
def trained(request, cache, tmp_path_factory):
    """(name, folder) of a run of a few steps, with an evaluation and an early denoiser."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        found = {"exact": 0.7, "characters": 0.8, "all_layers": 0.1, "target": [0.0] * 2, "source": [0.1] * 2}
        patch.setattr(training, "evaluate", lambda *_, **__: found)
        budget = replace(TINY, evaluations=1)
        report = training.train(name, folder, budget=budget, device="cpu", cache=cache, log=lambda line: None)
    assert ("stage2" in report) == (name == "if-mini")
    return name, folder


def test_trained_pipeline_ships_loads_and_samples(trained, tmp_path, monkeypatch):
    name, run = trained
    rate = {"mean": 0.7, "low": 0.6, "high": 0.8}
    keys = ("exact", "exact_open", "cer", "own_material", "leak", "leak_within", *world.FACTORS)
    measured = {"words": 1, "split": "held-out", "reader": "tesseract 5", **dict.fromkeys(keys, rate)}
    monkeypatch.setattr(card, "measure", lambda model, **_: measured)
    monkeypatch.setattr(card, "spelled", lambda model: 0.7)
    through, asked = {"words": 3, **dict.fromkeys(("exact", "cer", *world.FACTORS), rate | {"mean": 0.65})}, []
    monkeypatch.setattr(card, "rendered", lambda *, vae: asked.append(type(vae)) or through)
    folder = tmp_path / "miniatures" / name
    shipped = card.export(name, run, folder)
    assert shipped["trained"]["early"]["in_range"] and (folder / "early" / "denoiser.safetensors").is_file()
    text = (folder / "README.md").read_text()
    assert text.count(name) >= 2 and "0.700 [0.600, 0.800]" in text and "early checkpoint" in text
    # Without an autoencoder there is nothing that scenes could go through.
    assert asked == ([] if name == "if-mini" else [AutoencoderKL])
    assert shipped["trained"].get("autoencoder") == (None if name == "if-mini" else through)
    assert ("of 3 rendered scenes with test words: 0.650 [0.600, 0.800] exact" in text) == (name != "if-mini")
    sizes = [f.stat().st_size for f in folder.rglob("*.safetensors")]
    assert max(sizes) < 16e6 and sum(sizes) < 20e6

    assert not any(str(run) in f.read_text() for f in folder.rglob("*.json"))
    loaded = models.load(name, device="cpu", model_path=folder)
    assert (loaded.stage2 is not None) == (name == "if-mini")
    # A colour outside the captions is no mistake of the caller's.
    asked = [PROMPT, prompts.replace_text(PROMPT, "WORLD").replace("red", "turquoise")]
    made = generate(loaded, asked, [1, 1], steps=2)
    assert made.images.shape == (2, 64, 128, 3) and made.images.std() > 0
    assert made.row_evaluations == 2 * 2 * 2
    patch = Patch(source=0, target=1, layers=tuple(range(len(loaded.layers))), pooled=loaded.pooled_site is not None)
    assert generate(loaded, asked, [1, 1], steps=2, patches=[patch]).images.shape == made.images.shape
    alone = generate(loaded, asked[:1], [1], steps=2).images[0]  # sums round otherwise in another batch
    np.testing.assert_allclose(alone.astype(int), made.images[0], atol=1)


def test_what_a_model_does_is_measured(monkeypatch):
    """A model that draws every scene as it is asked for, with the material of the first letter where none is named."""

    def draws(model, asked, seeds):
        worlds = (world.SECOND, world.PLAIN)
        named = {evaluation.named(s, w): s for w in worlds for s in card._asked(6, "held-out", 42, w)[1]}
        assert list(seeds) == list(range(42, 48))
        rng, pictures = random.Random(1), []
        for prompt in asked:
            word = prompts.quoted_text(prompt)
            scene = replace(world.random_scene(rng, text=word), material=world.OWN[word[0]])
            pictures.append(world.render(named.get(prompt, scene)))
        return SimpleNamespace(images=np.stack(pictures))

    monkeypatch.setattr(card, "generate", draws)
    told = card.measure(None, 6)
    assert all(told[key]["mean"] == 1.0 for key in ("exact", "exact_open", "own_material", "leak", *world.FACTORS))
    assert told["leak_within"]["mean"] == told["cer"]["mean"] == 0.0 and told["exact"]["low"] < 1
    assert told["words"] == 6 and told["split"] == "held-out"
    assert told["read"] == [scene.text for scene in card.test_scenes(6)]
    assert {scene.text for scene in card.test_scenes()} <= set(prompts.test_words())
    plain = card.measure(None, 6, only=world.PLAIN)
    assert {"exact", "cer", "ink", "sign"} <= plain.keys() and not {"leak", "exact_open", "material"} & plain.keys()
    assert plain["exact"]["mean"] == plain["ink"]["mean"] == 1.0
    known = card.rendered(6)
    assert known == {key: told[key] for key in known} and not {"leak", "read"} & known.keys()


def test_scenes_are_read_after_the_autoencoder(monkeypatch):
    """One that mixes up the pictures leaves no text in its place."""
    asked = []

    def through(vae, pictures):
        asked.append(vae)
        np.testing.assert_array_equal(pictures, [world.render(scene) for scene in card.test_scenes(6)])
        return pictures[::-1]

    monkeypatch.setattr(autoencoder, "through", through)
    vae = autoencoder.build(4)
    mixed = card.rendered(6, vae=vae)
    assert asked == [vae] and mixed["exact"]["mean"] == 0.0 and mixed["cer"]["mean"] > 0.5


def test_spelling_is_what_tesseract_reads(monkeypatch):
    shown = evaluation.scenes(random.Random(0).sample(prompts.words("validation"), 6), 0)
    pictures = np.stack([world.render(scene) for scene in shown])

    def drawn(model, asked, seeds):
        assert asked == [evaluation.named(scene) for scene in shown] and len(set(seeds)) == 6
        return SimpleNamespace(images=pictures)

    monkeypatch.setattr(card, "generate", drawn)
    assert card.spelled(None, 6) >= 5 / 6
    pictures = pictures[::-1]
    assert card.spelled(None, 6) == 0


@pytest.mark.parametrize("trained", ["sd3-mini"], indirect=True)
def test_the_early_denoiser_is_the_one_that_spells_nearest(trained, tmp_path, monkeypatch):
    name, run = trained
    shutil.copytree(run / "pipeline", tmp_path / "part")
    (tmp_path / "part" / "textloc.json").write_text(json.dumps(training.recipe(name).SPEC))
    (kept,) = (run / "early").glob("*/denoiser.safetensors")
    for samples, spelling in ((40, 0.1), (100, 0.4), (200, 0.66), (300, 0.79), (1000, 0.9), (2000, 0.97)):
        weights = load_file(kept) | {"proj_out.bias": torch.full_like(load_file(kept)["proj_out.bias"], spelling)}
        (tmp_path / "early" / str(samples)).mkdir(parents=True)
        save_file(weights, tmp_path / "early" / str(samples) / "denoiser.safetensors")
    asked = []

    def spelled(model):
        asked.append(float(model.denoiser.proj_out.bias[0]))
        return asked[-1]

    monkeypatch.setattr(card, "spelled", spelled)
    monkeypatch.setattr(card, "measure", lambda model, **_: {"exact": {"mean": 0.66}})
    found = card._early(name, tmp_path, tmp_path / "part")
    assert found["samples"] == 200 and found["in_range"] and len(asked) == len(set(asked)) <= 4
    stored = load_file(tmp_path / "part" / "early" / "denoiser.safetensors")["proj_out.bias"].float()
    torch.testing.assert_close(stored, torch.full_like(stored, 0.66), atol=0.04, rtol=0)


@pytest.mark.parametrize("trained", ["if-mini"], indirect=True)
def test_second_stage_is_needed(trained, tmp_path):
    name, run = trained
    known = training.recipe(name).SPEC
    (run / "pipeline" / "textloc.json").write_text(json.dumps(known))
    loaded = models.load(name, device="cpu", model_path=run / "pipeline")
    small = Model.from_pipeline(loaded.pipe, loaded.spec)
    assert generate(small, [PROMPT], [1], steps=1).images.shape == (1, 32, 64, 3)
    (run / "pipeline" / "stage2").rename(tmp_path / "moved")
    with pytest.raises(TextlocError, match="stage2"):
        models.load(name, device="cpu", model_path=run / "pipeline")
