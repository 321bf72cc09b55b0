"""Editing: exact where exactness can be had, Prompt-to-Prompt against explicit maps, inversions that lead back."""

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch.nn import functional as F

from textloc_utils import cli, edit, experiment, metrics, models, ocr, prompts, scene_pairs
from textloc_utils.cli import editing
from textloc_utils.edit.flowedit import carried_over
from textloc_utils.edit.prompt_to_prompt import own_modules
from textloc_utils.experiment import Experiment
from textloc_utils.generate import generate, step_generator
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.models import Model
from textloc_utils.patching import Patch
from textloc_utils.prompts import Pair
from textloc_utils.results import Store
from textloc_utils.settings import PRESETS, TextlocError

FROM = 'a red sign on a blue wall that says "hello".'
TO = 'a red sign on a blue wall that says "world".'
SHORTER = 'a sign that says "river".'


def pair(source=FROM, target=TO, seed=3):
    return Pair(source=source, target=target, source_text="HELLO", target_text="WORLD", seed=seed)


@pytest.fixture(scope="module", params=tiny.BUILDERS)
def small(request):
    return request.param, tiny.model(request.param)


@pytest.fixture(scope="module")
def mini(of_the_world):
    """Random weights, but a miniature of the second world to all that asks."""
    return of_the_world("sd3")


# --- exactness ------------------------------------------------------------------------------------------------


def test_equal_prompts_give_the_source_bit_for_bit(small):
    made = edit.edit(small[1], pair(FROM, FROM), edit.prompt_to_prompt(1.0))
    np.testing.assert_array_equal(made.after, made.before)
    assert made.cache_bytes > 0


def test_no_replaced_map_gives_the_same_seed(small):
    model = small[1]
    plain = edit.edit(model, pair(), edit.same_seed())
    np.testing.assert_array_equal(edit.edit(model, pair(), edit.prompt_to_prompt(0.0)).after, plain.after)
    assert np.abs(plain.after.astype(int) - plain.before).max() > 0
    assert np.abs(edit.edit(model, pair(), edit.prompt_to_prompt(1.0)).after.astype(int) - plain.after).max() > 0


def test_no_layer_gives_the_source_bit_for_bit(small):
    made = edit.edit(small[1], pair(), edit.localized(()))
    np.testing.assert_array_equal(made.after, made.before)
    assert made.cache_bytes == 0


def test_all_layers_are_the_engine(small):
    model = small[1]
    made = edit.edit(model, pair(), edit.all_layers(model))
    patch = Patch(source=2, target=1, layers=tuple(range(len(model.layers))))
    engine = generate(model, [FROM, TO, FROM], [3] * 3, patches=[patch])
    np.testing.assert_array_equal(made.after, engine.images[2])
    np.testing.assert_array_equal(made.before, engine.images[0])
    assert made.row_evaluations == engine.row_evaluations
    with pytest.raises(TextlocError, match="at steps from 3 on, but the run had 3 steps"):
        edit.edit(model, pair(), edit.all_layers(model, start=model.spec.steps))


def test_the_plain_target_starts_from_other_noise(small):
    model = small[1]
    made = edit.edit(model, pair(), edit.plain_target())
    other = generate(model, [FROM, TO], [3, 3 + edit.method.RESEED])
    np.testing.assert_array_equal([made.before, made.after], other.images)


@pytest.mark.parametrize("method", [edit.localized((1,)), edit.prompt_to_prompt(), edit.same_seed()])
def test_a_second_stage_enlarges_edits_under_the_source_prompt(method):
    """Only where the target is simply drawn does its own prompt enlarge it."""
    asked = []

    def enlarge(*, prompt, image, **other):
        asked.append(prompt)
        return SimpleNamespace(images=image.permute(0, 2, 3, 1).numpy())

    made = edit.edit(replace(tiny.model("if"), stage2=enlarge), pair(), method)
    assert made.after.shape == (16, 16, 3) and asked[0][0] == FROM
    assert asked[0][-1] == (TO if method == edit.same_seed() else FROM)


# --- Prompt-to-Prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TO, SHORTER])
def test_shared_columns_hold_the_same_tokens(small, target):
    name, model = small
    texts = [[t for _, tokens in model.text_columns(p) for t in tokens] for p in (FROM, target)]
    sources, targets = edit.shared_columns(model, FROM, target)
    assert [texts[0][i] for i in sources] == [texts[1][i] for i in targets]
    assert len(set(targets)) == len(targets) and len(set(sources)) == len(sources)
    seen = []
    handle = model.denoiser.register_forward_pre_hook(
        lambda d, a, k: seen.append(models.read_call(d, a, k).tokens), with_kwargs=True
    )
    generate(model, [FROM], [0], steps=1)
    handle.remove()
    assert seen[0] == len(texts[0])
    if target == TO:  # one word is one token here, in each of the texts that are read
        own = sorted(set(range(len(texts[1]))) - set(targets))
        assert len(own) == (2 if name in ("sd3", "sd35") else 1) and sources == targets


