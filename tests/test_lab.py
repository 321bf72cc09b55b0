"""The lab: what is exported, and what a browser makes of it."""

import base64
import dataclasses
import json
import re
import shutil
import string

import numpy as np
import pytest
import test_site
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from test_site import serious
from tokenizers import Tokenizer

from textloc_utils import models, scene_pairs
from textloc_utils.book import lab
from textloc_utils.generate import generate
from textloc_utils.miniatures import factors, world
from textloc_utils.miniatures.tokenizers import letter_tokenizer
from textloc_utils.patching import Patch
from textloc_utils.settings import TextlocError

browser, address, open_page = test_site.browser, test_site.address, test_site.open_page
EXPORTED = [name for name, spec in models.registry().items() if spec.miniature and spec.stage2 is None]
MINI = models.spec("sd3-mini")
NAMED = dataclasses.replace(MINI, prompt_template=world.NAMED)
PAIRS = 20


def small(family):
    """A tiny pipeline whose prompts are those of the miniatures' world."""
    model = tiny.model(family)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, prompt_template=world.NAMED))


# --- the loop as numbers ------------------------------------------------------------------------------------------

V = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
LINEAR = {
    "ddim": DDIMScheduler(rescale_betas_zero_snr=True, set_alpha_to_one=True, **V),
    "ddim, noise": DDIMScheduler(clip_sample=False),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": DPMSolverMultistepScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
}


def timed(scheduler, steps: int):
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", LINEAR)
def test_a_sampler_is_a_table_of_numbers(name):
    """Answers that depend on the picture, as a denoiser's do: the table gives what the sampler gives."""
    steps, scheduler = 7, timed(LINEAR[name], 7)
    known = lab.sampler(scheduler, steps)
    assert len(known["timesteps"]) == len(known["update"]) == len(known["clean"]) == steps
    assert [len(row) for row in known["update"]] == list(range(2, steps + 2))
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1))
    picture, own, answers = noise, noise, []
    for t, row in zip(scheduler.timesteps, known["update"], strict=True):
        answers.append(torch.tanh(own) + float(t) / 1000)
        picture = scheduler.step(torch.tanh(picture) + float(t) / 1000, t, picture, return_dict=False)[0]
        own = sum(a * x for a, x in zip(row, [noise, *answers], strict=True))
        torch.testing.assert_close(own, picture, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_the_clean_picture_is_what_the_noisy_one_was_made_of(name):
    scheduler = timed(LINEAR[name], 7)
    known, rng = lab.sampler(scheduler, 7), np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 20))
    for step, (own, of) in enumerate(known["clean"]):
        if name == "flow":
            level = float(scheduler.sigmas[step])
            noisy, answer = (1 - level) * clean + level * noise, noise - clean
        else:
            signal = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
            noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
            answer = noise if name == "ddim, noise" else signal**0.5 * noise - (1 - signal) ** 0.5 * clean
        np.testing.assert_allclose(own * noisy + of * answer, clean, atol=1e-3)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=True)])
def test_a_sampler_that_draws_noise_or_clips_is_refused(scheduler):
    with pytest.raises(TextlocError, match="the lab needs a linear sampler"):
        lab.sampler(timed(scheduler, 5), 5)
    with pytest.raises(TextlocError, match="the lab needs a linear sampler"):  # not as many steps as the model's
        lab.sampler(timed(LINEAR["ddim"], 5), 6)


# --- prompts ------------------------------------------------------------------------------------------------------


def sentence(known: dict, chosen: dict, text: str) -> str:
    """A prompt as the page makes it from its data."""
    named = [i for i, group in enumerate(known["groups"]) if chosen.get(group[0])]
    template = known["templates"]["".join(map(str, named))]
    filled = template.format(text=text, a=known["articles"].get(chosen.get("sign")), **chosen)
    return filled[0].upper() + filled[1:]


def test_each_factor_can_be_left_open():
    known = lab.choices(NAMED)
    assert sorted(known["factors"]) == sorted(world.FACTORS) and len(known["templates"]) == 16
    values = {"ink": "white", "typeface": "serif", "sign": "orange", "shape": "banner", "material": "leaves"}
    assert sentence(known, values, "HELLO") == world.prompt("HELLO", **values)
    assert sentence(known, {}, "HELLO") == world.OPEN.format(text="HELLO")
    tokenizer = letter_tokenizer(length=world.TOKENS, kind="clip")
    for key, template in known["templates"].items():
        named = {name for i in key for name in known["groups"][int(i)]}
        fields = {name for _, name, _, _ in string.Formatter().parse(template)} - {None, "text", "a"}
        assert fields == named
        text = sentence(known, {k: v for k, v in values.items() if k in named}, "RIVERS")
        tokens = tokenizer(text).input_ids
        assert len(tokens) <= world.TOKENS and tokenizer.unk_token_id not in tokens, text
    clashes = {(sign, ink) for (_, sign), (_, ink) in known["clashes"]}
    assert clashes == {(sign, ink) for sign in world.SIGNS for ink in world.INKS if ink not in world.READABLE[sign]}
    assert known["default"]["ink"] in world.READABLE[known["default"]["sign"]]


