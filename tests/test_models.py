"""The registry, layer numbering and parameter counts against published figures, loading, and mistakes."""

import json
import os

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from textloc_utils import cli, models
from textloc_utils.generate import generate
from textloc_utils.settings import TextlocError

HELLO = 'A sign that says "HELLO".'

#: name -> denoiser parameters, text layers, family
KNOWN = {
    "sdxl": (2_567_463_684, 70, models.CROSS),
    "if": (4_304_695_110, 22, models.ADDED),
    "sd3": (2_028_328_000, 24, models.JOINT),
    "ldm": (872_300_484, 16, models.CROSS),
    "sd15": (859_520_964, 16, models.CROSS),
    "sd21": (865_910_724, 16, models.CROSS),
    "sd35-medium": (2_243_171_520, 24, models.JOINT),
    "sd35-large": (8_056_627_520, 38, models.JOINT),
    "flux-dev": (11_901_408_320, 19 + 38, models.JOINT),
}


#: As above, of the other families' public checkpoints.
OTHERS = {
    "flux-schnell": (11_891_178_560, 57),
    "flux-kontext": (11_901_408_320, 57),
    "flux2-dev": (32_223_281_152, 56),
    "flux2-klein": (3_875_544_576, 25),
    "qwen-image": (20_430_401_088, 60),
    "qwen-image-2.1": (7_115_124_736, 32),
    "z-image-turbo": (6_154_908_736, 30),
    "krea-2": (12_820_073_036, 28),
    "chroma": (8_899_983_424, 57),
    "longcat-image": (6_270_668_864, 30),
    "ovis-image": (7_370_449_728, 33),
    "aura-flow": (6_858_605_568, 36),
    "cogview4": (6_369_118_272, 28),
    "hunyuan-image-2.1": (17_425_795_520, 60),
    "hidream-i1": (17_105_733_184, 48),
    "ernie-image": (8_033_490_048, 36),
    "pixart-sigma": (610_856_096, 28),
    "sana": (1_604_462_752, 20),
    "hunyuan-dit": (1_499_952_032, 40),
    "kandinsky5": (6_022_080_576, 50),
    "wan": (1_418_996_800, 30),
}


@pytest.mark.parametrize("name", KNOWN)
def test_full_size_numbers(name):
    parameters, layers, family = KNOWN[name]
    told = models.describe(name)
    assert told["parameters"] == parameters
    assert len(told["text_layers"]) == len(told["kv_share"]) == len(set(told["text_layers"])) == layers
    found = models.text_layers(models.meta_denoiser(models.spec(name)))
    assert told["family"] == models.family_of(found) == family
    assert [layer.index for layer in found] == list(range(layers))
    assert json.loads(json.dumps(told)) == told
    assert {"name", "pipeline", "prompt_template", "trained"} <= told.keys()
    assert {*KNOWN, *OTHERS, "bria"} == set(models.FULL_SIZE)


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_of_the_other_families(name):
    told = models.describe(name)
    assert (told["parameters"], len(told["text_layers"])) == OTHERS[name]
    assert told["family"] == (models.JOINT if name not in CROSS else models.CROSS_TRANSFORMER)
    assert all(0 < share < 0.01 for share in told["kv_share"])


def test_what_is_not_public_of_a_model_is_said(capsys, monkeypatch):
    told = models.describe("bria")
    assert (told["parameters"], told["text_layers"], told["kv_share"]) == (None, [], [])
    with pytest.raises(TextlocError, match="the configuration of bria's denoiser is not public; load the model"):
        models.meta_denoiser(models.spec("bria"))
    assert all(spec.licence or spec.unverified.startswith("licence") for spec in models.FULL_SIZE.values())
    monkeypatch.setattr(models, "registry", lambda: {"bria": models.FULL_SIZE["bria"]})
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-1] == "unknown"
    assert lines[2] == "not verified of bria: licence and denoiser's configuration: behind the publisher's form"


CROSS = ("pixart-sigma", "sana", "hunyuan-dit", "kandinsky5", "wan")


