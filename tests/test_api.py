"""The package as a researcher meets it: a pipeline of their own, wrapped and patched by the names at the top."""

import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

import textloc_utils as tl
from textloc_utils import settings


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_pipeline_that_the_package_did_not_load(name):
    pipe = tiny.BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    model = tl.wrap(pipe)
    assert tl.wrap(model) is model
    pair = tl.Pair.of('A sign that says "HELLO".', "WORLD", seed=1)
    how = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    how |= {} if name == "sdxl" else {"max_sequence_length": 16}

    def draw():
        noise = [torch.Generator().manual_seed(pair.seed) for _ in range(2)]
        return pipe([pair.source, pair.target], generator=noise, **how).images

    plain = draw()
    for of in (model, pipe):
        with tl.patched(of, tl.Patch(source=0, target=1, layers="all", pooled=True), rows=2) as fired:
            out = draw()
        np.testing.assert_array_equal(out[0], out[1])
        assert set(fired.steps[model.layers[0].key]) == {0, 1}
    assert np.abs(out[0] - plain[0]).mean() > 1e-3


@pytest.mark.full
def test_the_page_on_own_pipelines_runs_as_written(monkeypatch, tmp_path, capsys):
    """Its blocks, with a tiny pipeline in the place of the hub's."""
    text = (settings.ROOT / "book" / "your_own_pipeline.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: tiny.BUILDERS["sdxl"]())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_, **__: self)
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path))
    names = {}
    exec(first, names)
    assert len(names["table"].summary()) >= len(names["model"].layers) and capsys.readouterr().out
    monkeypatch.setattr(tl, "localize", lambda model, pairs: types.SimpleNamespace(layers=(1, 2)))
    exec(second, names)


def test_a_model_prints_short():
    model = tl.wrap(tiny.sdxl())
    assert repr(model) == "Model(StableDiffusionXLPipeline: StableDiffusionXLPipeline, 8 text layers, cpu)"


def test_pairs_of_a_prompt():
    pair = tl.Pair.of('A sign that says "HELLO".', "WORLD", seed=3)
    assert (pair.source_text, pair.target_text, pair.seed) == ("HELLO", "WORLD", 3)
    assert pair.target == 'A sign that says "WORLD".'
    for prompt, text in (("A sign.", "WORLD"), ('A "A" and "B"', "C"), ('A "A"', ""), ('A "A"', 'B"'), ('A "A"', 3)):
        with pytest.raises(tl.TextlocError):
            tl.Pair.of(prompt, text)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2), "sdxl"])
def test_what_is_no_pipeline(thing):
    with pytest.raises(tl.TextlocError, match="a diffusers pipeline with a denoiser was expected, got "):
        tl.wrap(thing)
    with pytest.raises(tl.TextlocError, match="a diffusers pipeline with a denoiser was expected"):
        tl.patched(thing, [], 2).__enter__()


def test_the_package_is_imported_at_once():
    code = "import sys, textloc_utils as t; dir(t); sys.exit(any(n in sys.modules for n in ('torch', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tl.nothing