def test_a_template_of_no_known_world_is_refused():
    with pytest.raises(TextlocError, match="names font; the lab knows sign, shape, ink, typeface, material"):
        lab.choices(dataclasses.replace(MINI, prompt_template='A {font} sign says "{text}".'))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_tokens_for_javascript_are_the_tokenizers(kind):
    made = letter_tokenizer(length=world.TOKENS, kind=kind)
    table = lab._plain(json.loads(made.backend_tokenizer.to_str()))
    assert "Punctuation" not in json.dumps(table)
    plain, text = Tokenizer.from_str(json.dumps(table)), 'An orange sign against brick says "AXE" in plain letters.'
    assert plain.encode(text).ids == made(text).input_ids


def test_the_readers_letters_are_those_of_the_package():
    known, letters = lab.reader()
    faces, cells = len(world.TYPEFACES), (world.CELL_HEIGHT, world.PITCH)
    assert letters.shape == (26 * faces, *cells) and known["faces"] == list(world.TYPEFACES)
    np.testing.assert_allclose(letters.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(np.square(letters).sum((1, 2)), 1, rtol=1e-4)


# --- the export ---------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_an_export_is_whole_and_of_the_model(family, tmp_path):
    model = small(family)
    if family == "sdxl":
        model.pipe.scheduler = timed(LINEAR["ddim"], 5)
    about = lab.export(model, tmp_path / "tiny", "key")
    stored = json.loads((tmp_path / "tiny" / lab.INDEX).read_text())
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "tiny").iterdir() if p.name != lab.INDEX}
    assert stored.pop("bytes") == sizes and set(sizes) == {"text.onnx", "denoiser.onnx", "decoder.onnx", "noise.bin"}
    assert stored == json.loads(json.dumps(about)) and stored["key"] == "key"
    assert stored["layers"] == [layer.name for layer in model.layers] and stored["pooled"]
    noise = np.fromfile(tmp_path / "tiny" / "noise.bin", "<f4").reshape(-1, *stored["noise"])
    own = torch.randn(stored["noise"], generator=torch.Generator().manual_seed(stored["seeds"][3]))
    np.testing.assert_array_equal(noise[3], own)


@pytest.mark.full
def test_an_export_that_draws_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lab._Denoiser, "_mix", lambda self, name, amount: lambda *a: self.fired.add(name))
    with pytest.raises(TextlocError, match="the package draw different pictures"):
        lab.export(small("sd3"), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.full
def test_a_layer_that_takes_no_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lab._Denoiser, "_mix", lambda self, name, amount: lambda *a: None)
    with pytest.raises(TextlocError, match="took no part"):
        lab.export(small("sd3"), tmp_path / "tiny")


@pytest.mark.parametrize(("family", "why"), [("if", "no autoencoder"), ("flux", "text and picture together")])
def test_models_that_the_lab_cannot_run_are_refused(family, why, tmp_path):
    with pytest.raises(TextlocError, match=why):
        lab.export(small(family), tmp_path / "tiny")


def test_no_miniature_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path))
    with pytest.raises(TextlocError, match="there is no miniature for the lab"):
        lab.build()


