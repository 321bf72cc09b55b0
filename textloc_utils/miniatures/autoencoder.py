"""Train a small AutoencoderKL on crops around the text (converges several times faster than whole pictures)."""

import random
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from textloc_utils.miniatures import reader, scenes

CROP = 48
LEAST_READ = 0.95  #: share of the words that must stay readable, or no denoiser can spell through the autoencoder


def build(channels: int, **config) -> AutoencoderKL:
    """An untrained autoencoder: 8x smaller, ``channels`` deep, neither attention nor quantisation convolutions."""
    return AutoencoderKL(
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        sample_size=64,
        **config,
    )


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16: CUDA, and CPUs with AVX-512 BF16.

    There it encodes pictures twice as fast and trains the denoiser of sd3-mini a fifth faster; the backward pass of
    convolutions gains nothing, so the autoencoder is trained in float32.
    """
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def crop_batch(rng: random.Random, n: int) -> torch.Tensor:
    """``n`` random scenes cropped around the text: float (n, 3, CROP, CROP) in -1..1."""
    out = np.empty((n, CROP, CROP, 3), np.uint8)
    for i in range(n):
        scene = scenes.random_scene(rng)
        x0, y0, x1, y1 = scenes.text_box(scene)
        left = min(max(rng.randint(x0 - CROP // 2, x1 - CROP // 2), 0), scenes.WIDTH - CROP)
        top = min(max(rng.randint(y0 - CROP // 2, y1 - CROP // 2), 0), scenes.HEIGHT - CROP)
        out[i] = scenes.render(scene)[top : top + CROP, left : left + CROP]
    return to_tensor(out)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in -1..1, channels last in memory."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def reconstruction(vae, n: int = 64, seed: int = 1) -> dict[str, float]:
    """How well ``n`` whole scenes survive the autoencoder's mean.

    Keys: ``psnr_db``, the mean PSNR, and ``words_read``, the share of words that template matching reads back.
    """
    rng = random.Random(seed)
    device = next(vae.parameters()).device
    known = [scenes.random_scene(rng) for _ in range(n)]
    x = to_tensor(np.stack([scenes.render(s) for s in known])).to(device)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    mse = (x - y).square().mean((1, 2, 3)) / 4
    pictures = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    right = [text == s.text for text, s in zip(reader.read(pictures), known, strict=True)]
    return {"psnr_db": round(float((-10 * mse.log10()).mean()), 2), "words_read": round(float(np.mean(right)), 3)}


def train(vae, *, seconds: float, batch: int = 16, lr: float = 2e-3, kl: float = 1e-5, seed: int = 0, log=print):
    """Train in place for ``seconds`` with a cosine schedule over the time budget.

    Returns a dict with the steps done, the seconds and what ``reconstruction`` measures. ``kl`` keeps the latents
    near unit variance.
    """
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last).train()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    start, step, last = time.time(), 0, 0.0
    bar = tqdm(total=round(seconds), unit="s", desc="autoencoder")
    while (spent := time.time() - start) < seconds:
        ramp = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = lr * ramp * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * spent / seconds)))
        x = crop_batch(rng, batch).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + kl * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update(round(spent) - bar.n)
        if spent - last > 60:
            last = spent
            vae.eval()
            log(f"autoencoder {spent:.0f} s, step {step}: loss {loss.item():.4f}, {reconstruction(vae)}")
            vae.train()
    bar.close()
    vae.eval()
    report = {"steps": step, "seconds": round(time.time() - start), **reconstruction(vae)}
    if report["words_read"] < LEAST_READ:
        log(
            f"only {report['words_read']:.0%} of the words are readable through the autoencoder, and no denoiser will "
            "spell better: start again with more --autoencoder-seconds"
        )
    return report


@torch.no_grad()
def set_latent_statistics(vae, n: int = 128, seed: int = 2) -> None:
    """Measure the latents' mean and spread on scenes and write them to the config as shift and scaling factor."""
    rng = random.Random(seed)
    device = next(vae.parameters()).device
    x = to_tensor(np.stack([scenes.render(scenes.random_scene(rng)) for _ in range(n)])).to(device)
    z = vae.encode(x).latent_dist.mean
    shift = vae.config.shift_factor is not None
    mean = z.mean().item() if shift else 0.0
    scale = 1.0 / (z - mean).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=scale, **({"shift_factor": mean} if shift else {}))