def explicit(name, model, columns, rows, own, monkeypatch):
    """All layers compute their maps in the open, the last row's replaced: the method as its authors write it."""
    sources, targets = map(torch.tensor, columns)
    tokens = sum(len(tokens) for _, tokens in model.text_columns(FROM))
    inside, fused = [], F.scaled_dot_product_attention
    kinds = dict.fromkeys(own_modules(model), "own") | {layer.name: "text" for layer in model.layers}
    for each, kind in kinds.items():
        module = model.denoiser.get_submodule(each)
        module.register_forward_pre_hook(lambda *a, kind=kind: inside.append(kind))
        module.register_forward_hook(lambda *a: inside.clear())

    def attention(query, key, value, *args, **kwargs):
        if not inside or (inside == ["own"] and not own):
            return fused(query, key, value, *args, **kwargs)
        maps = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        if inside == ["own"]:
            maps[-1] = maps[-rows]
            return maps @ value
        texts_last = name in ("sd3", "sd35")
        first = key.shape[2] - tokens if texts_last else 0
        for q in range(tokens if name == "flux" else 0, query.shape[2] - tokens * texts_last):
            maps[-1, :, q, first + targets] = maps[-rows, :, q, first + sources]
            if own:  # the keys that are no text: none in a U-Net's cross-attention
                pictures = slice(0, first) if texts_last else slice(tokens, None)
                maps[-1, :, q, pictures] = maps[-rows, :, q, pictures]
        return maps @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("own", (0, 3))
def test_maps_are_replaced_as_written(small, own, monkeypatch):
    """In double precision, the fused attention with its correction against maps in the open."""
    name, model = small[0], tiny.model(small[0])
    model.pipe.to(torch.float64)

    def last(**options):
        with torch.no_grad():
            return model.pipe(**arguments, **options, output_type="np").images

    arguments = model.call_arguments([FROM, TO], steps=3, guidance=4.0, negative_prompt=None)

    def noise():
        return [torch.Generator().manual_seed(3) for _ in range(2)]

    plain = last(generator=noise())
    columns = edit.shared_columns(model, FROM, TO)
    with edit.replaced_maps(model, pair(), 2, 3, own):
        ours = last(generator=noise())
    np.testing.assert_array_equal(last(generator=noise()), plain)  # and leaves nothing behind
    explicit(name, model, columns, 2, own, monkeypatch)
    theirs = last(generator=noise())
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.abs(ours[1] - plain[1]).max() > 1e-4


def test_an_error_leaves_the_pipeline_as_it_was(small):
    model = small[1]
    before = generate(model, [FROM, TO], [3, 3]).images
    with pytest.raises(TextlocError, match="in a batch of 2 rows"), edit.replaced_maps(model, pair(), 2, 3):
        generate(model, [FROM] * 3, [3] * 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())
    np.testing.assert_array_equal(generate(model, [FROM, TO], [3, 3]).images, before)


def test_own_maps_change_the_picture_beyond_the_texts(small):
    """And equal prompts still give the source bit for bit."""
    run = Experiment.of(small[1], steps=4)
    without, copied = (edit.edit(run, pair(), m) for m in (edit.prompt_to_prompt(1.0), edit.prompt_to_prompt_own(1.0)))
    assert (without.after != copied.after).any()
    same = edit.edit(run, pair(target=FROM), edit.prompt_to_prompt_own(1.0))
    np.testing.assert_array_equal(same.before, same.after)


def test_an_impossible_share_is_refused():
    with pytest.raises(TextlocError, match="0 to 1"):
        edit.prompt_to_prompt(1.5)
    with pytest.raises(TextlocError, match="0 to 1"):
        edit.prompt_to_prompt_own(3)


# --- FlowEdit -------------------------------------------------------------------------------------------------


def test_flow_edit_is_what_its_equations_say():
    """Against the method written out on the denoiser itself, in double precision."""
    model, steps, start = tiny.model("sd3"), 4, 1
    model.pipe.to(torch.float64)
    picture = generate(model, [FROM], [5], steps=steps).images[0]
    known = model.encode(picture[None]).double()
    with carried_over(model, known, start, steps, 5) as noise, torch.no_grad():
        arguments = model.call_arguments([FROM, TO], steps=steps, guidance=1.0, negative_prompt=None)
        found = model.pipe(**arguments, latents=noise, output_type="latent").images
    pipe, edited = model.pipe, known.clone()
    pipe.scheduler.set_timesteps(steps)
    length = {"do_classifier_free_guidance": False, "max_sequence_length": arguments["max_sequence_length"]}
    prompts = [pipe.encode_prompt(p, p, p, **length)[::2] for p in (FROM, TO)]
    for i in range(start, steps):
        level, below, time = pipe.scheduler.sigmas[i], pipe.scheduler.sigmas[i + 1], pipe.scheduler.timesteps[i]
        fresh = torch.randn(known.shape, generator=step_generator(5, i - start)).double()
        noisy = (1 - level) * known + level * fresh
        with torch.no_grad():
            speed = [
                pipe.transformer(x, text, pooled, time.expand(1), return_dict=False)[0]
                for x, (text, pooled) in zip((noisy, edited + noisy - known), prompts, strict=True)
            ]
        edited = edited + (below - level) * (speed[1] - speed[0])
    torch.testing.assert_close(found[:1], known, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1:], edited, atol=1e-6, rtol=0)
    assert (edited - known).abs().max() > 1e-3