def test_other_weights_are_another_export(tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(MINI.source, tmp_path / folder / MINI.name)
    same = lab._key(tmp_path / "a" / MINI.name), lab._key(tmp_path / "b" / MINI.name)
    weights = next((tmp_path / "b").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert same[0] == same[1] != lab._key(tmp_path / "b" / MINI.name)


# --- in a browser -------------------------------------------------------------------------------------------------

START = """name => new Promise((resolve, reject) => {
  const worker = new Worker(new URL('../_static/lab/worker.mjs', location.href), { type: 'module' });
  window.lab = worker;
  worker.onerror = event => reject(new Error(event.message));
  const ends = { loaded: resolve, failed: data => reject(data.reason) };
  worker.onmessage = ({ data }) => ends[data.type]?.(data);
  worker.postMessage({ type: 'load', model: name, total: 1 });
})"""
DRAW = """([job, texts]) => new Promise((resolve, reject) => {
  window.lab.onmessage = ({ data }) => {
    if (data.type === 'failed') reject(data.reason);
    if (data.type !== 'drawn') return;
    let text = '';
    for (const byte of data.pictures) text += String.fromCharCode(byte);
    resolve([btoa(text), data.readings]);
  };
  window.lab.postMessage({ type: 'draw', id: 1, job, texts, every: 0 });
})"""


def drawn_in(page, job: dict, texts: dict, spec) -> tuple[np.ndarray, list[dict]]:
    """Pictures (rows, H, W, 3) and readings of a job, by the lab's worker that ``START`` began."""
    data, readings = page.evaluate(DRAW, [job, texts])
    pictures = np.frombuffer(base64.b64decode(data), np.uint8)
    return pictures.reshape(-1, spec.height, spec.width, 3), readings


@pytest.mark.full
@pytest.mark.parametrize("name", EXPORTED)
def test_the_browser_draws_what_the_package_draws(name, open_page):
    """Twenty pairs, each with other layers, steps and seed; the bytes, and what is read."""
    model = models.load(name, device="cpu")
    pairs, places = scene_pairs.for_model(model, PAIRS, "report"), list(range(len(model.layers)))
    rng, jobs, patches = np.random.default_rng(0), [], []
    for i, pair in enumerate(pairs):
        layers = places if i == 0 else sorted(rng.choice(places, 1 + i % len(places), replace=False).tolist())
        start, pooled = i % 4, model.pooled_site is not None and i % 2 == 0
        patches.append(Patch(source=3 * i + 2, target=3 * i, layers=layers, start=start, pooled=pooled))
        shares = [float(p in layers) for p in places] + [float(pooled)] * (model.pooled_site is not None)
        masks = [[0.0] * len(shares), [0.0] * len(shares), shares]
        jobs.append({"prompts": [pair.target, pair.source], "seed": pair.seed, "start": start, "masks": masks})
    texts = [text for pair in pairs for text in (pair.target, pair.source, pair.source)]
    wanted = generate(model, texts, [pair.seed for pair in pairs for _ in range(3)], patches=patches).images

    page, watch = open_page("book/lab.html")
    page.evaluate(START, name)
    found, read = [], []
    for job, pair in zip(jobs, pairs, strict=True):
        words = {"source": pair.source_text, "target": pair.target_text}
        pictures, readings = drawn_in(page, job, words, model.spec)
        found.append(pictures)
        read += [reading["text"] for reading in readings]
    off = np.abs(np.concatenate(found).astype(int) - wanted)
    print(f"\n{name}: {(off == 0).mean():.4%} equal, {(off <= 1).mean():.4%} within 1, largest {off.max()}")
    assert off.max() <= lab.MOST and (off <= 1).mean() >= lab.SHARE
    assert read == [reading.text for reading in factors.read(wanted)] and watch.wrong == []
    # Not the same picture everywhere: the patch with all layers drew another text than the source.
    assert np.abs(wanted[2].astype(int) - wanted[1]).max() > 50


def wait(page) -> str:
    """Wait until the lab is done; returns what it says."""
    page.wait_for_function("document.getElementById('lab').ariaBusy === 'false'", timeout=300_000)
    return page.locator("#lab-status").inner_text()


def pixels(page, name: str) -> list[int]:
    """The bytes (red, green, blue, opacity) of one of the lab's pictures."""
    script = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return page.eval_on_selector(f".lab-{name} canvas", script)


def tab_to(page, name: str) -> list[str]:
    """Press Tab until the lab's control has the focus; returns the lab's controls on the way."""
    order = []
    for _ in range(200):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == f"lab-{name}":
            return [i for i in order if i.startswith("lab-")]
    raise AssertionError(f"the Tab key does not reach {name}: {order}")


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_the_lab_by_keyboard_alone(width, scheme, open_page):
    page, watch = open_page("book/lab.html", width, scheme)
    page.wait_for_load_state("networkidle")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    big = page.evaluate(
        "performance.getEntriesByType('resource').filter(e => /wasm|onnx|\\.bin|\\.mjs/.test(e.name)).length"
    )
    assert big == 0 and re.fullmatch(r"Load \d+ MB and draw", page.locator("#lab-draw").inner_text())
    order = tab_to(page, "draw")
    controls = ("model", "source", "target", "seed", "known", "all", "none", "invert", "start")
    assert [i for i in order if i.removeprefix("lab-") in controls] == [f"lab-{name}" for name in controls]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    said = wait(page)
    assert "reads" in said and "patched" in said and watch.wrong == [] and serious(page) == []
    assert any(url.endswith("denoiser.onnx") for url in asked)
    for name in ("source", "patched", "target"):
        label = page.locator(f".lab-{name} canvas").get_attribute("aria-label")
        assert "reads" in label or "no text found" in label
        assert np.std(pixels(page, name)) > 10
        link = page.locator(f".lab-{name} a")
        assert link.is_visible() and link.get_attribute("href").startswith("blob:")
    across = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
    assert across <= width and page.locator("#lab-draw").inner_text() == "Draw"


@pytest.mark.full
def test_find_the_layer_draws_the_bars_and_can_be_stopped(open_page):
    page, watch = open_page(f"book/lab.html#model={MINI.name}&layers=")
    page.click("#lab-draw")
    said = wait(page)
    # No layer is patched: the source.
    assert "With nothing patched" in said
    source, patched = (np.array(pixels(page, name)) for name in ("source", "patched"))
    assert np.abs(source - patched).max() <= 1
    page.click("#lab-find")
    page.wait_for_selector("#lab-rows tr", timeout=300_000)
    page.click("#lab-stop")
    said = wait(page)
    rows = page.locator("#lab-rows tr").count()
    assert re.match(f"Stopped after {rows} of", said) and watch.wrong == []
    assert page.locator("#lab-bars .explorer-bar").count() > rows
    page.locator("#lab-bars .explorer-bar").nth(1).click()
    pressed = page.locator("#lab-layers [aria-pressed=true]")
    assert pressed.all_inner_texts() == ["1"]


@pytest.mark.full
def test_a_link_reproduces_the_state(open_page):
    known = lab.choices(MINI)
    other = {name: values[-1] for name, values in known["factors"].items()}
    assert other["ink"] in world.READABLE[other["sign"]]
    state = {"model": MINI.name, "source": "MOON", "target": "RIVER", "seed": "47", "layers": "0,2", "start": "3"}
    link = "&".join(f"{k}={v}" for k, v in (state | other).items())
    page, watch = open_page(f"book/lab.html#{link}")
    page.click("#lab-copy")
    assert page.evaluate("location.hash.slice(1).replaceAll('%2C', ',')") == link
    shown = page.locator("#lab-prompt").inner_text()
    assert shown == f"{sentence(known, other, 'MOON')} The target says “RIVER”."
    page.click("#lab-invert")
    assert page.locator("#lab-layers [data-place='0']").get_attribute("aria-pressed") == "false"
    assert page.locator("#lab-layers [data-place='1']").get_attribute("aria-pressed") == "true"
    assert watch.wrong == []


@pytest.mark.full
def test_what_cannot_be_drawn_is_told_before_anything_loads(open_page):
    page, watch = open_page("book/lab.html#model=no-mini&layers=77&colour=pink")
    assert page.locator("#lab-status").inner_text().endswith("no-mini, layer 77, colour.")
    for source, target, why in (("HE", "WATER", "needs 3 to 6 letters"), ("WATER", "WATER", "the same word")):
        page.fill("#lab-source", source)
        page.fill("#lab-target", target)
        page.click("#lab-draw")
        assert why in page.locator("#lab-status").inner_text()
    page.fill("#lab-source", "HELLO")
    (one, first), (other, second) = lab.choices(MINI)["clashes"][0]
    page.select_option(f"#lab-factor-{one}", first)
    page.select_option(f"#lab-factor-{other}", second)
    page.click("#lab-draw")
    assert "world has no" in page.locator("#lab-status").inner_text()
    loaded = page.evaluate("performance.getEntriesByType('resource').filter(e => /wasm|onnx/.test(e.name)).length")
    assert loaded == 0 and watch.wrong == []


@pytest.mark.full
def test_where_the_lab_cannot_run_one_message_leads_to_the_explorer(site, open_page):
    page, watch = open_page("book/lab.html", base=site.as_uri() + "/")
    note = page.locator("#lab-note")
    assert "python -m http.server" in note.inner_text() and page.locator("#lab-draw").is_disabled()
    assert note.locator("a").get_attribute("href") == "explorer.html" and watch.wrong == []
    page, watch = open_page("book/lab.html", first="delete window.WebAssembly")
    assert "no WebAssembly" in page.locator("#lab-note").inner_text() and serious(page) == []
    # Files that do not come end in the same message, and the reader may try again.
    page, _ = open_page("book/lab.html")
    page.route("**/denoiser.onnx", lambda route: route.fulfill(status=404))
    page.click("#lab-draw")
    assert (
        wait(page) == "The lab stopped."
        and "denoiser.onnx cannot be loaded: 404" in page.locator("#lab-note").inner_text()
    )
    assert page.locator("#lab-draw").is_enabled()
