"""The guard and its baselines, on tiny pipelines of every family: exact where they must be, and never in the way."""

import inspect

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from textloc_utils import experiment, metrics, models, ocr, results, safety
from textloc_utils.experiment import Experiment
from textloc_utils.generate import counted, first_call, generate
from textloc_utils.miniatures import evaluation, factors, world
from textloc_utils.patching import Patch, patched
from textloc_utils.safety import baselines, detector
from textloc_utils.safety.detector import Finding, WordDetector
from textloc_utils.safety.disguises import DISGUISES
from textloc_utils.settings import TextlocError

U_NETS = ("ldm", "sdxl", "if")
GUIDED = ("ldm", "sdxl", "if", "sd3", "sd35")
SAYS = 'A {} sign that says "{}"'
TOXIC, HARMLESS = SAYS.format("red", "river"), SAYS.format("blue", "stone")


def find(prompt: str) -> list[Finding]:
    """The tiny tokenizers know few words: "river" is the toxic one, and "world" stands in for it."""
    at = prompt.find("river")
    return [Finding(start=at, end=at + 5, text="river", word="river")] if at >= 0 else []


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(detector, "HARMLESS", ("world",))


CLEANED = TOXIC.replace("river", "world")


def make(name: str, method="guard", layers=(1, 2)) -> safety.Guard:
    return safety.guard(tiny.model(name), layers, detector=find, method=method)


def draw(model, prompts, **options) -> np.ndarray:
    return generate(model, prompts, range(len(prompts)), **options).images.astype(int)


def rows(model, prompts, **options) -> int:
    return generate(model, prompts, range(len(prompts)), **options).row_evaluations


# --- the guard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", safety.METHODS)
@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_harmless_prompts_are_drawn_bit_for_bit(name, method):
    plain = tiny.model(name)
    if method == "guard by embedding" and name not in U_NETS:
        pytest.skip("refused, see below")
    guarded = safety.guard(plain, (0,), detector=find, method=method)
    arguments = plain.call_arguments([HARMLESS] * 2, steps=2, guidance=3.0, negative_prompt=None)
    wanted = plain.pipe(**arguments, generator=torch.Generator().manual_seed(1), output_type="np").images
    # Called like the pipeline, the first argument by position as well.
    prompt = arguments.pop("prompt")
    seen = guarded(prompt, **arguments, generator=torch.Generator().manual_seed(1), output_type="np").images
    assert np.array_equal(wanted, seen)


@pytest.mark.parametrize("name", U_NETS)
def test_on_u_nets_the_embedding_does_what_the_row_does(name):
    asked = [TOXIC, HARMLESS, TOXIC]
    plain = draw(tiny.model(name), asked)
    by_embedding, by_row = (draw(make(name, f"guard by {how}").model, asked) for how in ("embedding", "row"))
    # The rows' noise is their number; layers of a U-Net do not see the target's.
    patches = [Patch(source=i, target=3, layers=(1, 2)) for i in (0, 2)]
    by_patch = draw(tiny.model(name), [*asked, CLEANED], patches=patches)
    assert np.abs(by_embedding - by_row).max() <= 1
    assert np.abs(by_embedding - by_patch[:3]).max() <= 1
    assert np.abs(by_embedding[[0, 2]] - plain[[0, 2]]).max() > 5
    # The denoiser's batch keeps its shape, so that a harmless prompt in it keeps every bit.
    assert np.array_equal(by_embedding[1], plain[1])


@pytest.mark.parametrize("name", ("sd3", "sd35", "flux"))
def test_by_row_is_the_patch_where_pictures_agree(name):
    """At the first step the cleaned prompt's own picture is the prompt's: guard and patching engine are one."""
    guarded = make(name, layers=(0, 2))
    plain = guarded._inner

    def latents(call, asked):
        arguments = plain.call_arguments(asked, steps=1, guidance=4.0, negative_prompt=None)
        noise = [torch.Generator().manual_seed(0) for _ in asked]
        return call(**arguments, generator=noise, output_type="latent").images[0]

    seen = latents(guarded, [TOXIC])
    with patched(plain, [Patch(source=0, target=1, layers=(0, 2))], 2):
        wanted = latents(plain.pipe, [TOXIC, CLEANED])
    assert torch.allclose(seen, wanted, atol=1e-4)
    assert (seen - latents(plain.pipe, [TOXIC])).abs().max() > 1e-2


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_what_the_guard_costs(name):
    asked, plain = [TOXIC, HARMLESS, HARMLESS], tiny.model(name)
    steps, base = plain.spec.steps, rows(plain, asked)
    assert rows(make(name).model, asked) == base + (0 if name in U_NETS else steps)
    assert rows(make(name).model, [HARMLESS] * 3) == base
    patches = [Patch(source=0, target=3, layers=(1,))]
    guided = base // (3 * steps)
    assert rows(plain, [*asked, CLEANED], patches=patches) == base + guided * steps


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_the_guard_leaves_no_trace(name):
    guarded = make(name)
    model = guarded._inner
    before = draw(model, [TOXIC])
    guarded(TOXIC, num_inference_steps=1, height=model.spec.height, width=model.spec.width, output_type="np")
    with pytest.raises((TypeError, ValueError)):
        guarded(TOXIC, num_inference_steps="many")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.denoiser.modules())
    assert np.array_equal(before, draw(model, [TOXIC]))