def test_flow_edit_counts_what_it_draws_and_leaves_the_scheduler():
    model = tiny.model("sd3")
    run, before = Experiment.of(model, steps=4), generate(model, [FROM], [3], steps=4)
    made = edit.edit(run, pair(), edit.flow_edit(2))
    np.testing.assert_array_equal(made.before, before.images[0])
    assert made.row_evaluations == before.row_evaluations * 2  # four rows, and two rows in half of the steps
    np.testing.assert_array_equal(generate(model, [FROM], [3], steps=4).images, before.images)
    given = edit.edit(run, pair(), edit.flow_edit(2), picture=before.images[0])
    np.testing.assert_array_equal(given.after, made.after)
    assert given.row_evaluations == before.row_evaluations


@pytest.mark.parametrize("name, start, said", [("ldm", 0, "needs flow matching"), ("sd3", 4, "0 to 3")])
def test_flow_edit_where_it_cannot_work_is_refused(name, start, said):
    with pytest.raises(TextlocError, match=said):
        edit.edit(Experiment.of(tiny.model(name), steps=4), pair(), edit.flow_edit(start))


# --- inversion ------------------------------------------------------------------------------------------------

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddim, zero snr": DDIMScheduler(clip_sample=False, **ZERO_SNR),
    "dpm-solver": DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero"),
    "dpm-solver, zero snr": DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero", **ZERO_SNR),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("passes", [1, 3])
def test_steps_are_taken_back(name, passes):
    """Where the denoiser's answers do not hang on the picture, one pass is exact."""
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)
    answers = {
        float(t): torch.randn(start.shape, generator=generator, dtype=torch.float64) for t in scheduler.timesteps
    }
    picture = start
    for t in scheduler.timesteps:
        picture = scheduler.step(answers[float(t)], t, picture, return_dict=False)[0]
    with edit.inversion._taken_back(scheduler, passes) as run:
        scheduler.set_timesteps(5)
        found = picture
        for t in scheduler.timesteps:
            found = scheduler.step(answers[float(t)], t, found, return_dict=False)[0]
    assert len(scheduler.timesteps) == 5 * passes
    torch.testing.assert_close(run.noise, start, rtol=0, atol=1e-4)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5  # restored


def test_an_inversion_leads_back(small, monkeypatch):
    """From the noise that was found, each family's pipeline draws what was inverted."""
    name, model = small
    drawn = {}

    with model.first_order():
        start = generate(model, [FROM], [5], guidance=1.0)
        scheduler, step = model.pipe.scheduler, model.pipe.scheduler.step

        def keep(*args, **kwargs):
            out = step(*args, **kwargs)
            drawn["picture"] = out[0] if isinstance(out, tuple) else out.prev_sample
            return out

        scheduler.step = functools.wraps(step)(keep)
        generate(model, [FROM], [5], guidance=1.0)
        del scheduler.step
    monkeypatch.setattr(Model, "encode", lambda self, pictures: drawn["picture"])
    errors = []
    for passes in (1, 30):
        found = edit.invert(model, start.images, [FROM], passes=passes)
        assert found.row_evaluations == passes * model.spec.steps
        with model.first_order():
            back = generate(model, [FROM], [5], guidance=1.0, noise=found.noise)
        errors.append(np.abs(back.images.astype(int) - start.images).mean())
    assert errors[1] <= max(1, errors[0] / 4)  # random weights are not made to be taken back


def test_a_rendered_picture_comes_back():
    """The round trip loses what the autoencoder loses, and hardly more."""
    mini, (one,) = models.load("sd3-mini", device="cpu"), scene_pairs.make(1, "report")
    picture = edit.rendered(one)
    found = edit.invert(mini, picture[None], [one.source])
    with mini.first_order():
        back = generate(mini, [one.source], [0], noise=found.noise, guidance=1.0).images[0]
    vae, latents = mini.pipe.vae, mini.encode(picture[None])
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    ceiling = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert metrics.psnr(back, picture) > metrics.psnr(ceiling, picture) - 0.5 > 20
    assert 0.5 < float(found.noise.std()) < 2


def test_pairs_without_scenes_have_no_rendered_picture():
    with pytest.raises(TextlocError, match="this pair has no scene"):
        edit.compare_pair(tiny.model("sd3"), pair(), [edit.same_seed()], given=True)


def test_a_wrong_inversion_is_refused(mini):
    with pytest.raises(TextlocError, match="at least one pass"):
        edit.invert(mini, np.zeros((1, 64, 128, 3), np.uint8), [FROM], passes=0)
    with pytest.raises(TextlocError, match="128x64 pixels, got 64x64"):
        edit.invert(mini, np.zeros((1, 64, 64, 3), np.uint8), [FROM])


# --- tables ---------------------------------------------------------------------------------------------------

LAYERS, STEPS = (0, 2), 3


@pytest.fixture(scope="module")
def compared(mini, tmp_path_factory):
    run = Experiment.of(mini, steps=STEPS, store=Store(tmp_path_factory.mktemp("store")))
    pairs = scene_pairs.for_model(mini, 2, "report")
    methods = [
        edit.localized(LAYERS),
        edit.all_layers(mini),
        edit.prompt_to_prompt(),
        edit.same_seed(),
        edit.plain_target(),
    ]
    tables = {given: edit.compare(run, pairs, methods, given=given) for given in (False, True)}
    return run, pairs, methods, tables


