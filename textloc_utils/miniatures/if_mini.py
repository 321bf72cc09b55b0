"""Recipe of ``if-mini``: a smaller version of DeepFloyd IF in pixel space, in two stages.

Stage I draws 32x64 pixels with a T5 and a U-Net whose attention takes image and text tokens together (added keys and
values). It also predicts the sampling variance. Stage II doubles the size. It gets the noised small picture and the
prompt, and uses stage I's T5. Only stage I is studied, so its text layers are the text layers of the model.
"""

from pathlib import Path

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional as F
from transformers import T5EncoderModel

from textloc_utils.miniatures import unets
from textloc_utils.miniatures.encoders import TEXT_WIDTH
from textloc_utils.miniatures.training import Prepared

#: The facts about the finished miniature for the registry (written to its textloc.json).
SPEC = {
    "family": "added-KV U-Net",
    "pipeline": "IFPipeline",
    "steps": 20,
    "guidance": 2.0,
    "height": 64,
    "width": 128,
    "stage1": (32, 64),
    "stage2": "stage2",
    "stage2_arguments": {"num_inference_steps": 8, "guidance_scale": 1.0, "noise_level": 100},
}
TEXT = {"text_encoder": ("t5-masked", 0)}
#: Many small steps: this denoiser needs more steps rather than more samples per step.
BUDGET = {
    "samples": 260_000,
    "batch": 16,
    "lr": 2e-3,
    "curriculum": unets.CURRICULUM,
    "text_weight": unets.TEXT_WEIGHT,
}
#: Timesteps at which letters of 8x12 pixels are hidden by the noise, but the sign is still visible.
SPELLING = (450, 850)
#: Weight of the variance's bound relative to the velocity loss, as in Nichol & Dhariwal's hybrid loss.
VARIANCE_WEIGHT = 0.001
LEVELS = 250  #: stage II is trained with small pictures at noise levels below this one
_CHECKS_OFF = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


def _unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        out_channels=6,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_norm="group_norm",
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="text_proj",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        **config,
    )


