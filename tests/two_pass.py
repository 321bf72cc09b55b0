"""Patching once more, independently of the package: store the target's run, then replay it into the source's.

Modules are found by name, each run is a batch of its own, and outputs are exchanged by replacing ``forward``.
"""

import contextlib
import re

import numpy as np
import torch

TOLERANCE = 1e-5
VISIBLE = 1e-3  #: mean difference that a patch must make, a hundred times the tolerance

SITES = {
    "k": r"(attn2\.to_k|(?<!single)\S*\.add_k_proj|single_transformer_blocks\.\d+\.attn\.to_k)$",
    "v": r"(attn2\.to_v|(?<!single)\S*\.add_v_proj|single_transformer_blocks\.\d+\.attn\.to_v)$",
}


def sample(model, prompts, seeds, guidance=4.0, negative=None):
    """Pictures as floats (n, H, W, 3), straight from the pipeline and, where there is one, the second stage."""
    arguments = model.call_arguments(prompts, steps=model.spec.steps, guidance=guidance, negative_prompt=negative)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    if model.stage2 is None:
        return model.pipe(**arguments, generator=generators, output_type="np").images
    small = model.pipe(**arguments, generator=generators, output_type="pt").images.clamp(-1, 1)
    enlarge = model.stage2_arguments(arguments)
    return model.stage2(**enlarge, image=small, generator=generators, output_type="np").images


def linears(model, letter):
    """Text key (or value) modules in execution order, without the package's own list."""
    found = [(n, m) for n, m in model.denoiser.named_modules() if re.search(SITES[letter], n)]
    if model.spec.pipeline == "StableDiffusion3Pipeline":
        found = [(n, m) for n, m in found if ".attn2." not in n]  # SD3.5's image-only attention
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2, "transformer_blocks": 0, "single_transformer_blocks": 1}
    return sorted(found, key=lambda item: order[item[0].split(".")[0]])  # stable: registration order within a part


@contextlib.contextmanager
def replaced_forward(modules, make):
    originals = {m: m.forward for m in modules}
    try:
        for m in modules:
            m.forward = make(m, originals[m])
        yield
    finally:
        for m in modules:
            del m.forward


def record(model, target, seed, **how):
    """Module -> its output at every step of the target's run: all text keys and values, and the pooled site."""
    modules = [m for letter in "kv" for _, m in linears(model, letter)]
    if model.pooled_site is not None:
        modules.append(model.denoiser.get_submodule(model.pooled_site))
    stored = {m: [] for m in modules}

    def recording(m, original):
        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            stored[m].append(out.clone())
            return out

        return forward

    with replaced_forward(modules, recording):
        sample(model, [target], [seed], **how)
    return stored


def replay(
    model,
    source,
    seed,
    stored,
    *,
    layers=(),
    tensors="kv",
    start=0,
    stop=99,
    heads=None,
    tokens=None,
    pooled=False,
    **how,
):
    """The source's picture (H, W, 3) with what ``record`` stored, in the places that the other arguments name."""
    text_tokens = 16 if model.spec.pipeline == "FluxPipeline" else None
    widths = {linears(model, letter)[i][1]: (i, model.layers[i].heads) for letter in tensors for i in layers}
    if pooled:
        widths[model.denoiser.get_submodule(model.pooled_site)] = (None, None)
    calls = dict.fromkeys(widths, 0)

    def replaying(m, original):
        def forward(*args, **kwargs):
            out = original(*args, **kwargs).clone()
            step = calls[m]
            calls[m] += 1
            if not start <= step < stop:
                return out
            there = stored[m][step]
            index, n_heads = widths[m]
            if index is None:
                return there.clone()
            width = out.shape[-1] // n_heads
            all_tokens = text_tokens if text_tokens and "to_" in linears(model, "k")[index][0] else out.shape[1]
            for h in range(n_heads) if heads is None else heads:
                for t in range(all_tokens) if tokens is None else tokens:
                    out[:, t, h * width : (h + 1) * width] = there[:, t, h * width : (h + 1) * width]
            return out

        return forward

    with replaced_forward(list(widths), replaying):
        return sample(model, [source], [seed], **how)[0]


def two_pass(model, source, target, seed, *, guidance=4.0, negative=None, **where):
    """The source's picture with the target's keys and values, each run alone in its own batch."""
    how = {"guidance": guidance, "negative": negative}
    return replay(model, source, seed, record(model, target, seed, **how), **where, **how)


def assert_patched(ours, reference, plain):
    assert np.abs(ours - reference).max() <= TOLERANCE
    assert np.abs(ours - plain).mean() > VISIBLE
