"""Recipe of ``ldm-mini``: a smaller version of the latent diffusion text-to-image model.

It has an LDMBert text encoder, a 4-channel autoencoder that reduces the size by 8, and a U-Net with cross-attention at
both of its resolutions and in the middle. The U-Net has 48 and 96 channels instead of 320 to 1280.
"""

import torch
from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel

from textloc_utils.miniatures import unets
from textloc_utils.miniatures.encoders import TEXT_WIDTH
from textloc_utils.miniatures.training import Prepared

#: The facts about the finished miniature for the registry (written to its textloc.json).
SPEC = {
    "family": "cross-attention U-Net",
    "pipeline": "LDMTextToImagePipeline",
    "steps": 20,
    "guidance": 3.0,
    "height": 64,
    "width": 128,
}

TEXT = {"bert": ("bert", 0)}
LATENTS = {"channels": 4}
BUDGET = {"samples": 500_000, "curriculum": unets.CURRICULUM, "text_weight": unets.TEXT_WEIGHT}


def pipeline(ready: Prepared) -> LDMTextToImagePipeline:
    """The whole pipeline, with an untrained denoiser and the trained parts."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=4,  # this is the number of heads, despite its name
        cross_attention_dim=TEXT_WIDTH,
    )
    return LDMTextToImagePipeline(
        vqvae=ready.vae,
        bert=ready.encoders["bert"],
        tokenizer=ready.tokenizers["bert"],
        unet=unet,
        scheduler=DDIMScheduler(**unets.LATENTS),
    )


class Objective(unets.VelocityLoss):
    """The velocity loss on latents (B, 4, h, w). Trains the denoiser."""

    def __init__(self, pipe: LDMTextToImagePipeline):
        super().__init__(pipe.unet, pipe.scheduler)
        self.bert = pipe.bert

    @torch.no_grad()
    def condition(self, tokens: dict) -> dict:
        """Text embeddings (B, T, TEXT_WIDTH) of ``tokens`` {"bert": (B, T)}."""
        return {"encoder_hidden_states": self.bert(tokens["bert"])[0]}


def tokenize(pipe: LDMTextToImagePipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids of captions, {"bert": (B, 77)}."""
    return {"bert": pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids}
