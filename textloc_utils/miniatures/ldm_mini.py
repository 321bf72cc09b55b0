"""Recipe of ``ldm-mini``: latent diffusion's text-to-image layout, narrowed.

An LDMBert text encoder, a 4-channel autoencoder that divides by 8, and a U-Net with cross-attention at both of its
resolutions and in the middle: 48 and 96 channels in place of 320 to 1280.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from textloc_utils.miniatures import scenes, unets
from textloc_utils.miniatures.autoencoder import build
from textloc_utils.miniatures.encoders import TEXT_WIDTH
from textloc_utils.miniatures.tokenizers import letter_tokenizer
from textloc_utils.models import FIXED_TOKENS

#: What the registry knows about the finished miniature (written to its textloc.json).
SPEC = {
    "family": "cross-attention U-Net",
    "pipeline": "LDMTextToImagePipeline",
    "steps": 20,
    "guidance": 3.0,
    "height": 64,
    "width": 128,
    "text_box": scenes.letters_region(),
}

#: For the model card. An untrained LDMBert adds up what a token is and where it stands: all that spelling asks for.
#: Trained along, it kept moving, and the denoiser had not begun to read letters after 45,000 samples.
ENCODERS = "LDMBert as initialised, not trained"
BUDGET = unets.BUDGET


def autoencoder() -> AutoencoderKL:
    """The untrained autoencoder: 8x smaller, 4 channels."""
    return build(4)


def pipeline(vae: AutoencoderKL) -> LDMTextToImagePipeline:
    """The whole pipeline with untrained text encoder and denoiser around a given autoencoder."""
    tokenizer = letter_tokenizer(length=FIXED_TOKENS, kind="clip")
    bert = LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=FIXED_TOKENS,
        d_model=TEXT_WIDTH,
        encoder_layers=3,
        encoder_ffn_dim=256,
        encoder_attention_heads=4,
        head_dim=32,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=4,  # the number of heads, whatever its name says
        cross_attention_dim=TEXT_WIDTH,
    )
    return LDMTextToImagePipeline(
        vqvae=vae,
        bert=LDMBertModel(bert),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**unets.LATENTS),
    )


class Objective(unets.VelocityLoss):
    """The velocity loss on latents (B, 4, h, w); trains the denoiser."""

    def __init__(self, pipe: LDMTextToImagePipeline):
        super().__init__(pipe.unet, pipe.scheduler)
        self.bert = pipe.bert
        self.bert.requires_grad_(False)

    def condition(self, tokens: dict) -> dict:
        """Text embeddings (B, T, TEXT_WIDTH) of ``tokens`` {"bert": (B, T)}."""
        return {"encoder_hidden_states": self.bert(tokens["bert"])[0]}


def tokenize(pipe: LDMTextToImagePipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids of captions, {"bert": (B, FIXED_TOKENS)}."""
    return {"bert": pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids}