@pytest.mark.parametrize(("name", "numbers"), [("sdxl", 15_728_640), ("if", 11_899_008), ("sd3", 4_721_664)])
def test_share_of_the_papers_layers(name, numbers):
    told, chosen = models.describe(name), models.spec(name)
    share = sum(told["kv_share"][i] for i in chosen.paper_layers)
    assert round(share * told["parameters"]) == numbers


def test_execution_order():
    sdxl = models.describe("sdxl")["text_layers"]
    assert sdxl[55:58] == [f"up_blocks.0.attentions.2.transformer_blocks.{i}.attn2" for i in (1, 2, 3)]
    assert sdxl[0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert sdxl[24].startswith("mid_block")
    assert models.describe("if")["text_layers"][17] == "up_blocks.1.attentions.3"


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_layers_run_in_the_order_of_their_numbers(name):
    model = tiny.model(name)
    ran = []
    handles = [
        model.denoiser.get_submodule(layer.key).register_forward_hook(lambda m, a, o, i=layer.index: ran.append(i))
        for layer in model.layers
    ]
    generate(model, [HELLO], [1], steps=1)
    for handle in handles:
        handle.remove()
    assert ran == list(range(len(model.layers)))
    for layer in model.layers:
        assert model.denoiser.get_submodule(layer.name).heads == layer.heads


def test_what_is_a_text_layer():
    flux, sd35, ldm = (tiny.model(n) for n in ("flux", "sd35", "ldm"))
    assert [layer.context for layer in flux.layers] == [None, None, models.TEXT_FIRST, models.TEXT_FIRST]
    assert [layer.name for layer in sd35.layers] == [f"transformer_blocks.{i}.attn" for i in range(3)]
    assert hasattr(sd35.denoiser.transformer_blocks[0], "attn2")
    assert all(layer.key.endswith("attn2.to_k") for layer in ldm.layers)
    pooled = {n: tiny.model(n).pooled_site for n in tiny.BUILDERS}
    joint = "time_text_embed.text_embedder"
    assert pooled == {
        "ldm": None, "sdxl": "add_embedding", "if": "add_embedding", "sd3": joint, "sd35": joint, "flux": joint
    }  # fmt: skip


def test_any_pipeline_of_a_known_family_can_be_wrapped():
    model = models.Model.from_pipeline(tiny.sdxl())
    assert (model.spec.family, model.spec.height, model.spec.steps) == (models.CROSS, 16, 50)
    assert generate(model, [HELLO], [1], steps=1).images.shape == (1, 16, 16, 3)


def test_unknown_denoiser():
    with pytest.raises(TextlocError, match="Linear has no known text layers.*UNet2DConditionModel"):
        models.text_layers(torch.nn.Linear(2, 2))


def test_layers_out_of_range():
    model = tiny.model("ldm")
    models.check_layers(model, (0, 3))
    models.check_layers(model, np.int64(3))
    for wrong in (4, -1):
        with pytest.raises(TextlocError, match="out of range; this model's text layers are 0 to 3"):
            models.check_layers(model.layers, (0, wrong))
    for wrong in (1.5, True, "1"):
        with pytest.raises(TextlocError, match="layers must be an integer or integers"):
            models.check_layers(model.layers, (0, wrong))


@pytest.mark.parametrize(("name", "words"), [("ldm", 75), ("if", 76), ("sdxl", 14), ("sd3", 14), ("flux", 15)])
def test_prompt_length_counts_special_tokens(name, words):
    """CLIP adds two tokens and T5 one; the longest prompt passes and one word more does not."""
    model = tiny.model(name)
    models.check_prompts(model, ["red " * words])
    with pytest.raises(TextlocError, match=r"tokens is too long; tiny-\w+ takes \d\d"):
        models.check_prompts(model, [HELLO, "red " * (words + 1)])


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A tiny SD3 saved as the sd3-mini of a data folder of its own; returns (folder, the pipeline's Model)."""
    monkeypatch.setenv("TEXTLOC_DATA", str(tmp_path))
    folder = tmp_path / "miniatures" / "sd3-mini"
    model = tiny.model("sd3")
    model.pipe.save_pretrained(folder)
    known = {
        "family": models.JOINT,
        "pipeline": "StableDiffusion3Pipeline",
        "steps": 3,
        "guidance": 4.0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "prompt_template": 'A {sign} sign says "{text}".',
        "trained": {"device": "none", "samples": 0, "test": {"exact": {"mean": 0.0}}},
        "a key of later versions": 1,
    }
    (folder / "textloc.json").write_text(json.dumps(known))
    return folder, model


def test_miniature_round_trip(miniature):
    folder, model = miniature
    loaded = models.load("sd3-mini", device="cpu")
    assert loaded.spec.miniature and loaded.layers == model.layers
    assert loaded.spec.prompt_template == 'A {sign} sign says "{text}".'
    np.testing.assert_array_equal(generate(loaded, [HELLO], [1]).images, generate(model, [HELLO], [1], steps=3).images)
    told = models.describe("sd3-mini")
    assert told["parameters"] == sum(p.numel() for p in model.denoiser.parameters())
    assert told["trained"]["device"] == "none"
    assert "sd3-mini" in models.registry() and "sdxl-mini" not in models.registry()


def test_half_precision_files_load_in_float32(miniature):
    folder, model = miniature
    model.pipe.to(torch.float16)
    model.pipe.save_pretrained(folder)
    assert load_file(next((folder / "text_encoder_3").glob("*.safetensors")))["shared.weight"].dtype == torch.float16
    loaded = models.load("sd3-mini", device="cpu")
    parts = [p for p in loaded.pipe.components.values() if isinstance(p, torch.nn.Module)]
    assert len(parts) == 5
    for part in parts:
        assert {t.dtype for t in [*part.parameters(), *part.buffers()] if t.is_floating_point()} == {torch.float32}
        assert not part.training
    assert generate(loaded, [HELLO], [1]).images.std() > 0


def test_model_path(miniature, tmp_path, monkeypatch):
    folder, model = miniature
    moved = folder.rename(tmp_path / "elsewhere")
    assert models.load("sd3-mini", device="cpu", model_path=moved).spec.source == str(moved)
    as_full_size = models.load("sd3", device="cpu", model_path=moved)
    assert as_full_size.spec.steps == 28 and len(as_full_size.layers) == 3
    with pytest.raises(TextlocError, match=r"unknown model 'sd3-mini'; known models: sdxl.*textloc train sd3-mini"):
        models.load("sd3-mini")


def break_weights(file, how):
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(os.urandom(1000))


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3", "vae"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "noise"])
def test_broken_weight_files(miniature, part, how):
    folder, _ = miniature
    break_weights(next((folder / part).glob("*.safetensors")), how)
    with pytest.raises(TextlocError, match="no weight file" if how == "missing" else "is corrupt") as caught:
        models.load("sd3-mini", device="cpu")
    assert "\n" not in str(caught.value) and part in str(caught.value)


@pytest.mark.parametrize("name", ["sd3-mini", "sd3"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_3", "vae"])
def test_weights_without_a_tensor(miniature, part, name):
    """The libraries would fill the gap with random numbers and only say so in a log."""
    folder, _ = miniature
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(TextlocError, match="is missing in the weight files") as caught:
        models.load(name, device="cpu", model_path=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ldm", "sdxl", "if"])
def test_complete_files_are_not_taken_for_incomplete(tmp_path, name):
    model = tiny.model(name)
    model.pipe.save_pretrained(tmp_path)
    known = {"family": model.spec.family, "pipeline": model.spec.pipeline, "steps": 2, "guidance": 4.0}
    size = {"height": model.spec.height, "width": model.spec.width}
    (tmp_path / "textloc.json").write_text(json.dumps(known | size))
    loaded = models.load(f"{name}-mini", device="cpu", model_path=tmp_path)
    expected = generate(model, [HELLO], [1], steps=2, guidance=4.0)
    np.testing.assert_array_equal(generate(loaded, [HELLO], [1]).images, expected.images)


def test_weights_of_another_shape(miniature):
    folder, _ = miniature
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({k: v[:1].clone() for k, v in load_file(file).items()}, file)
    with pytest.raises(TextlocError, match="sd3-mini cannot be loaded from") as caught:
        models.load("sd3-mini", device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_parts(miniature):
    folder, _ = miniature
    (folder / "tokenizer").rename(folder / "gone")
    with pytest.raises(TextlocError, match="tokenizer is missing"):
        models.load("sd3-mini", device="cpu")
    (folder / "gone").rename(folder / "tokenizer")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(TextlocError, match="corrupt: not JSON"):
        models.load("sd3-mini", device="cpu")
    (folder / "model_index.json").unlink()
    with pytest.raises(TextlocError, match="no saved pipeline in"):
        models.load("sd3-mini", device="cpu")
    (folder / "textloc.json").write_text('{"steps": 3}')
    with pytest.raises(TextlocError, match=r"has no values for family, pipeline"):
        models.load("sd3-mini", device="cpu")


def damaged_index(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda folder: (folder / "model_index.json").write_text(text)


def changed(file, **values):
    def change(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))

    return change


def replaced(file, make):
    def change(folder):
        (found,) = folder.glob(file)
        found.unlink()
        make(found)

    return change


INDEX = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
DAMAGES = {
    "empty list": (damaged_index([]), "model_index.json is corrupt: a table was expected"),
    "number": (damaged_index(3), "a table was expected"),
    "nested": (damaged_index("[" * 100_000), "corrupt: not JSON"),
    "no class": (damaged_index({}), "a pipeline of class None"),
    "other class": (damaged_index(INDEX | {"_class_name": "EvilPipeline"}), "class 'EvilPipeline'"),
    "no pipeline": (damaged_index(INDEX | {"_class_name": "UNet2DModel"}), "class 'UNet2DModel'"),
    "class of another kind": (damaged_index(INDEX | {"_class_name": ["a"]}), r"class \['a'\]"),
    "foreign library": (damaged_index(INDEX | {"scheduler": ["evilmod", "Evil"]}), "evilmod.Evil; allowed: classes of"),
    "path as library": (damaged_index(INDEX | {"scheduler": ["../evil", "Evil"]}), "allowed: classes of diffusers"),
    "own code": (damaged_index(INDEX | {"scheduler": ["transformers_modules.x", "E"]}), "allowed: classes of"),
    "unknown class": (damaged_index(INDEX | {"scheduler": ["diffusers", "Evil"]}), "diffusers.Evil; allowed"),
    "no denoiser": (damaged_index({"_class_name": "StableDiffusion3Pipeline"}), "has no denoiser"),
    "no text layers": (
        damaged_index(INDEX | {"transformer": ["diffusers", "UNet2DModel"]}),
        "UNet2DModel has no known text",
    ),
    "refused": (
        damaged_index(INDEX | {"transformer": ["diffusers", "Lumina2Transformer2DModel"]}),
        "Lumina2Transformer2DModel cannot be patched: its rows",
    ),
    "refused by its own file": (
        changed("transformer/config.json", _class_name="Lumina2Transformer2DModel"),
        "Lumina2Transformer2DModel cannot be patched",
    ),
    "a million layers": (changed("transformer/config.json", num_layers=1_000_000), "num_layers is 1000000, more than"),
    "a million text layers": (changed("text_encoder_3/config.json", num_layers=10**6), "num_layers is 1000000"),
    "a width beyond all": (changed("transformer/config.json", attention_head_dim=10**15), "more than any model has"),
    "config of a list": (lambda f: (f / "transformer" / "config.json").write_text("[]"), "a table was expected"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "vae/config.json is missing"),
    "pipe for weights": (replaced("vae/*.safetensors", os.mkfifo), "not a regular file"),
    "pipe for index": (replaced("model_index.json", os.mkfifo), "is not a regular file"),
    "dangling weights": (
        replaced("vae/*.safetensors", lambda f: f.symlink_to("gone")),
        "missing or not a regular file",
    ),
    "folder for weights": (replaced("vae/*.safetensors", lambda f: f.mkdir()), "is corrupt|is missing"),
    "index without a map": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "it has no weight_map",
    ),
    "index out of the folder": (
        lambda f: (f / "vae" / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../../b"}}'),
        "it has no weight_map",
    ),
    "pickled weights alone": (replaced("vae/*.safetensors", lambda f: (f.parent / "x.bin").touch()), "no weight file"),
    "spec of a list": (lambda f: (f / "textloc.json").write_text("[]"), "textloc.json is missing or corrupt"),
    "negative steps": (changed("textloc.json", steps=-1), "holds -1 as steps"),
    "text for a number": (changed("textloc.json", guidance="strong"), "holds 'strong' as guidance"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_get_one_line_before_a_weight_is_read(miniature, damage, monkeypatch):
    folder, _ = miniature
    change, message = DAMAGES[damage]
    change(folder)
    monkeypatch.setattr(models.loading, "_whole", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(TextlocError, match=message) as caught:
        models.load("sd3-mini", device="cpu", model_path=folder)
    assert "\n" not in str(caught.value)


def test_settings_that_are_lists_are_no_components(miniature):
    folder, _ = miniature
    changed("model_index.json", text_encoder_select_layers=[], force_zeros=[1, 2])(folder)
    assert len(models.load("sd3-mini", device="cpu").layers) == 3


@pytest.mark.parametrize("wanted", [None, "fp16", "bf16"])
def test_the_variant_that_is_there_is_taken(miniature, wanted):
    """Only fp16 files, as in most snapshots of SDXL; asking for another variant takes them as well."""
    folder, model = miniature
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert models.loading._variant(folder / "vae", wanted) == "fp16"
    loaded = models.load("sd3-mini", device="cpu")
    np.testing.assert_array_equal(generate(loaded, [HELLO], [1]).images, generate(model, [HELLO], [1], steps=3).images)


def test_variants_of_split_files(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "model-00001-of-00002.bf16.safetensors").touch()  # the older way to write it
    assert [models.loading._variant(tmp_path, w) for w in (None, "fp16", "bf16", "x")] == [None, "fp16", "bf16", None]


def test_a_single_file_and_a_mistyped_path(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TextlocError, match="is a single file.*from_single_file.*save_pretrained"):
        models.load("sdxl", device="cpu", model_path=tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(TextlocError, match="no saved pipeline in models/sdlx"):
        models.load("sdxl", device="cpu", model_path="models/sdlx")


def test_unknown_model():
    with pytest.raises(TextlocError, match="unknown model 'sdx'; known models: .*sdxl, if, sd3"):
        models.load("sdx")


def test_missing_folder(tmp_path):
    with pytest.raises(TextlocError, match="no saved pipeline in .*nowhere"):
        models.load("sdxl", device="cpu", model_path=tmp_path / "nowhere")


def test_a_modular_pipeline_is_refused_by_name(tmp_path):
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "Flux3ModularPipeline"}')
    with pytest.raises(
        TextlocError, match="holds a modular pipeline, like that of FLUX.3; modular pipelines cannot be patched"
    ):
        models.load("flux-dev", device="cpu", model_path=tmp_path)


def test_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TextlocError, match=r"huggingface.co/DeepFloyd/IF-I-XL-v1.0.*hf auth login.*--model-path") as e:
        models.load("if", device="cpu")
    assert "\n" not in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(TextlocError, match="'cuda' was requested, but 0 CUDA devices"):
        models.load("sdxl", device="cuda")


def test_other_devices_and_dtypes(miniature):
    with pytest.raises(TextlocError, match="unknown device 'gpu'"):
        models.load("sd3-mini", device="gpu")
    for device in ("mps", "xpu", "meta"):
        with pytest.raises(TextlocError, match=f"device '{device}' was requested, but this machine has none"):
            models.pick_device(device)
    with pytest.raises(TextlocError, match="the CPU computes only in float32"):
        models.load("sd3-mini", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", ["if-mini", "sd3-mini"])
def test_in_half_precision_t5_keeps_in_float32_what_overflows(name, monkeypatch):
    """On the meta device, which takes any dtype: the pipeline's own move would cast these weights, too."""
    monkeypatch.setattr(models.loading, "pick_device", lambda device: torch.device("meta"))
    pipe = models.load(name, dtype="float16").pipe
    t5 = pipe.text_encoder_3 if name == "sd3-mini" else pipe.text_encoder
    kinds = {key.split(".")[-2]: tensor.dtype for key, tensor in t5.state_dict().items()}
    assert kinds["wo"] == torch.float32 and kinds["wi_0"] == torch.float16
    assert next((pipe.transformer if name == "sd3-mini" else pipe.unet).parameters()).dtype == torch.float16
