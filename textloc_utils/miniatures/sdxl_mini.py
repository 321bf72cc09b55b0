"""Recipe of ``sdxl-mini``: a smaller version of SDXL.

It has two CLIP text encoders, pooled text and picture sizes that are added to the timestep, a 4-channel autoencoder
that reduces the size by 8, and a U-Net with three resolutions. The first resolution has no attention, the second has
transformers, and the third and the middle have deeper transformers.
"""

import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from textloc_utils.miniatures import unets
from textloc_utils.miniatures.encoders import TEXT_WIDTH
from textloc_utils.miniatures.training import Prepared

SIZE_WIDTH = 16  #: numbers per embedded size; there are six sizes

#: The facts about the finished miniature for the registry (written to its textloc.json).
SPEC = {
    "family": "cross-attention U-Net",
    "pipeline": "StableDiffusionXLPipeline",
    "steps": 20,
    "guidance": 2.0,
    "height": 64,
    "width": 128,
}

#: Both CLIPs are those of sd3-mini, because the full-size models also share them.
TEXT = {"text_encoder": ("clip", 0), "text_encoder_2": ("clip", 1)}
LATENTS = {"channels": 4}
BUDGET = {"samples": 600_000, "curriculum": unets.CURRICULUM, "text_weight": unets.TEXT_WEIGHT}


def pipeline(ready: Prepared) -> StableDiffusionXLPipeline:
    """The whole pipeline, with an untrained denoiser and the trained parts."""
    second = ready.encoders["text_encoder_2"]
    # Stable Diffusion 3 reads a pooled text of both CLIPs. SDXL reads only that of the second CLIP.
    first = CLIPTextModel(ready.encoders["text_encoder"].config).eval().requires_grad_(False)
    first.load_state_dict(ready.encoders["text_encoder"].state_dict(), strict=False)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 72, 72),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 3],
        norm_num_groups=8,
        attention_head_dim=[2, 4, 4],  # these are the numbers of heads, despite the name
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=second.config.projection_dim + 6 * SIZE_WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=ready.vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=ready.tokenizers["text_encoder"],
        tokenizer_2=ready.tokenizers["text_encoder_2"],
        unet=unet,
        scheduler=DDIMScheduler(**unets.LATENTS),
        # The empty prompt is encoded like any other prompt, so it can also be a negative prompt.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


class Objective(unets.VelocityLoss):
    """The velocity loss on latents (B, 4, h, w). Trains the denoiser."""

    def __init__(self, pipe: StableDiffusionXLPipeline):
        super().__init__(pipe.unet, pipe.scheduler)
        self.clip, self.clip_2 = pipe.text_encoder, pipe.text_encoder_2

    @torch.no_grad()
    def condition(self, tokens: dict) -> dict:
        """Embeddings (B, T, TEXT_WIDTH), pooled text and sizes (B, 6) of ``tokens`` {"clip": (B, T)}."""
        ids = tokens["clip"]
        first = self.clip(ids, output_hidden_states=True)
        second = self.clip_2(ids, output_hidden_states=True)
        # Original size, corner of the crop, and target size, as in the pipeline for a whole picture.
        size = (SPEC["height"], SPEC["width"])
        sizes = torch.tensor([*size, 0, 0, *size], device=ids.device, dtype=torch.float32)
        return {
            "encoder_hidden_states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "added_cond_kwargs": {"text_embeds": second.text_embeds, "time_ids": sizes.expand(len(ids), -1)},
        }


def tokenize(pipe: StableDiffusionXLPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids of captions, {"clip": (B, TOKENS)}."""
    return {"clip": pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids}
