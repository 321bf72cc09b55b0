"""The recipes of the miniatures: what they build, that they learn, sample, resume and ship."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import IFSuperResolutionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from textloc_utils import models, prompts
from textloc_utils.generate import generate
from textloc_utils.miniatures import card, evaluation, reader, scenes, training
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
PROMPT = 'A red sign on a blue wall that says "HELLO".'
TINY = training.Budget(
    samples=8, seconds=1e9, autoencoder_seconds=0.5, encoder_steps=2, pool=10, batch=2, evaluations=0
)


def build(name):
    rules = training.recipe(name)
    torch.manual_seed(0)
    pipe = rules.pipeline(rules.autoencoder()) if hasattr(rules, "autoencoder") else rules.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return rules, pipe


def spec(name):
    return ModelSpec(name=name, source="", miniature=True, **training.recipe(name).SPEC)


def batch(name, rules, pipe, n=2):
    """What the trainer hands to an objective: pictures or stand-ins for latents, and tokens."""
    pictures, captions = training.Drawn().batch(n, (3, 4, 5, 6), random.Random(0), drop=0.0)
    if hasattr(rules, "autoencoder"):
        channels = rules.autoencoder().config.latent_channels
        pictures = torch.randn(n, channels, 8, 16, generator=torch.Generator().manual_seed(0))
    return pictures, rules.tokenize(pipe, captions)


def one_stage_or_two(name, tmp_path):
    """(rules, pipe) of every stage of a recipe."""
    rules, pipe = build(name)
    yield rules, pipe
    if hasattr(rules, "Stage2"):
        pipe.save_pretrained(tmp_path / "first")
        rules = rules.Stage2(tmp_path / "first")
        yield rules, rules.pipeline()


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
        objective(*batch(name, rules, pipe), training.step_generator(0)).backward()
        assert [n for n, p in objective.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize("name", UNETS)
def test_sixty_steps_on_one_batch_lower_the_loss(name, tmp_path):
    for rules, pipe in one_stage_or_two(name, tmp_path):
        objective = rules.Objective(pipe)
        x, tokens = batch(name, rules, pipe)
        optimiser = torch.optim.AdamW(objective.parameters(), lr=1.5e-3, betas=(0.9, 0.98), fused=True)
        losses = []
        for _ in range(60):
            loss = objective(x, tokens, training.step_generator(0))  # the same noise at every step
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
    x, _ = batch(name, rules, pipe)
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


@pytest.mark.parametrize("name", UNETS)
def test_evaluation_during_training(name, monkeypatch):
    for key, value in {"WORDS": 2, "PAIRS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(evaluation, key, value)
    result = evaluation.evaluate(build(name)[1], spec(name))
    assert len(result["target"]) == len(result["source"]) == EXPECTED[name][1]


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


@pytest.mark.parametrize("name", EXPECTED)
def test_letters_are_tokens_and_unknown_words_are_unk(name):
    _, pipe = build(name)
    model = Model.from_pipeline(pipe, spec(name))
    for tokenizer, _ in model.tokenizers:
        text = PROMPT.lower() if name == "if-mini" else PROMPT
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert "".join(tokens[tokens.index('"') + 1 : -1]).startswith('hello"' if name == "if-mini" else 'HELLO"')
        assert {"red", "sign", "blue", "wall"} <= set(tokens) and tokenizer.unk_token not in tokens
        strange = tokenizer.convert_ids_to_tokens(tokenizer(text.replace("red", "turquoise")).input_ids)
        assert strange.count(tokenizer.unk_token) == 1 and len(strange) == len(tokens)


def test_every_caption_fits_and_is_known_to_if():
    rules, pipe = build("if-mini")
    rng = random.Random(1)
    captions = [scenes.caption(scenes.random_scene(rng), rng) for _ in range(50)]
    clean = pipe._text_preprocessing(captions, clean_caption=True)
    ours = rules.tokenize(pipe, captions)
    theirs = pipe.tokenizer(clean, padding="max_length", return_tensors="pt")
    assert torch.equal(ours["t5"], theirs.input_ids) and torch.equal(ours["mask"], theirs.attention_mask)
    assert not (ours["t5"] == pipe.tokenizer.unk_token_id).any()
    letters = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer('a sign that says "a".').input_ids)
    assert letters == ["an", "sign", "that", "says", '"', "a", '"', ".", "</s>"]


def probe(t5, tokenizer) -> dict[str, float]:
    """How often a linear map of a token's embedding says rightly where in the word a letter stands, and whether a
    colour is the wall's; fitted to 300 captions, asked of 100 others."""
    rng = random.Random(0)
    shown = [scenes.random_scene(rng, (6,)) for _ in range(400)]
    texts = [scenes.caption(scene, rng).lower() for scene in shown]
    ids = tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        found = t5(ids.input_ids, attention_mask=ids.attention_mask)[0]
    letters = (ids.input_ids >= tokenizer.convert_tokens_to_ids("a")) & (
        ids.input_ids <= tokenizer.convert_tokens_to_ids("z")
    )
    colours = torch.isin(ids.input_ids, torch.tensor(tokenizer.convert_tokens_to_ids(list(scenes.RGB))))
    walls = torch.tensor([tokenizer.convert_tokens_to_ids(scene.wall) for scene in shown])[:, None] == ids.input_ids
    rights = {}
    for name, mask, answers in (("place", letters, letters.cumsum(1) - 1), ("wall", colours, walls.long())):
        x, y = [found[rows][mask[rows]] for rows in (slice(300), slice(300, 400))]
        wanted, held = [answers[rows][mask[rows]] for rows in (slice(300), slice(300, 400))]
        x, y = (torch.nn.functional.pad(part, (0, 1), value=1.0) for part in (x, y))
        fit = torch.linalg.lstsq(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ torch.eye(6)[wanted]).solution
        rights[name] = ((y @ fit).argmax(1) == held).float().mean().item()
    return rights


