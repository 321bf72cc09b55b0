"""What the U-Net miniatures share: noise schedules, the velocity loss, and the smallest building blocks.

Velocity prediction on a schedule that ends in pure noise (Salimans & Ho 2022; Lin et al. 2024): a flat wall lives in
the lowest frequencies, and a model that never saw pure noise cannot draw a whole picture black or white.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

STEPS = 1000
#: Easy scenes for two fifths of the samples (see ``training.Budget``): letters must bind before all typefaces and inks
#: come, and in these networks they bind later than in a transformer. Then most captions name everything for a while.
#: With the world's captions alone, of which one in five names the typeface, sdxl-mini drew the named typeface in 0.42
#: of the pictures after 350,000 scenes of all typefaces, where chance is 0.33.
CURRICULUM = (
    *((0.0, 0.9, True, 0.0), (0.1, 0.5, True, 0.0), (0.2, 0.1, True, 0.0)),
    *((0.4, 0.1, False, 0.6), (0.8, 0.1, False, 0.0)),
)
#: See ``training.Budget``. After 180,000 samples ldm-mini wrote 0.17 of the words without it, and 0.75 with it.
TEXT_WEIGHT = 4.0

#: Scheduler settings on latents and on pixels. Pixels repeat each other, so that letters stay readable in them at
#: noise levels that hide everything in latents: their schedule is the noisier one.
LATENTS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PIXELS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
for _settings in (LATENTS, PIXELS):
    _settings |= {
        "num_train_timesteps": STEPS,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }


class VelocityLoss(nn.Module):
    """The training loss of a U-Net pipeline as one module; subclasses hold the text encoders.

    ``denoiser`` is laid out channels last, in which the CPU's convolutions are faster. It starts by answering zero.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler):
        super().__init__()
        self.denoiser = unet.to(memory_format=torch.channels_last)
        # The signal's share of the variance at each timestep; not a weight, so not in the checkpoint.
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)
        # Some samplers put a tiny number in the place of the last one, larger than the one before.
        self.alphas[-1] = 0.0
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)

    def condition(self, tokens: dict) -> dict:
        """The denoiser's keyword arguments that carry the text of ``tokens``."""
        raise NotImplementedError

    def timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """``n`` timesteps to learn from, on the CPU.

        Text can only be read from the prompt where noise hides it, so their density rises linearly with the noise.
        """
        return (STEPS * torch.rand(n, generator=generator).sqrt()).long().clamp_max(STEPS - 1)

    def diffuse(self, x: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise ``x`` (B, C, h, w): the noisy x, the velocity to predict, and the timesteps (B,).

        All random numbers come from the CPU's ``generator``.
        """
        t = self.timesteps(len(x), generator).to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        signal = self.alphas[t].sqrt()[:, None, None, None]
        spread = (1 - self.alphas[t]).sqrt()[:, None, None, None]
        return signal * x + spread * noise, signal * noise - spread * x, t

    def forward(
        self, latents: torch.Tensor, tokens: dict, generator: torch.Generator, weights: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss of latents (B, C, h, w) and what the recipe's ``tokenize`` made of their captions.

        ``weights`` (B, 1, h, w), of mean 1, weigh the loss of each place.
        """
        noisy, velocity, t = self.diffuse(latents, generator)
        guess = self.denoiser(noisy, t, **self.condition(tokens), return_dict=False)[0]
        return (weights * (guess.float() - velocity).square()).mean()