def test_a_table_holds_a_row_for_each_pair_and_method(mini, compared):
    _, pairs, methods, tables = compared
    table = tables[False]
    assert table.method.tolist() == [m.name for m in methods] * 2
    assert table.seed.tolist() == [p.seed for p in pairs for _ in methods]
    rows = table.set_index(["seed", "method"]).loc[pairs[0].seed]
    # Two rows, guided, at every step: what source and target cost.
    both = generate(mini, [pairs[0].source, pairs[0].target], [pairs[0].seed] * 2, steps=STEPS)
    assert rows.row_evaluations["localized"] == both.row_evaluations == 2 * 2 * STEPS
    assert rows.row_evaluations["same seed"] == 2 * STEPS
    assert rows.cache_bytes["same seed"] == 0
    assert (rows.cache_bytes[["localized", "all layers", "Prompt-to-Prompt"]] > 0).all()
    assert (rows.inversion_rows == 0).all() and not rows.given.any()
    # The scores are those of the pictures, against the source.
    pictures, again = edit.compare_pair(mini, pairs[0], methods, steps=STEPS)
    for at, prompt in ((0, pairs[0].source), (1 + [m.name for m in methods].index("same seed"), pairs[0].target)):
        alone = generate(mini, [prompt], [pairs[0].seed], steps=STEPS)
        np.testing.assert_array_equal(pictures[at], alone.images[0])
    for row, picture in zip(again, pictures[1:], strict=True):
        assert row["mse"] == pytest.approx(metrics.mse(picture, pictures[0])) and row["mse"] > 0
        assert row["cer"] == metrics.character_error_rate(row["read"], pairs[0].target_text)
        assert row["ssim"] == pytest.approx(rows.ssim[row["method"]])


def test_given_pictures_are_inverted_first(mini, compared):
    _, pairs, methods, tables = compared
    table = tables[True]
    assert table.method.tolist() == ["round trip", *(m.name for m in methods)] * 2
    assert (table.inversion_rows == edit.inversion.PASSES * STEPS).all() and table.given.all()
    assert (table[table.method == "round trip"].row_evaluations == STEPS).all()
    assert table.source_read.tolist() == table.source_text.tolist()
    pictures, rows = edit.compare_pair(mini, pairs[0], methods, given=True, steps=STEPS)
    np.testing.assert_array_equal(pictures[0], world.render(pairs[0].scene))
    found = edit.invert(mini, pictures[:1], [pairs[0].source], steps=STEPS)
    with mini.first_order():
        back = generate(mini, [pairs[0].source], [0], noise=found.noise, guidance=1.0, steps=STEPS)
    np.testing.assert_array_equal(pictures[1], back.images[0])
    # The plain target is guided and starts from noise of its own, as ever.
    plain = generate(mini, [pairs[0].target], [pairs[0].seed + edit.method.RESEED], steps=STEPS)
    np.testing.assert_array_equal(pictures[-1], plain.images[0])
    # The mask is of the text that stands in the source's picture, with room for the new one.
    mask = factors.read(pictures[:1])[0].outside_text(max(len(pairs[0].source_text), len(pairs[0].target_text)))
    assert 0.5 < mask.mean() < 0.9
    for row, picture in zip(rows, pictures[1:], strict=True):
        assert row["ssim_outside"] == pytest.approx(metrics.ssim(picture, pictures[0], mask))
        assert row["mse_outside"] == pytest.approx(metrics.mse(picture, pictures[0], mask))
        assert row["material_before"] == pairs[0].scene.material


def test_a_killed_comparison_goes_on(mini, compared, monkeypatch):
    run, pairs, methods, tables = compared
    monkeypatch.setattr(edit.study, "compare_pair", None)  # nothing is left to draw
    again = edit.compare(run, pairs, methods)
    pd.testing.assert_frame_equal(again, tables[False])


def few(model, layers, steps):
    """Stands for ``edit.dials``: each method at one setting."""
    own = [edit.localized(layers, 1), edit.prompt_to_prompt_own(0.5), edit.flow_edit(1)]
    return [*own, edit.same_seed(), edit.plain_target()]


NAMES = [method.name for method in few(None, LAYERS, 2)]


