"""Train a small AutoencoderKL on crops around the text. This converges several times faster than whole pictures."""

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from textloc_utils import files
from textloc_utils.miniatures import factors, world

CROP = 48
LEAST_READ = 0.95  #: share of texts that must be readable after the autoencoder, so that a denoiser can spell
CHECKPOINT_SECONDS = 60.0


def build(channels: int, **config) -> AutoencoderKL:
    """An untrained autoencoder: 8x smaller latents with ``channels`` channels, no attention, no quantisation layers."""
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
    """Whether a device can multiply in bfloat16: CUDA devices, and CPUs with AVX-512 BF16.

    With bfloat16, pictures are encoded twice as fast, and the denoiser of sd3-mini trains a fifth faster. The backward
    pass of convolutions is not faster, so the autoencoder is trained in float32.
    """
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def crop_batch(rng: random.Random, n: int) -> torch.Tensor:
    """``n`` random scenes, cropped around the text: float (n, 3, CROP, CROP) in -1..1."""
    out = np.empty((n, CROP, CROP, 3), np.uint8)
    for i in range(n):
        scene = world.random_scene(rng, world.EVERYWHERE)
        x0, y0, x1, y1 = world.text_box(scene)
        left = min(max(rng.randint(x0 - CROP // 2, x1 - CROP // 2), 0), world.WIDTH - CROP)
        top = min(max(rng.randint(y0 - CROP // 2, y1 - CROP // 2), 0), world.HEIGHT - CROP)
        out[i] = world.render(scene)[top : top + CROP, left : left + CROP]
    return to_tensor(out)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in -1..1, channels last in memory."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Encode and decode pictures, uint8 (n, H, W, 3). They are decoded from the mean of their latents."""
    device = next(vae.parameters()).device
    out = []
    for part in np.array_split(pictures, max(1, len(pictures) // 64)):
        y = vae.decode(vae.encode(to_tensor(part).to(device)).latent_dist.mean).sample.clamp(-1, 1)
        out.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def reconstruction(vae: AutoencoderKL, n: int = 64, seed: int = 1) -> dict[str, float]:
    """Measure how well the autoencoder reconstructs ``n`` whole scenes.

    The keys are ``psnr_db``, the mean PSNR, and for each factor (including ``text``) the share that is read correctly.
    """
    rng = random.Random(seed)
    known = [world.random_scene(rng, world.EVERYWHERE) for _ in range(n)]
    before = np.stack([world.render(s) for s in known])
    after = through(vae, before)
    mse = np.square(before.astype(float) - after).mean((1, 2, 3)) / 255**2
    read = factors.right(factors.read(after), known)
    return {"psnr_db": round(float(np.mean(-10 * np.log10(mse))), 2)} | {k: round(v, 3) for k, v in read.items()}


def train(
    vae: AutoencoderKL,
    checkpoint: Path,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 2e-3,
    kl: float = 1e-5,
    seed: int = 0,
    log=print,
) -> dict:
    """Train in place for ``steps`` steps with a cosine schedule, or resume from ``checkpoint``.

    Returns a dict with the steps, the seconds and the values of ``reconstruction``. ``kl`` keeps the latents near unit
    variance. Every batch and its noise depend only on (seed, step). So a resumed training uses the same batches as an
    uninterrupted one.
    """
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = files.read_state(checkpoint)
        vae.load_state_dict(saved["vae"])
        optimiser.load_state_dict(saved["optimiser"])
        first, seconds = saved["step"], saved["seconds"]
        log(f"autoencoder resumed at step {first}")
    last = clock = time.time()
    for step in tqdm(range(first, steps), desc="autoencoder", initial=first, total=steps, mininterval=5):
        ramp = min(1.0, (step + 1) / 50)
        for group in optimiser.param_groups:
            group["lr"] = lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        x = crop_batch(random.Random(f"{seed} autoencoder {step}"), batch).to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        y = vae.decode(posterior.mean + posterior.std * noise.to(device)).sample
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + kl * posterior.kl().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the autoencoder's loss is not finite at step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        seconds, clock = seconds + time.time() - clock, time.time()
        if time.time() - last > CHECKPOINT_SECONDS:
            vae.eval()
            log(f"autoencoder {seconds:.0f} s, step {step + 1}: loss {loss.item():.4f}, {reconstruction(vae)}")
            vae.train()
            state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict()}
            files.write_state(checkpoint, state | {"step": step + 1, "seconds": seconds})
            last = clock = time.time()
    vae.eval()
    report = {"steps": steps, "seconds": round(seconds), **reconstruction(vae, 256)}
    if report["text"] < LEAST_READ:
        log(
            f"only {report['text']:.0%} of the texts are readable after the autoencoder, and no denoiser can spell "
            "better: start again with more --autoencoder-steps"
        )
    return report


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, n: int = 128, seed: int = 2) -> None:
    """Measure the mean and the spread of latents on scenes. Write them to the config as shift and scaling factor."""
    rng = random.Random(seed)
    device = next(vae.parameters()).device
    x = to_tensor(np.stack([world.render(world.random_scene(rng, world.EVERYWHERE)) for _ in range(n)])).to(device)
    z = vae.encode(x).latent_dist.mean
    shift = vae.config.shift_factor is not None
    mean = z.mean().item() if shift else 0.0
    scale = 1.0 / (z - mean).square().mean().sqrt().item()
    vae.register_to_config(scaling_factor=scale, **({"shift_factor": mean} if shift else {}))