@pytest.mark.parametrize("name", ("sdxl", "if", "sd3", "flux"))
def test_several_pictures_per_prompt(name):
    guarded = make(name)
    plain = guarded._inner
    size = {"num_inference_steps": 2, "height": plain.spec.height, "width": plain.spec.width, "output_type": "np"}

    def images(call, **options):
        generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3, 4)]
        return call([HARMLESS, TOXIC], num_images_per_prompt=2, generator=generators, **size, **options).images

    seen, unguarded = images(guarded), images(plain.pipe)
    assert seen.shape == unguarded.shape and np.allclose(seen[:2], unguarded[:2], atol=1e-5)
    assert np.abs(seen[2:] - unguarded[2:]).max((1, 2, 3)).min() > 1e-3
    alone = guarded([TOXIC], generator=[torch.Generator().manual_seed(4)], **size).images
    assert np.allclose(seen[3], alone[0], atol=1e-5)


def test_the_callers_noise_is_left_alone():
    guarded = make("sdxl", layers=())
    size = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    torch.manual_seed(5)
    seen = guarded(TOXIC, **size).images
    torch.manual_seed(5)
    # No layer is localized, so the picture must be the pipeline's own.
    assert np.array_equal(seen, guarded._inner.pipe(TOXIC, **size).images)


def test_every_prompt_argument_is_screened():
    guarded = make("sdxl")
    size = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}
    with counted(guarded._inner) as counter:
        one = guarded(HARMLESS, prompt_2=TOXIC, generator=torch.Generator().manual_seed(0), **size).images
    other = guarded._inner.pipe(HARMLESS, prompt_2=TOXIC, generator=torch.Generator().manual_seed(0), **size).images
    assert counter.rows == 2 and not np.array_equal(one, other)


def test_flux_negatives_in_a_call_of_their_own_are_left_alone():
    """With true guidance FLUX asks for negatives apart: one row for prompt and cleaned prompt each, one for them."""
    guarded = make("flux")
    size = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "max_sequence_length": 16}
    size |= {"true_cfg_scale": 2.0, "negative_prompt": HARMLESS}
    with counted(guarded._inner) as counter:
        guarded(TOXIC, generator=torch.Generator().manual_seed(0), **size)
    assert (counter.calls, counter.rows) == (2 * 2, 2 * (2 + 1))


def test_a_pipeline_and_its_guard_have_one_face():
    pipe = tiny.BUILDERS["sd3"]()
    guarded = safety.guard(pipe, [1], detector=find)
    assert inspect.signature(guarded) == inspect.signature(pipe) and guarded.scheduler is pipe.scheduler
    cleaned, (found,) = guarded.screen(TOXIC)
    assert cleaned == CLEANED and found.word == "river"


def test_what_is_done_to_a_guard_is_done_to_its_pipeline():
    guarded = make("sd3")
    pipe = guarded._inner.pipe
    assert guarded.to("cpu") is guarded
    guarded.scheduler = other = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=9.0)
    assert pipe.scheduler is other
    noise = torch.randn(1, *first_noise("sd3"), generator=torch.Generator().manual_seed(5))
    seen = generate(guarded.model, [HARMLESS], [1], noise=noise).images
    assert np.array_equal(seen, generate(guarded._inner, [HARMLESS], [1], noise=noise).images)
    assert not np.array_equal(seen, generate(guarded._inner, [HARMLESS], [1]).images)
    pixels = make("if")  # takes its noise by another way
    noise = torch.randn(1, *first_noise("if"), generator=torch.Generator().manual_seed(5))
    seen = generate(pixels.model, [HARMLESS], [1], noise=noise).images
    assert np.array_equal(seen, generate(pixels._inner, [HARMLESS], [1], noise=noise).images)
    assert not np.array_equal(seen, generate(pixels.model, [HARMLESS], [1]).images)


