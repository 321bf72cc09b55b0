"""The command that times full-size denoisers on a GPU, tried with the tiny ones."""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from textloc_utils.models import FULL_SIZE, meta_denoiser

_PATH = Path(__file__).parent / "benchmarks" / "full_size.py"
_SPEC = importlib.util.spec_from_file_location("full_size", _PATH)
full_size = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(full_size)

KEYS = {
    *("model", "parameters", "layers", "device", "gpu", "dtype", "latents", "steps", "guidance", "batch"),
    *("plain_seconds", "patched_seconds", "ratio", "plain_peak_bytes", "patched_peak_bytes"),
    *("finite", "source_rows_changed", "target_rows_changed", "diffusers", "torch"),
}
TRY = ["--tiny", "--steps", "2", "--device", "cpu"]


def test_tiny_sdxl_and_sd3_are_measured_and_really_patched(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert full_size.main(["sdxl", "sd3", *TRY, "--pairs", "2", "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records
    assert [r["model"] for r in records] == ["sdxl", "sd3"]
    for r in records:
        assert set(r) == KEYS
        assert (r["steps"], r["batch"], r["device"], r["dtype"]) == (2, 4, "cpu", "bfloat16")
        assert r["ratio"] == pytest.approx(r["patched_seconds"] / r["plain_seconds"])
        assert (r["finite"], r["source_rows_changed"], r["target_rows_changed"]) == (True, 2, 0)


@pytest.mark.parametrize("name", [n for n in full_size.NAMES if n not in ("sdxl", "sd3")])
def test_every_other_model_can_be_tried(name, capsys):
    assert full_size.main([name, *TRY]) == 0
    assert json.loads(capsys.readouterr().out)["source_rows_changed"] == 1


def test_patches_that_do_nothing_are_found_out(monkeypatch, capsys):
    monkeypatch.setattr(full_size, "patched", lambda *_: contextlib.nullcontext())
    assert full_size.main(["sdxl", *TRY]) == 1
    assert capsys.readouterr().err == "full_size.py: sdxl: the patches changed 0 of 1 source rows\n"


def test_a_slow_patch_is_an_error_on_a_gpu_only():
    record = {"model": "sdxl", "batch": 2, "finite": True, "source_rows_changed": 1, "ratio": 1.06}
    assert full_size.complaint(record | {"device": "cpu"}) is None
    assert full_size.complaint(record | {"device": "cuda", "ratio": 1.05}) is None
    assert "1.060 times" in full_size.complaint(record | {"device": "cuda"})


def test_full_size_denoisers_are_drawn_in_the_dtype_on_the_device():
    denoiser = full_size.build_denoiser("sdxl", torch.device("meta"), torch.bfloat16)
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.bfloat16, "meta")}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", full_size.NAMES)
def test_the_pipeline_takes_the_full_size_denoiser_alone(name):
    spec = full_size.FULL_SIZE[name]
    assert name in FULL_SIZE
    pipe = full_size.build_pipeline(spec, meta_denoiser(spec))
    full = full_size.Model.from_pipeline(pipe, spec)
    assert not spec.paper_layers or max(spec.paper_layers) < len(full.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdxl", "sd4"], "unknown model 'sd4'; allowed: sdxl, if, sd3, sd15"),
        (["ldm"], "unknown model 'ldm'"),
        (["sdxl", "--dtype", "int8"], "unknown dtype 'int8'; allowed: bfloat16"),
        (["sdxl", "--steps", "0"], "at least 1, got 1 and 0"),
        (["sdxl", "--device", "abacus"], "unknown device 'abacus'"),
        (["sdxl", "--json", "no/such/folder/out.json"], "its folder does not exist"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert full_size.main([*arguments, "--tiny"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
