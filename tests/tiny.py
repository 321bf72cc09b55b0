"""Tiny seeded random-weight pipelines of the real classes, each built in well under a second.

The text is made to matter: text encoders' embeddings and the denoisers' attention outputs are drawn with a larger
spread than usual, so that a test on patching compares pictures that differ.
"""

from dataclasses import replace

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    LDMTextToImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from textloc_utils.models import Model
from textloc_utils.settings import quiet_libraries

WORDS = ("a", "sign", "on", "wall", "that", "says", "red", "blue", "green", "hello", "world", "river", "stone", "cloud")
TOKENS = 16
WIDTH = 16


def tokenizer(kind: str, length: int = TOKENS, more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer; ``kind`` is ``clip`` (start and end token) or ``t5`` (end token)."""
    start, end, pad = {"clip": ("<start>", "<end>", "<end>"), "t5": ("<start>", "</s>", "<pad>")}[kind]
    # dict.fromkeys keeps the order and drops the doubled end token
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([pad, start, "<unk>", end, '"', ".", *WORDS, *more]))}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    single = f"{start} $A {end}" if kind == "clip" else f"$A {end}"
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, vocabulary[t]) for t in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=length,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        unk_token="<unk>",
    )


def _clip(tok, model_class, width: int = WIDTH):
    return model_class(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tok.model_max_length,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )


def _t5(tok):
    return T5EncoderModel(
        T5Config(vocab_size=len(tok), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def _autoencoder(channels: int, halvings: int, **other) -> AutoencoderKL:
    blocks = halvings + 1
    return AutoencoderKL(
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        **other,
    )


def _make_text_matter(pipe):
    """Redraw what lets the text through: embeddings, keys, values and attention outputs."""
    gains = {
        "attn2.to_k.": 2.0,
        "attn2.to_v.": 2.0,
        "context_embedder.": 2.0,
        "add_k_proj.": 1.0,
        "add_v_proj.": 2.0,
        "to_out.": 1.0,
        "to_add_out.": 1.0,
        "norm1.linear.": 1.0,  # gates of the joint-attention blocks
        "norm.linear.": 1.0,
        "embed_tokens.": None,
        "token_embedding.": None,
        "shared.": None,
    }
    generator = torch.Generator().manual_seed(1)
    for part in pipe.components.values():
        if not isinstance(part, torch.nn.Module):
            continue
        part.eval().requires_grad_(False)
        for name, p in part.named_parameters():
            key = next((k for k in gains if k in name), None)
            # The autoencoder's attention carries no text.
            if key is None or p.ndim != 2 or isinstance(part, AutoencoderKL):
                continue
            spread = gains[key] / p.shape[1] ** 0.5 if gains[key] else 1.0
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**config) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(defaults | config))


def ldm(seed: int = 0) -> LDMTextToImagePipeline:
    """LDMTextToImagePipeline with LDMBert; 4 text layers, 32x32 pictures. It divides sizes by 8, so must its VAE."""
    torch.manual_seed(seed)
    tok = tokenizer("clip", 77)
    bert = LDMBertConfig(
        vocab_size=len(tok),
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=WIDTH,
        dropout=0.0,
        max_position_embeddings=77,
    )
    return _make_text_matter(
        LDMTextToImagePipeline(
            vqvae=_autoencoder(4, 3),
            bert=LDMBertModel(bert),
            tokenizer=tok,
            unet=_unet(),
            scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        )
    )


def sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """StableDiffusionXLPipeline with two CLIPs; 8 text layers, 16x16 pictures."""
    torch.manual_seed(seed)
    tok = tokenizer("clip")
    return _make_text_matter(
        StableDiffusionXLPipeline(
            vae=_autoencoder(4, 1),
            text_encoder=_clip(tok, CLIPTextModel),
            text_encoder_2=_clip(tok, CLIPTextModelWithProjection),
            tokenizer=tok,
            tokenizer_2=tok,
            unet=_unet(
                sample_size=8,
                cross_attention_dim=2 * WIDTH,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2],
                attention_head_dim=[2, 4],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            ),
            scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )
    )


def deepfloyd(seed: int = 0) -> IFPipeline:
    """IFPipeline with T5; 4 text layers, 16x16 pictures."""
    torch.manual_seed(seed)
    tok = tokenizer("t5", 77)
    return _make_text_matter(
        IFPipeline(
            tokenizer=tok,
            text_encoder=_t5(tok),
            unet=_unet(
                sample_size=16,
                in_channels=3,
                out_channels=6,
                cross_attention_dim=32,  # its group norm has 32 groups
                encoder_hid_dim=2 * WIDTH,
                encoder_hid_dim_type="text_proj",
                attention_head_dim=8,
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                cross_attention_norm="group_norm",
                only_cross_attention=(False, True),  # the middle block's layer alone attends to the picture, too
                addition_embed_type="text",
                addition_embed_type_num_heads=2,
                act_fn="gelu",
                resnet_time_scale_shift="scale_shift",
            ),
            # An untrained network's noise predictions would be blown up by the first of so few steps.
            scheduler=DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    )


def sd3(seed: int = 0, **config) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline with two CLIPs and T5; 3 text layers, 16x16 pictures."""
    torch.manual_seed(seed)
    clip, t5 = tokenizer("clip"), tokenizer("t5")
    return _make_text_matter(
        StableDiffusion3Pipeline(
            vae=_autoencoder(4, 1, shift_factor=0.0),
            text_encoder=_clip(clip, CLIPTextModelWithProjection),
            text_encoder_2=_clip(clip, CLIPTextModelWithProjection),
            text_encoder_3=_t5(t5),
            tokenizer=clip,
            tokenizer_2=clip,
            tokenizer_3=t5,
            transformer=SD3Transformer2DModel(
                **{
                    "sample_size": 8,
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 4,
                    "num_layers": 3,
                    "attention_head_dim": 8,
                    "num_attention_heads": 4,
                    "joint_attention_dim": 2 * WIDTH,
                    "caption_projection_dim": 32,
                    "pooled_projection_dim": 2 * WIDTH,
                    "pos_embed_max_size": 8,
                }
                | config
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    )


def sd35(seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5's denoiser: normalised queries and keys, dual attention in the first blocks."""
    return sd3(seed, qk_norm="rms_norm", dual_attention_layers=(0, 1))


def flux(seed: int = 0) -> FluxPipeline:
    """FluxPipeline with CLIP and T5; 2 double and 2 single blocks, 16x16 pictures."""
    torch.manual_seed(seed)
    clip, t5 = tokenizer("clip"), tokenizer("t5")
    return _make_text_matter(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=_autoencoder(4, 1, shift_factor=0.0),
            text_encoder=_clip(clip, CLIPTextModel),
            text_encoder_2=_t5(t5),
            tokenizer=clip,
            tokenizer_2=t5,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=True,
                axes_dims_rope=(4, 4, 8),
            ),
        )
    )


#: name -> builder; the four families' classes, then two more joint-attention models
BUILDERS = {"ldm": ldm, "sdxl": sdxl, "if": deepfloyd, "sd3": sd3, "sd35": sd35, "flux": flux}
#: picture size in pixels
SIZE = {"ldm": 32, "sdxl": 16, "if": 16, "sd3": 16, "sd35": 16, "flux": 16}


def model(name: str, seed: int = 0) -> Model:
    """A tiny pipeline as a Model, with settings that sample quickly."""
    quiet_libraries()
    wrapped = Model.from_pipeline(BUILDERS[name](seed))
    limit = TOKENS if name in ("sd3", "sd35", "flux") else None
    settings = {"steps": 3, "guidance": 4.0, "height": SIZE[name], "width": SIZE[name], "max_sequence_length": limit}
    return replace(wrapped, spec=replace(wrapped.spec, name=f"tiny-{name}", miniature=True, **settings))