def first_noise(name: str) -> tuple[int, ...]:
    """The shape of what a tiny model starts from, without rows."""
    model, shapes = tiny.model(name), []
    handle = model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(
            (args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))).shape[1:]
        ),
        with_kwargs=True,
    )
    generate(model, [HARMLESS], [0])
    handle.remove()
    return tuple(shapes[0])


def test_an_empty_prompt_is_a_prompt():
    guarded = make("sd3")
    assert np.array_equal(draw(guarded.model, [""]), draw(guarded._inner, [""]))


def test_the_harmless_word_is_the_callers_own():
    guarded = safety.guard(tiny.model("sd3"), (1,), detector=find, harmless={"river": "stone"}.get)
    assert guarded.screen(TOXIC)[0] == TOXIC.replace("river", "stone")


def test_baselines_need_no_layers():
    assert safety.guard(tiny.model("sd3"), detector=find, method="negative prompt").layers == ()


def test_bad_input_is_named():
    with pytest.raises(TextlocError, match="unknown method 'hope'"):
        make("sd3", "hope")
    with pytest.raises(TextlocError, match="guard by row"):
        make("sd3", "guard by embedding")
    with pytest.raises(TextlocError, match="out of range"):
        make("sd3", layers=(9,))
    with pytest.raises(TextlocError, match="not known"):
        safety.guard(tiny.model("sd3"))
    with pytest.raises(TextlocError, match="prompt_embeds"):
        make("sd3")(prompt_embeds=torch.zeros(1, 2, 3))
    with pytest.raises(TextlocError, match="prompt_embeds"):
        make("sd3")(TOXIC, prompt_embeds=torch.zeros(1, 2, 3))
    for name, method in (("flux", "negative prompt"), ("flux", "SLD medium"), ("ldm", "SLD max")):
        with pytest.raises(TextlocError, match="guidance"):
            draw(make(name, method).model, [TOXIC], guidance=1.0)


# --- the baselines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_swap_is_the_cleaned_prompt_drawn_plainly(name):
    asked = [TOXIC, HARMLESS]
    seen = draw(make(name, "prompt swap").model, asked)
    assert np.array_equal(seen, draw(tiny.model(name), [CLEANED, HARMLESS]))


@pytest.mark.parametrize("name", ("sdxl", "if", "sd3", "sd35"))
def test_the_negative_prompt_is_the_pipelines_own(name):
    seen = draw(make(name, "negative prompt").model, [TOXIC, HARMLESS])
    wanted = draw(tiny.model(name), [TOXIC], negative_prompt=safety.concept(find(TOXIC)))
    assert np.abs(seen[0] - wanted[0]).max() <= 1
    plain = draw(tiny.model(name), [TOXIC, HARMLESS])
    assert np.array_equal(seen[1], plain[1]) and np.abs(seen[0] - plain[0]).max() > 5


def test_the_negative_prompt_of_a_pipeline_that_takes_none():
    seen, plain = (draw(m, [TOXIC, HARMLESS]) for m in (make("ldm", "negative prompt").model, tiny.model("ldm")))
    assert np.array_equal(seen[1], plain[1]) and np.abs(seen[0] - plain[0]).max() > 5


def sld(**changes) -> safety.SafeDiffusion:
    return safety.SafeDiffusion(
        **{"scale": 1000, "warmup": 0, "threshold": 0.5, "momentum": 0.3, "beta": 0.4} | changes
    )


@pytest.mark.parametrize("name", GUIDED)
def test_safe_diffusion_of_scale_nought_is_plain_guidance(name):
    asked, plain = [TOXIC, HARMLESS], tiny.model(name)
    assert np.abs(draw(make(name, sld(scale=0)).model, asked) - draw(plain, asked)).max() <= 1
    assert np.abs(draw(make(name, sld(warmup=50)).model, asked) - draw(plain, asked)).max() <= 1
    seen = draw(make(name, sld()).model, asked)
    assert np.abs(seen - draw(plain, asked))[0].max() > 5
    assert np.abs(seen - draw(plain, asked))[1].max() <= 1
    steps = plain.spec.steps
    assert rows(make(name, sld()).model, asked) == rows(plain, asked) + steps


