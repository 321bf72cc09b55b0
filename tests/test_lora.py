"""Adapters sit where they should, train what they should, resume, and leave no trace."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from textloc_utils import files, lora, models
from textloc_utils.generate import generate
from textloc_utils.lora import Training
from textloc_utils.models import PROJECTIONS
from textloc_utils.settings import TextlocError

PROMPTS = ['a red sign that says "hello"', 'a blue sign that says "world"', 'a sign that says "river"', "a wall"]
FEW = Training(layers=(1,), rank=2, steps=4, batch=4, lr=1e-2)


@pytest.fixture(scope="module")
def tinies():
    """One tiny model per family; every test leaves them as they were."""
    built = {}
    return lambda name: built.setdefault(name, tiny.model(name))


def data(model, n=4):
    size = (n, model.spec.height, model.spec.width, 3)
    return lora.prepare(model, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8), PROMPTS[:n])


def every(model):
    return tuple(range(len(model.layers)))


def state(model):
    return {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def draw(model):
    return generate(model, PROMPTS[:2], [1, 2]).images


# --- where adapters sit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "places"),
    [
        ("ldm", 1, ["to_q", "to_k", "to_v", "to_out.0"]),
        ("sdxl", 0, ["to_q", "to_k", "to_v", "to_out.0"]),
        ("if", 0, ["to_q", "add_k_proj", "add_v_proj", "to_out.0"]),
        ("sd3", 0, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]),
        ("sd3", 2, ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]),  # the last block's text ends
        ("sd35", 0, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]),
        ("flux", 0, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]),
        ("flux", 3, ["to_q", "to_k", "to_v"]),  # a single block has no output of its own attention
    ],
)
def test_targets_are_the_text_layers_own_modules(tinies, name, layer, places):
    model = tinies(name)
    found = lora.targets(model, replace(FEW, layers=(layer,)))
    assert found == [f"{model.layers[layer].name}.{place}" for place in places]


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_adapters_sit_on_their_targets_alone_and_hold_the_counted_parameters(tinies, name):
    model = tinies(name)
    for training in (
        FEW,
        replace(FEW, layers=every(model)),
        replace(FEW, projections=("q",), self_attention=True),
    ):
        names, count = lora.targets(model, training), lora.parameters(model, training)
        try:
            added = lora.add(model, training)
            assert sum(p.numel() for p in added) == count
            wrapped = [n.removesuffix(".base_layer") for n, _ in model.denoiser.named_modules() if "base_layer" in n]
            assert sorted(wrapped) == sorted(names)
            assert all(p.dtype == torch.float32 for p in added)
        finally:
            lora.remove(model)


def test_self_attention_is_what_text_layers_leave(tinies):
    """The picture's attention to itself, beside that to the text; joint attention has none but in dual blocks."""
    for name, parts in (("ldm", ".attn1."), ("sdxl", ".attn1."), ("if", ".to_"), ("sd35", ".attn2.")):
        found = models.self_attention(tinies(name).denoiser)
        assert found and all(parts in path for path in found)
    # DeepFloyd IF attends to picture and text in one: queries and outputs are the text layers' already.
    assert {path.rsplit(".", 1)[1] for path in models.self_attention(tinies("if").denoiser)} == {"to_k", "to_v"}
    assert models.self_attention(tinies("sd3").denoiser) == models.self_attention(tinies("flux").denoiser) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layers": (9,)}, "0 to 3"),
        ({"layers": ()}, "at least one layer"),
        ({"projections": ("to_q",)}, ", ".join(PROJECTIONS)),
        ({"projections": ("text_q",)}, "no Linear module"),
        ({"rank": 0}, "rank"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"lr": -1.0}, "lr must be above 0 and at most 1, got -1.0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"lr": float("inf")}, "lr must be above 0"),
        ({"lr": 1e30}, "at most 1"),
        ({"rank": 1_000_000_000}, "at most 4096"),
        ({"drop": float("nan")}, "drop"),
        ({"seed": -1}, "seed"),
        ({"drop": 1.5}, "drop"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(tinies, tmp_path, monkeypatch, other, said):
    model = tinies("ldm")
    given = data(model)
    monkeypatch.setattr(model.denoiser, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(TextlocError, match=said) as error:
        lora.train(model, given, replace(FEW, **other), folder=tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert not getattr(model.denoiser, "peft_config", None)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(tinies, name):
    model = tinies(name)
    before, pictures, given = state(model), draw(model), data(model)
    training = replace(FEW, layers=every(model), rank=4, steps=30, drop=0.0)
    count = lora.parameters(model, training)
    try:
        report = lora.train(model, given, training)
        now = {n.replace(".base_layer", ""): t for n, t in state(model).items() if ".lora_" not in n}
        assert same(before, now)
        assert report.parameters == count and len(report.losses) == 30
        # Noise levels differ from step to step, so a few steps are compared with a few.
        assert np.mean(report.losses[-10:]) < np.mean(report.losses[:10])
        assert not np.array_equal(draw(model), pictures)
    finally:
        lora.remove(model)
    assert same(before, state(model)) and np.array_equal(draw(model), pictures)


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_an_untrained_adapter_changes_nothing(tinies, name):
    model = tinies(name)
    pictures = draw(model)
    try:
        lora.add(model, replace(FEW, layers=every(model)))
        assert np.array_equal(draw(model), pictures)
    finally:
        lora.remove(model)


@pytest.mark.parametrize("name", ["ldm", "sdxl", "if", "sd3", "flux"])
def test_the_gradient_flows_back_to_the_first_adapter_only(tinies, name):
    """The later the first adapter, the less is kept for the backward pass; layers before it keep nothing."""
    model = tinies(name)
    given, kept = data(model), []
    for first in every(model):
        try:
            layers = every(model)[first:]
            kept.append(lora.train(model, given, replace(FEW, layers=layers, steps=1)).saved_bytes)
        finally:
            lora.remove(model)
    assert all(a > b for a, b in zip(kept, kept[1:], strict=False)) and kept[-1] > 0


def test_what_is_kept_is_counted_once_and_without_weights():
    module = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with lora._saved(module) as sizes:
        y = module(x) * x  # keeps x twice and the Linear's output once, and the Linear's weight, which is there anyway
    assert sum(sizes.values()) == 2 * 4 * 8 * 4
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_captions_are_left_out_as_often_as_was_said(tinies, monkeypatch, drop):
    model, given, forward = tinies("sd3"), data(tinies("sd3")), lora._Objective.forward
    seen = []

    def spy(self, rows, captions, generator):
        seen.extend(zip(rows, captions, strict=True))
        return forward(self, rows, captions, generator)

    monkeypatch.setattr(lora._Objective, "forward", spy)
    lora.train(model, given, replace(FEW, steps=20, drop=drop))
    lora.remove(model)
    seen = seen[: 20 * FEW.batch]  # without the loss after the last step
    assert all(caption in (row, len(given)) for row, caption in seen)
    assert np.mean([caption == len(given) for _, caption in seen]) == pytest.approx(drop, abs=0.2 * drop)


def test_the_learning_rate_is_constant_and_then_falls(tinies, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = tinies("sd3")
    lora.train(model, data(model), replace(FEW, steps=8, lr=0.01))
    lora.remove(model)
    assert rates == pytest.approx([0.01] * 5 + [0.0075, 0.005, 0.0025])


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["ldm", "sd3"])
def test_a_killed_run_ends_at_the_same_weights(tinies, name, tmp_path, monkeypatch):
    model = tinies(name)
    given, training = data(model), replace(FEW, layers=every(model), steps=7)
    whole = lora.train(model, given, training)
    wanted = state(model)
    lora.remove(model)

    calls, forward = [], lora._Objective.forward

    def kill(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise StopError
        return forward(self, *arguments)

    monkeypatch.setattr(lora._Objective, "forward", kill)
    with pytest.raises(StopError):
        lora.train(model, given, training, folder=tmp_path, checkpoint_steps=2)
    assert not getattr(model.denoiser, "peft_config", None)
    assert [path.name for path in tmp_path.iterdir()] == [lora.CHECKPOINT]
    resumed = lora.train(model, given, training, folder=tmp_path, checkpoint_steps=2)
    assert len(calls) == 6 + 3 + 1  # went on after the fourth step; once more after the last
    assert same(wanted, state(model)) and not same(wanted, {})
    lora.remove(model)
    assert (resumed.losses, resumed.saved_bytes) == (whole.losses, whole.saved_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [lora.FILE, lora.ABOUT]

    # Started once more, the finished run is loaded.
    assert lora.train(model, given, training, folder=tmp_path) == resumed and len(calls) == 10
    assert same(wanted, state(model))
    lora.remove(model)
    for other in (replace(training, seed=1), replace(training, steps=8)):
        with pytest.raises(TextlocError, match="other settings"):
            lora.train(model, given, other, folder=tmp_path)
    with pytest.raises(TextlocError, match="data"):
        lora.train(model, data(model, 3), training, folder=tmp_path)
    assert not getattr(model.denoiser, "peft_config", None)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tinies, tmp_path):
    model = tinies("ldm")
    given = data(model)
    files.write_state(tmp_path / lora.CHECKPOINT, {"key": {}})
    with pytest.raises(TextlocError, match="other settings"):
        lora.train(model, given, FEW, folder=tmp_path)
    whole = (tmp_path / lora.CHECKPOINT).read_bytes()
    for damaged in (b"no checkpoint", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
        (tmp_path / lora.CHECKPOINT).write_bytes(damaged)
        with pytest.raises(TextlocError, match="damaged"):
            lora.train(model, given, FEW, folder=tmp_path)
    assert not getattr(model.denoiser, "peft_config", None)


# --- what is not finite -----------------------------------------------------------------------------------------


def refused(model, given, training, folder, said):
    """Training stops with one line, nothing lies in the folder, and the model is bare."""
    with pytest.raises(TextlocError, match=said) as error:
        lora.train(model, given, training, folder=folder, checkpoint_steps=1)
    assert "\n" not in str(error.value) and not getattr(model.denoiser, "peft_config", None)
    return [] if not folder.exists() else sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["ldm", "if", "sd3", "flux"])
@pytest.mark.parametrize(("lr", "steps"), [(1e30, 4), (1e30, 1), (1e35, 2), (1e20, 3)])
def test_training_stops_at_the_first_number_that_is_not_finite(tinies, tmp_path, name, lr, steps):
    """Though each loss before was finite: no adapter is saved, and a second start finds no finished run."""
    model = tinies(name)
    before, given = state(model), data(model)
    training = replace(FEW, layers=every(model), steps=steps)
    object.__setattr__(training, "lr", lr)  # beyond what is taken, so that few steps do what many can
    for _ in range(2):
        assert set(refused(model, given, training, tmp_path / "run", "finite|nan|inf")) <= {lora.CHECKPOINT}
    assert same(before, state(model))


def test_a_loss_a_gradient_and_a_weight_are_each_named(tinies, tmp_path, monkeypatch):
    model = tinies("sd3")
    given, forward = data(model), lora._Objective.forward
    called = []

    def spoiled(at, change):
        def spoil(self, *arguments):
            called.append(1)
            loss = forward(self, *arguments)
            return change(loss) if len(called) == at else loss

        called.clear()
        monkeypatch.setattr(lora._Objective, "forward", spoil)

    spoiled(3, lambda loss: loss * float("nan"))
    assert refused(model, given, FEW, tmp_path / "a", "the loss of step 3 is nan") == [lora.CHECKPOINT]
    spoiled(1, lambda loss: loss + float("inf"))
    assert refused(model, given, FEW, tmp_path / "b", "the loss of step 1 is inf") == []
    spoiled(2, lambda loss: loss + 0 * (loss - loss.detach()).sqrt())  # 0, with an infinite slope
    assert refused(model, given, FEW, tmp_path / "c", "the gradient of step 2 is nan") == [lora.CHECKPOINT]
    spoiled(FEW.steps + 1, lambda loss: -loss * float("inf"))
    assert refused(model, given, FEW, tmp_path / "d", "the loss after the last step is -inf") == [lora.CHECKPOINT]
    # A run whose numbers are finite again goes on from what was kept.
    monkeypatch.setattr(lora._Objective, "forward", forward)
    try:
        assert len(lora.train(model, given, FEW, folder=tmp_path / "a").losses) == FEW.steps
        weight = next(p for p in model.denoiser.parameters() if p.requires_grad)
        weight.data[0, 0] = float("nan")
        with pytest.raises(TextlocError, match="weight .*lora_A.* is not finite; nothing is saved"):
            lora.save(model, tmp_path / "e", {})
    finally:
        lora.remove(model)
    assert not (tmp_path / "e").exists()


def test_data_that_is_not_finite_is_refused(tinies, monkeypatch):
    model = tinies("ldm")
    good = model.encode(np.zeros((2, 32, 32, 3), np.uint8))
    good[1, 0, 0, 0] = float("inf")
    monkeypatch.setattr(models.Model, "encode", lambda self, pictures: good)
    with pytest.raises(TextlocError, match="picture 1 is not finite"):
        lora.prepare(model, np.zeros((2, 32, 32, 3), np.uint8), PROMPTS[:2])
    monkeypatch.undo()
    monkeypatch.setattr(lora, "conditions", lambda *a: {"encoder_hidden_states": torch.tensor([1.0, float("nan")])})
    with pytest.raises(TextlocError, match="encoder_hidden_states are not finite"):
        data(model, 2)


def test_an_adapter_that_is_not_finite_is_not_loaded(tinies, tmp_path):
    model = tinies("ldm")
    before = state(model)
    lora.train(model, data(model), FEW, folder=tmp_path)
    lora.remove(model)
    tensors = load_file(tmp_path / lora.FILE)
    next(iter(tensors.values()))[0] = float("nan")
    (tmp_path / lora.ABOUT).unlink()  # as from elsewhere: no digest tells
    save_file(tensors, tmp_path / lora.FILE)
    with pytest.raises(TextlocError, match="is not finite; train the adapter in"):
        lora.load(model, tmp_path)
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl"])
def test_a_fused_pipeline_is_refused_in_one_line(name, tmp_path):
    model = tiny.model(name)
    given = data(model)
    model.denoiser.fuse_qkv_projections()
    assert refused(model, given, FEW, tmp_path / "run", "unfuse_qkv_projections") == []
    model.denoiser.unfuse_qkv_projections()
    assert len(lora.train(model, given, FEW, folder=tmp_path / "run").losses) == FEW.steps
    lora.remove(model)
    model.denoiser.fuse_qkv_projections()
    with pytest.raises(TextlocError, match="unfuse_qkv_projections"):  # it would be loaded, and do nothing
        lora.load(model, tmp_path / "run")


@pytest.mark.parametrize("how", ["cut off", "half"])
def test_an_adapter_that_takes_no_part_is_told(tinies, tmp_path, monkeypatch, how):
    """Whatever the reason: no gradient reaches it."""
    model = tinies("ldm")
    given, forward = data(model), lora._Objective.forward

    def cut(self, *arguments):
        loss = forward(self, *arguments)
        return loss.detach() if how == "cut off" else loss

    monkeypatch.setattr(lora._Objective, "forward", cut)
    if how == "half":
        added = lora.add

        def more(model, training):
            return [*added(model, training), torch.nn.Parameter(torch.zeros(1))]

        monkeypatch.setattr(lora, "add", more)
    assert refused(model, given, FEW, tmp_path / "run", "has no effect") == []


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_plain_diffusers_takes_the_file_back(tinies, name, tmp_path):
    """The stock pipeline with the saved file draws the trained model's pictures; unloaded, the base's."""
    model = tinies(name)
    plain = draw(model)
    about = lora.train(model, data(model), FEW, folder=tmp_path)
    adapted = draw(model)
    lora.remove(model)
    assert not np.array_equal(adapted, plain)
    told = json.loads((tmp_path / lora.ABOUT).read_text())
    assert told["report"]["losses"] == about.losses and told["key"]["model"] == model.spec.name

    pipe = tiny.BUILDERS[name]()
    other = replace(model, pipe=pipe, denoiser=getattr(pipe, "transformer", None) or pipe.unet)
    base = state(other)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(tmp_path)
    else:
        pipe.unet.load_lora_adapter(tmp_path, weight_name=lora.FILE, prefix="unet")
    assert np.array_equal(draw(other), adapted)
    pipe.unload_lora_weights() if hasattr(pipe, "unload_lora_weights") else pipe.unet.unload_lora()
    assert same(base, state(other)) and np.array_equal(draw(other), plain)


def test_files_that_do_not_fit_are_refused(tinies, tmp_path):
    ldm, sd3 = tinies("ldm"), tinies("sd3")
    with pytest.raises(TextlocError, match="textloc lora train"):
        lora.load(ldm, tmp_path)
    lora.train(ldm, data(ldm), FEW, folder=tmp_path / "ldm")
    with pytest.raises(TextlocError, match="already has an adapter"):
        lora.load(ldm, tmp_path / "ldm")
    lora.remove(ldm)
    before = state(sd3)
    for model in (sd3, tinies("sdxl")):
        with pytest.raises(TextlocError, match="does not fit") as error:
            lora.load(model, tmp_path / "ldm")
        assert "\n" not in str(error.value) and not getattr(model.denoiser, "peft_config", None)
    assert same(before, state(sd3))
    saved = tmp_path / "ldm" / lora.FILE, tmp_path / "ldm" / lora.ABOUT
    whole = [path.read_bytes() for path in saved]
    for path, data_ in zip(saved, whole, strict=True):  # one bit of a weight, of a loss, of a key's name
        for bit in range(3, len(data_) * 8, len(data_) * 8 // 40):
            flipped = bytearray(data_)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(TextlocError, match="corrupt") as error:
                lora.load(ldm, tmp_path / "ldm")
            assert "\n" not in str(error.value)
        path.write_bytes(data_)
    for about in ("[]", "3", "[" * 5000, '{"seal": 1}', '{"sha256": 1}', '{"key": '):
        saved[1].write_text(about)
        with pytest.raises(TextlocError, match="corrupt"):
            lora.load(ldm, tmp_path / "ldm")
    saved[1].unlink()
    saved[0].write_bytes(b"nothing")
    with pytest.raises(TextlocError, match="does not fit"):
        lora.load(ldm, tmp_path / "ldm")


def test_two_trainings_do_not_share_a_folder(tinies, tmp_path):
    model = tinies("ldm")
    given = data(model)
    with files.only_run(tmp_path / "run"):
        assert refused(model, given, FEW, tmp_path / "run", "another run writes to") == []
    lora.train(model, given, FEW, folder=tmp_path / "run")
    lora.remove(model)


def test_a_full_disk_costs_no_training(tinies, tmp_path, monkeypatch):
    """The finished adapter cannot be saved; when there is room again, it is, without another step."""
    model = tinies("ldm")
    given, replaced = data(model), lora.os.replace

    def full(source, target):
        if Path(target).name in (lora.FILE, lora.ABOUT):
            raise OSError(28, "No space left on device")
        return replaced(source, target)

    monkeypatch.setattr(lora.os, "replace", full)
    with pytest.raises(TextlocError, match="No space left") as error:
        lora.train(model, given, FEW, folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    wanted = state(model)
    lora.remove(model)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [lora.CHECKPOINT]
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: pytest.fail("trained again"))
    lora.train(model, given, FEW, folder=tmp_path / "run")
    assert same(wanted, state(model))
    lora.remove(model)


# --- data ---------------------------------------------------------------------------------------------------------


def test_an_image_folder_is_read(tmp_path, tinies):
    colours = {"a.png": (255, 0, 0), "b.png": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 20), colour).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a red ""wall"""\nb.png,a blue wall\n')
    pictures, captions = lora.load_folder(tmp_path, 32, 32)
    assert pictures.shape == (2, 32, 32, 3) and pictures.dtype == np.uint8
    order = [captions.index(text) for text in ('a red "wall"', "a blue wall")]
    assert [tuple(pictures[i, 0, 0]) for i in order] == list(colours.values())
    assert len(lora.prepare(tinies("ldm"), pictures, captions)) == 2


def test_bad_image_folders_are_named(tmp_path):
    with pytest.raises(TextlocError, match="no pictures"):
        lora.load_folder(tmp_path / "none", 32, 32)
    for folder in ("bare", "broken"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    with pytest.raises(TextlocError, match="file_name and text"):
        lora.load_folder(tmp_path / "bare", 32, 32)
    (tmp_path / "broken" / "metadata.csv").write_text("file_name,text\na.png,a wall\n")
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(TextlocError, match="no pictures can be read") as error:
        lora.load_folder(tmp_path / "broken", 32, 32)
    assert "\n" not in str(error.value)


def test_pictures_and_captions_must_fit(tinies):
    model = tinies("ldm")
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(TextlocError, match="one caption per picture"):
        lora.prepare(model, pictures, PROMPTS[:1])
    with pytest.raises(TextlocError, match="32 x 32 x 3"):
        lora.prepare(model, pictures[:, :16], PROMPTS[:2])
    with pytest.raises(TextlocError, match="too long"):
        lora.prepare(model, pictures, ["a " * 90, "a"])