def pipeline(ready: Prepared) -> IFPipeline:
    """Stage I with an untrained denoiser and the trained T5."""
    unet = _unet(
        sample_size=32,
        in_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        block_out_channels=(16, 32, 64, 128),
        # At the resolution with most picture tokens, they attend only to the text. DeepFloyd's networks also have this
        # option. It makes training a fifth faster.
        only_cross_attention=(False, True, False, False),
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return IFPipeline(
        **ready.encoders,
        tokenizer=ready.tokenizers["text_encoder"],
        unet=unet,
        # With a sampler that draws new noise, twenty steps give a grainy picture. This sampler draws no noise and needs
        # no variance.
        scheduler=DPMSolverMultistepScheduler(**unets.PIXELS),
        **_CHECKS_OFF,
    )


class VarianceLoss(unets.VelocityLoss):
    """The velocity loss on three channels plus the variational bound for the other three (Nichol & Dhariwal 2021)."""

    def __init__(self, pipe: IFPipeline | IFSuperResolutionPipeline, t5: T5EncoderModel):
        super().__init__(pipe.unet, pipe.scheduler)
        self.t5 = t5

    @torch.no_grad()
    def condition(self, tokens: dict) -> dict:
        """T5's embeddings (B, T, TEXT_WIDTH) of ``tokens`` {"t5": (B, T), "mask": (B, T)}."""
        return {"encoder_hidden_states": self.t5(tokens["t5"], attention_mask=tokens["mask"])[0]}

    def loss(
        self,
        guess: torch.Tensor,
        x: torch.Tensor,
        noisy: torch.Tensor,
        velocity: torch.Tensor,
        t: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss of the denoiser's answer (B, 6, h, w) for pictures ``x`` (B, 3, h, w) at timesteps (B,).

        ``weights`` (B, 1, h, w), of mean 1, weigh the velocity loss of each place.
        """
        guess, part = guess.float().chunk(2, dim=1)
        bound = self.bound(guess.detach(), part, x, noisy, t)
        return (weights * (guess - velocity).square()).mean() + VARIANCE_WEIGHT * bound

    def bound(
        self, guess: torch.Tensor, part: torch.Tensor, x: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Mean divergence of the step back to t - 1 from the true step, whose variance is between two bounds.

        ``part``, -1 to 1, is the predicted position between the bounds. The mean follows from ``guess`` and is not
        trained by this loss.
        """
        now = self.alphas[t][:, None, None, None]
        before = self.alphas[(t - 1).clamp_min(0)][:, None, None, None]
        beta = 1 - now / before
        scale = before.sqrt() * beta / (1 - now)  # weight of the clean picture in the mean
        low = ((1 - before) / (1 - now) * beta).clamp_min(1e-20).log()
        # An output far outside this range would make the exponential below overflow.
        log_variance = low + (part.clamp(-2, 2) + 1) / 2 * (beta.clamp_min(1e-20).log() - low)
        clean = now.sqrt() * noisy - (1 - now).sqrt() * guess
        off = (scale * (x - clean)).square()
        divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + off * (-log_variance).exp())
        return (divergence.mean((1, 2, 3)) * (t > 0)).mean()


class Objective(VarianceLoss):
    """Stage I's loss on pictures (B, 3, 2h, 2w), which are first reduced to half their size. Trains the denoiser."""

    def __init__(self, pipe: IFPipeline):
        super().__init__(pipe, pipe.text_encoder)

    def timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw half of the timesteps from SPELLING and half from all, because in pixels, remaining noise is visible."""
        chosen = torch.rand(n, generator=generator) < 0.5
        spelling = torch.randint(*SPELLING, (n,), generator=generator)
        return torch.where(chosen, spelling, torch.randint(unets.STEPS, (n,), generator=generator))

    def forward(
        self, pictures: torch.Tensor, tokens: dict, generator: torch.Generator, weights: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss; ``tokens`` {"t5": (B, T), "mask": (B, T)}; ``weights`` (B, 1, 2h, 2w); noise on the CPU."""
        x = F.avg_pool2d(pictures, 2)
        noisy, velocity, t = self.diffuse(x, generator)
        guess = self.denoiser(noisy, t, **self.condition(tokens), return_dict=False)[0]
        return self.loss(guess, x, noisy, velocity, t, F.avg_pool2d(weights, 2))


def tokenize(pipe: IFPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of captions, each (B, 77), after the same cleaning as in the pipeline."""
    clean = [c.lower() for c in captions]
    tokens = pipe.tokenizer(clean, padding="max_length", truncation=True, return_tensors="pt")
    return {"t5": tokens.input_ids, "mask": tokens.attention_mask}


class Stage2:
    """Recipe of stage II, with the T5 of a trained stage I in the folder ``first``."""

    SHARE = 0.1  #: share of the miniature's budget
    SPEC = SPEC

    def __init__(self, first: Path):
        self.first = IFPipeline.from_pretrained(first, **_CHECKS_OFF)

    def pipeline(self, ready: Prepared) -> IFSuperResolutionPipeline:
        """The untrained stage II. It uses stage I's tokenizer and T5, which are not saved again."""
        unet = _unet(
            sample_size=64,
            in_channels=6,
            down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",),
            up_block_types=("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 3,
            block_out_channels=(16, 32, 48, 64),
            class_embed_type="timestep",
        )
        return IFSuperResolutionPipeline(
            tokenizer=None,
            text_encoder=None,
            unet=unet,
            scheduler=DDPMScheduler(variance_type="learned_range", clip_sample=True, **unets.PIXELS),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **_CHECKS_OFF,
        )

    def Objective(self, pipe: IFSuperResolutionPipeline) -> "Stage2Objective":
        """Stage II's loss."""
        return Stage2Objective(pipe, self.first.text_encoder)

    def tokenize(self, pipe: IFSuperResolutionPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
        """The tokens of stage I."""
        return tokenize(self.first, captions)


class Stage2Objective(VarianceLoss):
    """Stage II's loss on square parts of pictures (B, 3, h, w). Trains only the denoiser."""

    def __init__(self, pipe: IFSuperResolutionPipeline, t5: T5EncoderModel):
        super().__init__(pipe, t5.requires_grad_(False))
        self.noising = pipe.image_noising_scheduler

    def forward(
        self, pictures: torch.Tensor, tokens: dict, generator: torch.Generator, weights: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss; ``tokens`` {"t5": (B, T), "mask": (B, T)}; ``weights`` (B, 1, h, w); noise on the CPU."""
        # The pipeline enlarges the small picture and adds noise to it in the same way.
        small = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[-2:], mode="bilinear", align_corners=True)
        # A pixel depends only on its surroundings. So a part of the picture is enough for training, and costs less.
        side = pictures.shape[-2]
        left = int(torch.randint(pictures.shape[-1] - side + 1, (), generator=generator))
        pictures, small, weights = (each[..., left : left + side] for each in (pictures, small, weights))
        level = torch.randint(LEVELS, (len(pictures),), generator=generator).to(pictures.device)
        small = self.noising.add_noise(small, torch.randn(small.shape, generator=generator).to(small.device), level)
        noisy, velocity, t = self.diffuse(pictures, generator)
        seen = torch.cat([noisy, small], dim=1)
        guess = self.denoiser(seen, t, **self.condition(tokens), class_labels=level, return_dict=False)[0]
        return self.loss(guess, pictures, noisy, velocity, t, weights)