def by_the_equations(model, config, steps: int) -> tuple[np.ndarray, list]:
    """Equations 3 to 8 of the paper once more, from answers of the denoiser to negative, prompt and concept.

    Every step's answers are asked for one by one; the pipeline gets the whole guided answer for both halves.
    """
    other = first_call(
        model, **model.call_arguments([safety.concept(find(TOXIC))], steps=steps, guidance=1.0, negative_prompt=None)
    )
    momentum, trace, inside = [None], [], [False]

    def after(denoiser, args, kwargs, output):
        if inside[0]:
            return None
        inside[0] = True
        given = models.select_rows(denoiser, args, kwargs, [1], [2], other)
        s = denoiser(**given | {"return_dict": False})[0]
        inside[0] = False
        u, c = output[0].chunk(2)
        nu = momentum[0] if momentum[0] is not None else torch.zeros_like(u)
        phi = torch.clamp((c - s).abs() * config.scale, max=1)
        mu = torch.where(c - s < config.threshold, phi, torch.zeros_like(phi))
        gamma = mu * (s - u) + config.momentum * nu
        momentum[0] = config.beta * nu + (1 - config.beta) * gamma
        trace.append(momentum[0])
        guided = u + model.spec.guidance * (c - u - gamma)
        # Both halves alike: guidance of any scale then gives the guided answer itself.
        return models.with_answer(output, torch.cat([guided, guided]))

    handle = model.denoiser.register_forward_hook(after, with_kwargs=True)
    try:
        return draw(model, [TOXIC], steps=steps), trace
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ("ldm", "sdxl", "sd3"))
def test_safe_diffusion_follows_its_equations(name):
    model, config = tiny.model(name), sld()
    wanted, trace = by_the_equations(model, config, 3)
    assert np.abs(draw(make(name, config).model, [TOXIC], steps=3) - wanted).max() <= 1
    # The momentum is carried from step to step: forgetting it gives another picture.
    forgotten, _ = by_the_equations(model, sld(momentum=0.0), 3)
    assert np.abs(forgotten - wanted).max() > 1 and not torch.equal(trace[0], trace[1])


def test_momentum_is_kept_across_steps_and_starts_anew_with_each_picture():
    """By hand: constant answers u = 0, c = 0, s = 1 and m_1 = 0.6, 1.18 ... as the equations say."""
    model = tiny.model("sd3")
    text = torch.zeros(2, 1, 1)
    change = baselines.SafeGuidance(model, 1, [0], {"encoder_hidden_states": text}, sld(threshold=0.5), 0)
    change.batch = 2
    answer, extra = torch.zeros(2, 4, 2, 2), torch.ones(1, 4, 2, 2)
    pushed = []
    for timestep in (900.0, 600.0, 300.0):
        given = {"hidden_states": torch.zeros(2, 4, 2, 2), "timestep": torch.tensor([timestep] * 2)}
        change.begin((), given | {"encoder_hidden_states": text})
        pushed.append(-change.change(answer, extra)[1].mean().item())
    # safety = 1 + 0.3 nu; nu = 0.4 nu + 0.6 safety
    assert pushed == pytest.approx([1.0, 1.18, 1.2844])
    first, second = (draw(make("sd3", sld()).model, [TOXIC]) for _ in range(2))
    assert np.array_equal(first, second)


def test_warm_up_is_a_share_of_the_steps():
    waits = []
    for steps in (50, 20):
        change = make("sd3", "SLD medium")._change(1, [0], {}, {"num_inference_steps": steps})
        waits.append(change.warmup)
    assert waits == [10, 4]
    assert make("sd3", "SLD medium")._change(1, [0], {}, {}).warmup == 6  # of the pipeline's own 28 steps


# --- drawing and measuring --------------------------------------------------------------------------------------


def test_a_folder_of_guarded_pictures_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "rows_per_call", lambda model: 1)
    guarded, asked = make("ldm"), [TOXIC, SAYS.format("green", "river"), HARMLESS]
    whole = safety.draw(guarded, asked, tmp_path / "a", steps=2)
    assert {row["seed"] for row in whole} == {42}
    assert [bool(row["found"]) for row in whole] == [True, True, False]
    assert [row["cleaned"] == row["prompt"] for row in whole] == [False, False, True]
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "other results"))  # nothing of these is known
    calls = []

    def generate_twice(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(experiment, "generate", generate_twice)
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "anew"))
    with pytest.raises(KeyboardInterrupt):
        safety.draw(guarded, asked, tmp_path / "b", steps=2)
    assert safety.draw(guarded, asked, tmp_path / "b", steps=2) == whole and calls[2:] == [[asked[1]], [asked[2]]]
    for row in whole:
        assert (tmp_path / "a" / row["file"]).read_bytes() == (tmp_path / "b" / row["file"]).read_bytes()
    safety.draw(guarded, asked, tmp_path / "b", steps=3)
    assert len(calls) == 7, "other settings draw anew"
    safety.draw(guarded, asked, tmp_path / "b", steps=3)
    assert len(calls) == 7
    monkeypatch.setattr(results, "computed_with", lambda model: {"reader": "another"})
    safety.draw(guarded, asked, tmp_path / "b", steps=3)
    assert len(calls) == 10, "and so does another reader"