def test_the_shipped_t5_tells_what_stands_where_and_what_is_whose():
    """A T5 as initialised does not, and no denoiser learned to spell, or to paint by the prompt, from one."""
    pipe = models.load("if-mini").pipe
    told, untold = probe(pipe.text_encoder, pipe.tokenizer), probe(build("if-mini")[1].text_encoder, pipe.tokenizer)
    assert min(told.values()) > 0.99
    assert untold["place"] < 0.7


def test_a_t5_that_learned_from_text_is_left_out_of_training():
    rules, pipe = build("if-mini")
    before = pipe.text_encoder.shared.weight.clone()
    assert 0 < rules.pretrain(pipe, 0, 3) < 1
    assert not torch.equal(pipe.text_encoder.shared.weight, before)
    assert not any(p.requires_grad for p in pipe.text_encoder.parameters())


def test_prompts_that_are_too_long():
    model = Model.from_pipeline(build("sdxl-mini")[1], spec("sdxl-mini"))
    with pytest.raises(TextlocError, match="too long; sdxl-mini takes 22"):
        models.check_prompts(model, [PROMPT.replace("HELLO", "HELLO" * 5)])


# --- training, sampling, shipping -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=UNETS)
def trained(request, tmp_path_factory):
    """(name, folder) of a run of a few steps that was taken up again."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    training.train(name, folder, budget=TINY, device="cpu", log=lambda line: None)
    lines = []
    report = training.train(name, folder, budget=replace(TINY, samples=16), device="cpu", log=lines.append)
    resumed = [line for line in lines if line.startswith("resumed at step")]
    assert len(resumed) == (2 if "stage2" in report else 1)
    assert report["samples"] + report.get("stage2", {"samples": 0})["samples"] >= 16
    return name, folder


def test_trained_pipeline_ships_loads_and_samples(trained, tmp_path, monkeypatch):
    name, run = trained
    row = {"samples": 8, "exact": 0.0, "characters": 0.1, "all_layers": 0.1, "target": [0.0] * 2, "source": [0.1] * 2}
    (run / "evaluations.json").write_text(json.dumps([row]))
    spelled = {"words": 0, "exact": 0.0, "exact_interval": [0.0, 0.0], "cer": 1.0, "cer_interval": [1.0, 1.0]}
    monkeypatch.setattr(card, "spelling", lambda model: spelled)
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path))
    folder = tmp_path / "miniatures" / name
    monkeypatch.setattr(prompts, "words", lambda split: ("RIVER",))
    card.export(name, run, folder)
    assert (folder / "README.md").read_text().count(name) >= 2
    sizes = [f.stat().st_size for f in folder.rglob("*.safetensors")]
    assert max(sizes) < 16e6 and sum(sizes) < 18e6

    assert not any(str(run) in f.read_text() for f in folder.rglob("*.json"))
    loaded = models.load(name, device="cpu")
    assert (loaded.stage2 is not None) == (name == "if-mini")
    # A colour outside the templates is no mistake of the caller's.
    asked = [PROMPT, PROMPT.replace("HELLO", "WORLD").replace("red", "turquoise")]
    made = generate(loaded, asked, [1, 1], steps=2)
    assert made.images.shape == (2, 64, 128, 3) and made.images.std() > 0
    assert made.row_evaluations == 2 * 2 * 2
    patch = Patch(source=0, target=1, layers=tuple(range(len(loaded.layers))), pooled=loaded.pooled_site is not None)
    assert generate(loaded, asked, [1, 1], steps=2, patches=[patch]).images.shape == made.images.shape
    alone = generate(loaded, asked[:1], [1], steps=2).images[0]  # sums round otherwise in another batch
    np.testing.assert_allclose(alone.astype(int), made.images[0], atol=1)
    assert len(models.describe(name)["text_layers"]) == EXPECTED[name][1]


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


def test_small_pictures_are_read():
    rng = random.Random(3)
    known = [scenes.random_scene(rng) for _ in range(20)]
    pictures = np.stack([scenes.render(s) for s in known])
    small = pictures.reshape(20, 32, 2, 64, 2, 3).mean((2, 4)).astype(np.uint8)
    assert np.mean([a == s.text for a, s in zip(reader.read(small), known, strict=True)]) >= 0.9