def test_a_published_table_is_taken_where_it_fits(mini, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(edit.study, "dials", few)
    run = Experiment.of(mini, steps=2)
    made = edit.table(Experiment.of(run, publish=True), "open", LAYERS, 1)
    dials = edit.dial_table(run, LAYERS, 1)
    assert {p.name for p in (tmp_path / "results").glob("*.csv")} == {
        f"edit_tiny-sd3_{n}.csv" for n in ("open", "dials")
    }

    def computed(*args, **kwargs):
        raise RuntimeError("computed")

    monkeypatch.setattr(edit.study, "compare", computed)
    assert edit.table(run, "open", LAYERS[::-1], 1).equals(made)
    assert edit.dial_table(run, LAYERS, 1, name="open_given").equals(dials), "the same prompts, drawn"
    others = [{"name": "named"}, {"name": "open_given"}, {"layers": (0, 1)}, {"n": 2}, {"seed": 1}, {"noises": 2}]
    for other in others:
        with pytest.raises(RuntimeError, match="computed"):
            edit.table(run, **{"name": "open", "layers": LAYERS, "n": 1} | other)


@pytest.mark.parametrize(
    "name, layers, said",
    [("all", (0,), "unknown table"), ("open_given", (), "at least one layer"), ("open", (99,), "99")],
)
def test_a_wrong_table_is_refused(name, layers, said):
    with pytest.raises(TextlocError, match=said):
        edit.table(Experiment.of(tiny.model("sd3")), name, layers, 1)


def test_every_dial_is_turned(mini):
    found = edit.dials(mini, LAYERS, steps=16)
    names = [m.name for m in found]
    starts = [m.patch.start for m in found if m.name == "localized"]
    assert starts == [0, 2, 3, 5, 7, 10, 13] and starts == [m.patch.start for m in found if m.name == "all layers"]
    assert starts == [m.flow_from for m in found if m.name == "FlowEdit"]
    assert [m.maps for m in found if m.name == "Prompt-to-Prompt"] == list(edit.study.SHARES)
    own = [(m.maps, m.own_maps) for m in found if m.name == "Prompt-to-Prompt, own maps"]
    assert own == [(share, share / 2) for share in edit.study.SHARES if share]
    assert names.count("same seed") == names.count("plain target") == 1
    assert "FlowEdit" not in {m.name for m in edit.dials(tiny.model("ldm"), (0,))}


def test_the_best_setting_keeps_most_of_those_that_spell():
    """One that keeps more and loses words is not taken, and one that spells too little only for want of others."""
    methods = [edit.localized((1,), k) for k in (0, 2, 4)] + [edit.prompt_to_prompt(s) for s in (0.2, 0.8)]
    methods += [edit.same_seed()]
    scores = {("localized", 0): (1.0, 0.7), ("localized", 2): (0.98, 0.9), ("localized", 4): (0.9, 0.95)}
    scores |= {
        ("Prompt-to-Prompt", 0.2): (0.6, 0.8),
        ("Prompt-to-Prompt", 0.8): (0.4, 0.9),
        ("same seed", 0): (1.0, 0.5),
    }
    rows = []
    for (name, dial), (exact, keeps) in scores.items():
        setting = {"start": 0, "share": dial} if name == "Prompt-to-Prompt" else {"start": dial, "share": 0.0}
        rows += [{"method": name, **setting, "exact": i < 50 * exact, "ssim_outside": keeps} for i in range(50)]
    chosen = edit.best(methods, pd.DataFrame(rows))
    assert [m.name for m in chosen] == ["localized", "Prompt-to-Prompt", "same seed"]
    assert chosen[0].patch.start == 2 and chosen[1].maps == 0.2


def test_prompts_are_edited_at_settings_that_other_pairs_chose(mini, monkeypatch):
    run, asked, compare = Experiment.of(mini, steps=2), [], edit.study.compare

    def watched(experiment, pairs, methods, **options):
        asked.append(pairs)
        return compare(experiment, pairs, methods, **options)

    monkeypatch.setattr(edit.study, "TUNING", 1)
    monkeypatch.setattr(edit.study, "dials", few)
    monkeypatch.setattr(edit.study, "compare", watched)
    table = edit.table(run, "open", LAYERS, 2, noises=2)
    tuned, reported = asked
    assert len(tuned) == 1 and {tuned[0].source_text, tuned[0].target_text} <= set(scene_pairs.words("tune"))
    assert len({pair.source for pair in reported}) == 2 and len({pair.seed for pair in reported}) == 4
    for pair in (*tuned, *reported):
        assert pair.source == f'The word "{pair.source_text}".'
        assert world.OWN[pair.source_text[0]] != world.OWN[pair.target_text[0]]
    assert {text for pair in reported for text in (pair.source_text, pair.target_text)} <= set(prompts.test_words())
    assert table.seed.tolist() == [pair.seed for pair in reported for _ in NAMES]
    assert table.method.tolist() == NAMES * 4 and table.start.tolist()[:5] == [1, 0, 1, 0, 0]
    assert table.share.tolist()[:2] == [0.0, 0.5]
    assert edit.chosen(mini, LAYERS, table, 2) == few(mini, LAYERS, 2)
    given = edit.table(run, "open_given", LAYERS, 1)
    # From given noise there is no other picture of the new prompt to draw.
    assert given.given.all() and given.method.tolist() == ["round trip", *NAMES[:-1]]
    named = edit.table(run, "named", LAYERS, 1)
    assert len(named) == 5 and asked[-1][0].source == evaluation.named(asked[-1][0].scene)
    assert edit.dial_table(run, LAYERS, 2, name="named").seed.nunique() == 1  # TUNING


def test_settings_are_chosen_on_as_many_pairs_as_are_reported_at_most(mini, monkeypatch):
    seen = []
    monkeypatch.setattr(edit.study, "compare", lambda run, pairs, methods, **options: seen.append(len(pairs)))
    for n in (3, 500):
        edit.dial_table(Experiment.of(mini), LAYERS, n)
    assert seen == [3, edit.study.TUNING]


def test_what_a_table_chose_is_found_and_told():
    model = tiny.model("sd3")
    wanted = [edit.localized(LAYERS, 3), edit.prompt_to_prompt(0.2), edit.prompt_to_prompt_own(0.4), edit.flow_edit(2)]
    wanted += [edit.same_seed(), edit.plain_target()]
    settings = [(3, 0.0), (0, 0.2), (0, 0.4), (2, 0.0), (0, 0.0), (0, 0.0)]
    rows = [{"method": m.name, "start": s, "share": r} for m, (s, r) in zip(wanted, settings, strict=True)]
    table = pd.DataFrame([{"method": "round trip", "start": 0, "share": 0.0}, *rows] * 2)
    assert edit.chosen(model, LAYERS, table, 10) == wanted
    assert edit.settings_told(table).to_dict() == {
        "round trip": "",
        "localized": "from step 3",
        "Prompt-to-Prompt": "up to 0.2 of the steps",
        "Prompt-to-Prompt, own maps": "up to 0.4 of the steps",
        "FlowEdit": "from step 2",
        "same seed": "",
        "plain target": "",
    }


def test_every_table_has_its_number_of_pairs():
    assert edit.pairs_of(PRESETS["book"]) == {"open": 200, "named": 100, "open_given": 48}
    assert edit.pairs_of(PRESETS["paper"]) == {"open": 400, "named": 300, "open_given": 200}
    assert edit.pairs_of(PRESETS["smoke"]).keys() == edit.TABLES.keys()


def test_what_is_kept_is_compared_with_what_the_source_showed():
    """Not with what its prompt asked for."""
    rows = pd.DataFrame(
        {
            "method": ["localized"] * 4,
            "start": 0,
            "share": 0.0,
            "exact": [True, True, True, False],
            "source_material": "brick",
            "material_before": ["brick", "tiles", "tiles", "leaves"],
            "material_read": ["brick", "tiles", "brick", "clouds"],
        }
    )
    (row,) = edit.kept(rows).to_dict("records")
    assert (row["n"], row["material"], row["exact"]) == (4, 0.5, 0.75) and row["material_low"] < 0.5
    assert "ink" not in row  # nobody read it


def test_edited_pairs_are_others_than_searched_ones():
    """Also of a model whose pairs have no scenes, and whose layers ``textloc localize`` searched."""
    edited = scene_pairs.for_model(tiny.model("sd3"), 100, "report")
    for use in ("search", "select", "tune"):
        others = prompts.make_pairs(100) if use == "search" else scene_pairs.for_model(tiny.model("sd3"), 100, use)
        assert len({p.seed for p in edited} | {p.seed for p in others}) == 200
        both = ({(p.source_text, p.target_text) for p in of} for of in (edited, others))
        assert len(set.intersection(*both)) <= 2


def made_up():
    values = {"localized": (1.0, 0.9), "same seed": (1.0, 0.5), "round trip": (0.0, 1.0)}
    rows = []
    for seed in (1, 2, 3):
        for method, (f1, ssim) in values.items():
            row = {"seed": seed, "method": method, "start": 0, "share": 0.0, "f1": f1, "ssim": ssim + seed / 100}
            rows.append(row | {"row_evaluations": 64, "seconds": seed, "cache_bytes": 10 * seed})
    return pd.DataFrame(rows)


def test_summaries_and_differences():
    summary = edit.summarise(made_up(), ["f1", "ssim"]).set_index("method")
    assert summary.f1.tolist() == [1, 1, 0] and summary.n.tolist() == [3] * 3
    assert summary.ssim["localized"] == pytest.approx(0.92) and summary.ssim_low["localized"] < 0.92
    assert summary.cache_bytes["localized"] == 30 and summary.seconds["localized"] == 2
    rows = edit.differences(made_up(), ["f1", "ssim"]).to_dict("records")
    assert [(r["method"], r["score"]) for r in rows] == [("same seed", "f1"), ("same seed", "ssim")]
    # Paired: the same in every pair, whatever the pair's own level.
    assert [(r["mean"], r["low"], r["high"], r["n"]) for r in rows] == [
        (0, 0, 0, 3),
        (pytest.approx(0.4), pytest.approx(0.4), pytest.approx(0.4), 3),
    ]


# --- one picture ----------------------------------------------------------------------------------------------

HELLO = 'A blue sign against brick says "HELLO" in plain white letters.'


def test_the_quoted_text_is_replaced():
    made = edit.check_text(models.spec("sd3-mini"), HELLO, "WORLD")
    assert (made.source, made.source_text, made.target_text) == (HELLO, "HELLO", "WORLD")
    assert made.target == HELLO.replace("HELLO", "WORLD")
    assert edit.check_text(models.spec("sdxl"), HELLO, "Hello, world!").target_text == "Hello, world!"


@pytest.mark.parametrize(
    "read, ssim, said",
    [
        ("WORLD", 0.9, None),
        ("WORLD", 0.2, "the picture was lost"),
        ("HELLO", 0.9, "nothing changed"),
        ("WORLO", 0.9, "says WORLO, not WORLD"),
        ("", 0.9, "no text is read"),
    ],
)
def test_a_failed_edit_says_so(read, ssim, said):
    assert "although there is some" in edit.failure("HELLO", "", pair(), 0.9, found=True)
    told = edit.failure("HELLO", read, pair(), ssim)
    assert told is None if said is None else said in told


def test_before_after_and_difference():
    before, after = np.full((2, 3, 3), 10, np.uint8), np.full((2, 3, 3), 250, np.uint8)
    both = edit.side_by_side(before, after, gap=1)
    assert both.shape == (2, 11, 3) and (both[:, :3] == 10).all() and (both[:, 4:7] == 250).all()
    assert (both[:, 8:] == 240).all()


RIVER = HELLO.replace("HELLO", "RIVER")


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["edit", "sd3-mini", "--device", "cpu", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_edits_a_generated_picture(tmp_path, capsys):
    """In the layers of the published search, where none are named."""
    out, known = tmp_path / "out", experiment.known_layers(models.load("sd3-mini", device="cpu"))
    status, printed, err = run(capsys, "--prompt", RIVER, "--to", "STONE", "--seed", 1, "--out", out, "--json")
    report = json.loads(printed)
    assert (status, err) == (0, "") and report == json.loads((out / "edit.json").read_text())
    assert (report["before"], report["after"], report["failure"]) == ("RIVER", "STONE", None)
    assert report["layers"] == list(known) and report["ssim_outside"] > edit.picture.KEPT and "round_trip" not in report
    before, after, both = (np.asarray(Image.open(out / f"{n}.png")) for n in ("before", "after", "edit"))
    np.testing.assert_array_equal(both, edit.side_by_side(before, after))
    assert sorted(p.name for p in out.iterdir()) == ["after.png", "before.png", "edit.json", "edit.png"]


def test_the_command_edits_a_given_picture(tmp_path, capsys):
    scene = world.Scene(text="HELLO", sign="blue", ink="white", material="brick", dy=2)
    picture = world.render(scene)
    Image.fromarray(picture).save(tmp_path / "given.png")
    about = ["--prompt", evaluation.named(scene), "--to", "WORLD", "--image", tmp_path / "given.png"]
    status, printed, _ = run(capsys, *about, "--out", tmp_path / "out", "--json")
    report = json.loads(printed)
    assert status == 0 and (report["before"], report["after"]) == ("HELLO", "WORLD")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "before.png")), picture)
    assert report["round_trip"]["psnr"] > 22 and report["ssim_outside"] > edit.picture.KEPT


