"""Recipe of ``sd3-mini``: a smaller version of Stable Diffusion 3.

It has two CLIP text encoders and a T5, a 16-channel autoencoder that reduces the size by 8, and a denoiser of
joint-attention blocks on 2x2 patches, as in SD3-medium. It has 12 blocks of width 96 instead of 24 blocks of width
1536.
"""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from textloc_utils.miniatures import world
from textloc_utils.miniatures.encoders import TEXT_WIDTH
from textloc_utils.miniatures.training import Prepared

WIDTH = 96

#: The facts about the finished miniature for the registry (written to its textloc.json). Steps and guidance were chosen
#: on validation words: more steps or more guidance do not improve spelling.
SPEC: dict[str, Any] = {
    "family": "joint attention",
    "pipeline": "StableDiffusion3Pipeline",
    "steps": 10,
    "guidance": 2.0,
    "height": 64,
    "width": 128,
    "max_sequence_length": world.TOKENS,
}

TEXT = {"text_encoder": ("clip", 0), "text_encoder_2": ("clip", 1), "text_encoder_3": ("t5", 0)}
LATENTS = {"channels": 16, "shift_factor": 0.0}


def pipeline(ready: Prepared, layers: int = 12) -> StableDiffusion3Pipeline:
    """The whole pipeline, with an untrained denoiser and the trained parts."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
    )
    initialise(transformer)
    return StableDiffusion3Pipeline(
        vae=ready.vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **ready.encoders,
        **{name.replace("text_encoder", "tokenizer"): made for name, made in ready.tokenizers.items()},
    )


@torch.no_grad()
def initialise(transformer: SD3Transformer2DModel) -> None:
    """Initialise the denoiser so that it copies its input: adaLN-Zero (Peebles & Xie 2023) and matched projections.

    In such a narrow residual stream, the noise of a 2x2x16 patch needs two thirds of the width. At high noise levels,
    most of the output is this noise. So the patch embedding is an isometry that is orthogonal to the position
    embedding. The last projection is its transpose, and every block has no effect at the start.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            if "norm" in name:  # the modulations of the adaptive layer norms
                torch.nn.init.zeros_(module.weight)
            elif "transformer_blocks" in name:
                torch.nn.init.xavier_uniform_(module.weight)
            else:
                continue
            torch.nn.init.zeros_(module.bias)
    embed, patch = transformer.pos_embed, transformer.config.patch_size
    height, width = SPEC["height"] // 8, SPEC["width"] // 8
    positions = embed.cropped_pos_embed(height, width)[0]
    taken = torch.cat([torch.ones(1, positions.shape[1]), positions])
    _, values, directions = torch.linalg.svd(taken)
    free = directions[(values > 1e-3 * values[0]).sum() :]
    channels, size = transformer.config.in_channels, transformer.config.in_channels * patch**2
    ends = free[:size].T  # (width, patch numbers), orthonormal columns
    embed.proj.weight.copy_(2 * ends.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2))
    embed.proj.bias.zero_()
    transformer.proj_out.weight.copy_(0.6 * ends.T)
    transformer.proj_out.bias.zero_()


class Objective(torch.nn.Module):
    """The training loss, rectified flow on latents (Esser et al. 2024, eq. 5 and 14), as one module.

    Only the denoiser is trained. Letters are readable in the latents until the noise is strong. Only at higher noise
    levels must the model read the prompt. So the noise levels are drawn logit-normal around a high level.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline):
        super().__init__()
        self.clip, self.clip_2, self.t5 = pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3
        self.denoiser = pipe.transformer

    @torch.no_grad()
    def condition(self, tokens: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (B, tokens of CLIP and T5, TEXT_WIDTH) and pooled text (B, TEXT_WIDTH), as in the pipeline."""
        first = self.clip(tokens["clip"], output_hidden_states=True)
        second = self.clip_2(tokens["clip"], output_hidden_states=True)
        t5 = self.t5(tokens["t5"])[0]
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        text = torch.cat([torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)
        return text, torch.cat([first.text_embeds, second.text_embeds], dim=-1)

    def forward(
        self, latents: torch.Tensor, tokens: dict, generator: torch.Generator, weights: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss of latents (B, 16, h, w) and ``tokens`` {"clip": (B, T), "t5": (B, T)}; noise on the CPU.

        ``weights`` (B, 1, h, w), of mean 1, weigh the loss of each place.
        """
        n, device = len(latents), latents.device
        text, pooled = self.condition(tokens)
        sigma = torch.sigmoid(1.0 + torch.randn(n, generator=generator))
        uniform = torch.rand(n, generator=generator)
        sigma = torch.where(torch.rand(n, generator=generator) < 0.1, uniform, sigma).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        s = sigma[:, None, None, None]
        guess = self.denoiser((1 - s) * latents + s * noise, text, pooled, sigma * 1000, return_dict=False)[0]
        return (weights * (guess.float() - (noise - latents)).square()).mean()


def tokenize(pipe: StableDiffusion3Pipeline, captions: list[str]) -> dict:
    """Token ids of captions, {"clip": (B, T), "t5": (B, T)}."""
    keep = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return {
        "clip": pipe.tokenizer(captions, **keep).input_ids,
        "t5": pipe.tokenizer_3(captions, **keep).input_ids,
    }
