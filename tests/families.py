"""A tiny random-weight pipeline of every architecture beyond those of tests/tiny.py, each built in a moment.

Pipeline, scheduler and denoiser are diffusers' own. Text encoders and autoencoders are small stand-ins: what reaches
the denoiser passes through the pipeline's own encoding, and what leaves it is compared as latents.
"""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import tiny
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling

from textloc_utils.models import Model
from textloc_utils.settings import quiet_libraries

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
TOKENS, WIDTH = 40, 16
ROPE = (4, 4, 8)  # of a head of 16
CHAT = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"


class Encoder(nn.Module):
    """Token embeddings with a trace of the tokens before them, in the shape of any text encoder's answer."""

    def __init__(self, vocabulary: int, width: int = WIDTH, layers: int = 4):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.layers, self.model = layers, nn.Module()
        self.model.norm = nn.Identity()
        self.config = SimpleNamespace(d_model=width, hidden_size=width, projection_dim=width)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def forward(self, input_ids, attention_mask=None, **other):
        x = self.table(input_ids)
        x = self.model.norm(x + 0.1 * x.cumsum(1) / x.shape[1])
        states = tuple(x * (1 + 0.1 * i) for i in range(self.layers))
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(1), hidden_states=states)


class Processor:
    """A tokenizer behind a processor's calls."""

    def __init__(self, tok):
        self.tokenizer = tok

    def __call__(self, text=None, **how):
        kept = {k: v for k, v in how.items() if k not in ("images", "videos")}
        return self.tokenizer(text, **kept)

    def apply_chat_template(self, messages, **how):
        return [[]] if how.get("return_dict") is False else self.tokenizer.apply_chat_template(messages, **how)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)