def test_an_edit_that_changed_nothing_has_its_own_exit_status(tmp_path, capsys):
    """At the last step alone, a text comes too late."""
    last = models.spec("sd3-mini").steps - 1
    about = ["--prompt", RIVER, "--to", "STONE", "--seed", 1, "--layers", 0, "--start", last, "--out", tmp_path]
    status, printed, err = run(capsys, *about)
    assert status == editing.FAILED == 3 and "RIVER -> RIVER" in printed
    assert err == "textloc: nothing changed: the picture still says RIVER\n" and (tmp_path / "edit.png").is_file()


def test_bad_input_is_one_line_before_the_model_runs(tmp_path, capsys, monkeypatch):
    out, wrong_size, no_picture = tmp_path / "out", tmp_path / "size.png", tmp_path / "text.png"
    Image.new("RGB", (64, 64)).save(wrong_size)
    no_picture.write_text("no picture")

    def forbidden(*args, **kwargs):
        raise AssertionError("the model ran")

    steps = models.spec("sd3-mini").steps
    monkeypatch.setattr(edit.inversion, "generate", forbidden)
    monkeypatch.setattr(Experiment, "draw", forbidden)
    for change, said in (
        ({"--prompt": "a sign"}, "double quotes"),
        ({"--to": " "}, "empty"),
        ({"--to": "WORLDLY"}, "too long; a sign has room for 6"),
        ({"--to": "World"}, "cannot draw 'o'"),
        ({"--to": 'A"B'}, "cannot have"),
        ({"--to": "HELLO"}, "nothing to edit"),
        ({"--image": tmp_path / "none.png"}, "No such file"),
        ({"--image": no_picture}, "Pillow does not know this format"),
        ({"--image": tmp_path}, "Is a directory"),
        ({"--image": wrong_size}, "128x64 pixels, got 64x64"),
        ({"--layers": 12}, "text layers are 0 to 11"),
        ({"--layers": 4, "--start": steps}, f"steps are 0 to {steps - 1}"),
        ({"--out": no_picture / "out"}, "not a folder"),
    ):
        options = {"--prompt": HELLO, "--to": "WORLD", "--out": out} | change
        status, printed, err = run(capsys, *(str(part) for option in options.items() for part in option))
        assert (status, printed, err.count("\n")) == (2, "", 1) and said in err, change
        assert not out.exists()
    assert "--prompt, --to, --out" in run(capsys)[2]