@pytest.mark.parametrize("name", models.MINIATURES)
def test_the_word_is_gone_and_the_scene_is_not(name, monkeypatch):
    """The known effect, on a miniature: unguarded pictures spell the word, guarded ones do not, and look alike."""
    monkeypatch.undo()  # the words that stand in are the real ones here
    detector = WordDetector(["WATER", "NIGHT", "MARKET", "SILVER", "PLANE", "CLOUD", "RIVER", "BREAD"])
    model, words = models.load(name, device="cpu"), list(detector.words)
    guard = safety.guard(model, experiment.known_layers(model), detector=detector)
    asked = [evaluation.named(scene) for scene in evaluation.scenes(words, 3)]
    plain, guarded = (generate(m, asked, range(len(asked))).images for m in (model, guard.model))
    assert np.mean([read == word for read, word in zip(ocr.read(plain), words, strict=True)]) >= 0.75
    assert max(metrics.text_score(read, word) for read, word in zip(ocr.read(guarded), words, strict=True)) < 0.5
    before, after = factors.read(plain), factors.read(guarded)
    kept = [(a.material, a.sign) == (b.material, b.sign) for a, b in zip(before, after, strict=True)]
    assert sum(kept) >= len(kept) - 1
    outside = np.stack([reading.outside_text(world.COLUMNS) for reading in before])
    alike, shuffled = (metrics.ssim(pictures, plain, outside) for pictures in (guarded, np.roll(guarded, 1, axis=0)))
    assert np.median(alike) > 0.8 and (alike > shuffled).all()


@pytest.mark.parametrize("name", models.MINIATURES)
def test_harmless_prompts_keep_every_bit_on_the_shipped_miniatures(name):
    """With the guard's own detector, on words that look like listed ones, in one batch and one by one."""
    model = models.load(name, device="cpu")
    guarded = safety.guard(model, (0, 1))
    asked = [SAYS.format("blue", word) for word in ("CHAMP", "LOTUS", "GREEKS", "HELLO")]
    assert not any(guarded.screen(prompt)[1] for prompt in asked)
    for size in (1, 4):
        seen = draw(guarded.model, asked, steps=2, batch_size=size)
        assert np.array_equal(seen, draw(model, asked, steps=2, batch_size=size))
    assert guarded.fired is None
    toxic = SAYS.format("blue", "STUPID")
    seen, plain = (draw(m, [*asked, toxic], steps=2) for m in (guarded.model, model))
    assert not np.array_equal(seen[4], plain[4])
    if name != "sd3-mini":  # there the guard adds a row, and sums come out in another order
        assert np.array_equal(seen[:4], plain[:4])
    else:
        assert np.abs(seen[:4] - plain[:4]).max() <= 1


def test_known_layers_are_those_of_the_same_weights(tmp_path, monkeypatch):
    """Of two published searches the exhaustive one's."""
    monkeypatch.setattr(experiment, "data_dir", lambda: tmp_path)
    model = tiny.model("ldm")
    run = Experiment.of(model, steps=1)
    with pytest.raises(TextlocError, match="not known"):
        experiment.known_layers(model)
    for how, layers in (("budgeted", [0]), ("exhaustive", [1, 3])):
        about = {"key": run.key, "found": {"layers": layers}}
        run.write(f"localize_tiny-ldm_{how}", pd.DataFrame({"layer": layers}), seconds=0.0, **about)
        assert experiment.known_layers(model) == tuple(layers)
    with torch.no_grad():
        next(model.denoiser.parameters()).add_(1.0)
    with pytest.raises(TextlocError, match="not known"):
        experiment.known_layers(model)


def test_what_is_found_and_what_is_not():
    rates = safety.found_rates().set_index("kind")
    assert rates.found["plain"] == 1 and rates.found["split"] < 0.2 and rates.found["harmless"] < 0.05
    assert set(rates.index) == {*DISGUISES, "harmless"} and rates.n["harmless"] == 600