class Autoencoder(nn.Module):
    """Stands for an autoencoder that halves once; nothing is decoded."""

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.temperal_downsample = [False]
        self.bn = nn.BatchNorm2d(16, affine=False)
        known = {"block_out_channels": (8, 8), "encoder_block_out_channels": (8,) * 3, "spatial_compression_ratio": 2}
        known |= {"scale_factor_temporal": 4, "scale_factor_spatial": 2, "batch_norm_eps": 1e-5}
        self.config = SimpleNamespace(
            **known, **{"scaling_factor": 1.0, "shift_factor": 0.0, "latent_channels": 4, "z_dim": 4} | config
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


def _draw(module: nn.Module) -> None:
    """Redraw all parameters: gates that begin at zero would let no text through."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        spread = 1.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * spread


def _parts(denoiser: nn.Module, length: int = TOKENS, width: int = WIDTH, layers: int = 4, **autoencoder) -> dict:
    tok = tiny.tokenizer("t5", length, LETTERS)
    tok.chat_template = CHAT
    return {
        "tokenizer": tok,
        "text_encoder": Encoder(len(tok), width, layers),
        "vae": Autoencoder(**autoencoder),
        "transformer": denoiser,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }


def _packed(name: str, **other) -> nn.Module:
    known = {"in_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": ROPE}
    return getattr(diffusers, name)(
        **known | {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": WIDTH} | other
    )


def _flux2(name: str, guidance: bool):
    denoiser = _packed(
        "Flux2Transformer2DModel", guidance_embeds=guidance, axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=3 * WIDTH
    )
    pipe = getattr(diffusers, name)(**_parts(denoiser, layers=40))
    pipe.system_message = "a"
    return pipe


def flux2():
    return _flux2("Flux2Pipeline", True)


def flux2_klein():
    return _flux2("Flux2KleinPipeline", False)


def flux_schnell():
    pipe = tiny.flux()
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.register_modules(transformer=diffusers.FluxTransformer2DModel.from_config(config))
    return pipe


def flux_kontext():
    return diffusers.FluxKontextPipeline(**tiny.flux().components)


def qwen_image():
    denoiser = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=ROPE,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(**_parts(denoiser))
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


def qwen_image_21():
    denoiser = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=ROPE,
    )  # fmt: skip
    parts = _parts(denoiser)
    tok = parts.pop("tokenizer")
    tok.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    parts["text_encoder"] = Encoder(len(tok))
    pipe = diffusers.QwenImage21Pipeline(**parts, processor=Processor(tok))
    pipe.prompt_template_t2i = "{}"
    return pipe


def z_image():
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=list(ROPE), axes_lens=[128, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(**_parts(denoiser))


def krea_2():
    denoiser = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=ROPE,
    )  # fmt: skip
    pipe = diffusers.Krea2Pipeline(**_parts(denoiser), text_encoder_select_layers=(1, 2))
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "", 0
    pipe.prompt_template_encode_suffix, pipe.prompt_template_encode_num_suffix_tokens = ".", 2
    return pipe


def chroma():
    denoiser = _packed(
        "ChromaTransformer2DModel", approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    )
    return diffusers.ChromaPipeline(**_parts(denoiser))


def longcat():
    pipe = diffusers.LongCatImagePipeline(
        **_parts(_packed("LongCatImageTransformer2DModel", in_channels=64)),
        text_processor=Processor(tiny.tokenizer("t5")),
    )
    pipe.tokenizer_max_length = TOKENS
    return pipe


def ovis():
    pipe = diffusers.OvisImagePipeline(**_parts(_packed("OvisImageTransformer2DModel", out_channels=16)))
    pipe.system_prompt, pipe.user_prompt_begin_id = "", 0
    return pipe


def bria():
    return diffusers.BriaPipeline(**_parts(_packed("BriaTransformer2DModel", pooled_projection_dim=None)))


def aura_flow():
    denoiser = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(**_parts(denoiser))


def cogview4():
    denoiser = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return diffusers.CogView4Pipeline(**_parts(denoiser))


def hunyuan_image():
    denoiser = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8),
    )  # fmt: skip
    parts = _parts(denoiser)
    glyphs = tiny.tokenizer("t5", 12, LETTERS)
    guiders = {n: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5) for n in ("guider", "ocr_guider")}
    pipe = diffusers.HunyuanImagePipeline(
        **parts, **guiders, tokenizer_2=glyphs, text_encoder_2=Encoder(len(parts["tokenizer"]))
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = TOKENS, 12
    return pipe


def hidream():
    denoiser = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=ROPE, max_resolution=(16, 16), llama_layers=[0, 1, 1, 2],
    )  # fmt: skip
    parts = _parts(denoiser)
    t5, clip = parts["tokenizer"], tiny.tokenizer("clip", TOKENS, LETTERS)
    parts |= {"tokenizer": clip, "text_encoder": tiny._clip(clip, CLIPTextModelWithProjection)}
    pipe = diffusers.HiDreamImagePipeline(
        **parts,
        tokenizer_2=clip,
        text_encoder_2=tiny._clip(clip, CLIPTextModelWithProjection),
        tokenizer_3=t5,
        text_encoder_3=Encoder(len(t5)),
        tokenizer_4=t5,
        text_encoder_4=Encoder(len(t5)),
    )
    pipe.default_sample_size = 8  # it takes height and width for a shape alone
    return pipe


def ernie():
    denoiser = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=WIDTH, rope_axes_dim=ROPE,
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(**_parts(denoiser))


def pixart_sigma():
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    parts = _parts(denoiser) | {"scheduler": DDPMScheduler(clip_sample=False)}
    return diffusers.PixArtSigmaPipeline(**parts)


def sana():
    denoiser = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    return diffusers.SanaPipeline(**_parts(denoiser))


def hunyuan_dit():
    denoiser = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=WIDTH,
        text_len=77, text_len_t5=256, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    parts = _parts(denoiser, 77) | {"scheduler": DDPMScheduler(clip_sample=False)}
    t5 = tiny.tokenizer("t5", 256, LETTERS)
    return diffusers.HunyuanDiTPipeline(
        **parts, tokenizer_2=t5, text_encoder_2=Encoder(len(t5)), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def kandinsky5():
    denoiser = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=32, model_dim=32,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=ROPE,
    )  # fmt: skip
    parts, clip = _parts(denoiser), tiny.tokenizer("clip", 77, LETTERS)
    parts["tokenizer"] = Processor(parts["tokenizer"])
    pipe = diffusers.Kandinsky5T2IPipeline(**parts, tokenizer_2=clip, text_encoder_2=tiny._clip(clip, CLIPTextModel))
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}", 0
    pipe.vae_scale_factor_spatial, pipe.resolutions = 2, [(16, 16)]
    return pipe


def wan():
    denoiser = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(**_parts(denoiser))


BUILDERS = {
    build.__name__: build
    for build in (
        flux_schnell, flux_kontext, flux2, flux2_klein, qwen_image, qwen_image_21, z_image, krea_2, chroma, longcat,
        ovis, bria, aura_flow, cogview4, hunyuan_image, hidream, ernie, pixart_sigma, sana, hunyuan_dit, kandinsky5,
        wan,
    )
}  # fmt: skip


def model(name: str) -> Model:
    """A tiny pipeline of this family as a Model whose pictures are 16 by 16, drawn in three steps."""
    quiet_libraries()
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    _draw(pipe.transformer)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    wrapped = Model.from_pipeline(pipe)
    size = {"qwen_image_21": 64, "bria": 16, "ernie": 32, "sana": 32}.get(name, 16)
    length = tiny.TOKENS if name.startswith("flux_") else TOKENS
    limit = length if wrapped.spec.max_sequence_length else None
    settings = {"steps": 3, "guidance": 4.0, "height": size, "width": size, "max_sequence_length": limit}
    return replace(wrapped, spec=replace(wrapped.spec, name=f"tiny-{name}", miniature=True, **settings))