def test_the_command_makes_tables(capsys, monkeypatch):
    asked = {}

    def table(run, name, layers, n, seed, *, noises):
        asked[name] = (tuple(layers), n, seed, noises, run.publish)
        return made_up().assign(exact=[True] * 6 + [False] * 3, ink_before="red", ink_read=["red"] * 8 + ["black"])

    monkeypatch.setattr(edit, "table", table)
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: tiny.model("sd3"))
    command = ["study", "edit", "sd3-mini", "--device", "cpu", "--layers", "1", "2"]
    assert cli.main([*command, "--publish", "--tables", "open", "named"]) == 0
    assert asked == {"open": ((1, 2), 200, 42, 1, True), "named": ((1, 2), 100, 42, 1, True)}
    printed = capsys.readouterr().out
    assert "named, layers 1 2" in printed and "0.667" in printed and "read by tesseract" in printed
    # Every table where none is named; a given picture has one noise, which is sought.
    for options, wanted in (
        (["--preset", "paper"], {"open": (400, 4), "named": (300, 4), "open_given": (200, 1)}),
        (["--pairs", "7", "--noises", "3"], {"open": (7, 3), "named": (7, 3), "open_given": (7, 1)}),
    ):
        asked.clear()
        assert cli.main([*command, *options]) == 0
        assert {name: (n, noises) for name, (_, n, _, noises, _) in asked.items()} == wanted


def test_the_command_edits_from_several_noises(tmp_path, capsys):
    """A folder for each seed, and one line for all edits that failed."""
    about = ["--prompt", RIVER, "--to", "STONE", "--layers", 0, "--steps", 2, "--noises", 2, "--out", tmp_path / "out"]
    status, printed, err = run(capsys, *about, "--json")
    reports = json.loads(printed)
    assert status == editing.FAILED and err.count("\n") == 1 and "(and 1 more of 2 noises)" in err
    assert [r["seed"] for r in reports] == [42, 43] and {r["reader"] for r in reports} == {ocr.reader("tesseract")}
    for report in reports:
        assert report == json.loads((tmp_path / "out" / f"seed-{report['seed']}" / "edit.json").read_text())


# --- picture files --------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
#: How a file must be turned for its orientation, 1 to 8, to lead back to the picture.
TURNS = (None, *(Image.Transpose[n] for n in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE")))
TURNS += tuple(Image.Transpose[n] for n in ("ROTATE_90", "TRANSVERSE", "ROTATE_270"))


def opened(tmp_path, image, name="picture.png", **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return edit.open_picture(tmp_path / name, models.spec("sd3-mini"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_the_way_up_that_their_file_says(tmp_path, orientation):
    image, turn, exif = Image.fromarray(PIXELS), TURNS[orientation - 1], Image.Exif()
    exif[274] = orientation
    turned = image if turn is None else image.transpose(turn)
    np.testing.assert_array_equal(opened(tmp_path, turned, exif=exif), PIXELS)
    if orientation > 4:
        with pytest.raises(TextlocError, match="128x64 pixels, got 64x128"):
            opened(tmp_path, image, exif=exif)


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P"))
def test_what_is_transparent_stands_on_white(tmp_path, mode):
    image, clear, options = Image.fromarray(PIXELS), np.zeros((64, 128), bool), {}
    if mode == "P":
        image = image.quantize(16)
        clear, options = np.array(image) == 3, {"transparency": 3}
        wanted = np.array(image.convert("RGB"))
    else:
        clear[:, 64:] = True
        image = image.convert(mode[:-1])
        wanted = np.array(image.convert("RGB"))
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    wanted[clear] = 255
    np.testing.assert_array_equal(opened(tmp_path, image, **options), wanted)


@pytest.mark.parametrize("name", ("grey.png", "grey.tif"))
def test_grey_of_sixteen_bits_is_scaled(tmp_path, name):
    grey = np.linspace(0, 65535, 64 * 128).reshape(64, 128).astype(np.uint16)
    wanted = np.rint(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(opened(tmp_path, Image.fromarray(grey), name), np.stack([wanted] * 3, -1))


def test_pictures_that_no_rule_covers_are_refused(tmp_path):
    image = Image.fromarray(PIXELS)
    for kind in (np.int32, np.float32):
        with pytest.raises(TextlocError, match="32 bits per channel"):
            opened(tmp_path, Image.fromarray(PIXELS[..., 0].astype(kind)), "deep.tif")
    with pytest.raises(TextlocError, match="has 2 pictures"):
        opened(tmp_path, image, "film.gif", save_all=True, append_images=[image.rotate(180)])


def test_what_cannot_be_inverted_is_refused():
    model = tiny.model("sd3")
    size = model.spec.height
    for wrong in (np.zeros((1, size, size, 3)), np.zeros((size, size, 3), np.uint8)):
        with pytest.raises(TextlocError, match="must be uint8"):
            edit.invert(model, wrong, [FROM])
    picture = np.zeros((1, size, size, 3), np.uint8)
    with torch.no_grad():
        model.pipe.vae.encoder.conv_in.bias.fill_(torch.nan)
    with pytest.raises(TextlocError, match="not finite"):
        edit.invert(model, picture, [FROM])
    for other in (AutoencoderTiny(), AutoencoderKL(latents_mean=[0.0] * 4)):
        model.pipe.vae = other
        with pytest.raises(TextlocError, match="AutoencoderKL without latents_mean"):
            edit.invert(model, picture, [FROM])


def test_texts_that_are_the_same_to_a_model_are_refused_before_it_draws(monkeypatch):
    monkeypatch.setattr(Experiment, "draw", None)
    model = tiny.model("sd3")
    with pytest.raises(TextlocError, match="have the same tokens in"):
        edit.report(model, pair('a sign that says "12"', 'a sign that says "34"'), edit.localized((1,)))


@pytest.mark.parametrize("bypass", ("processor", "compiled"))
def test_maps_that_cannot_be_replaced_are_an_error(bypass):
    model = tiny.model("sdxl")
    if bypass == "processor":
        model.denoiser.set_attn_processor(AttnProcessor())
    else:
        model.denoiser.mid_block.compile(backend="eager")
    with pytest.raises(TextlocError):
        edit.edit(model, pair(), edit.prompt_to_prompt())
