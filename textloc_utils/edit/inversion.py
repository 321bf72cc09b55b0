"""Inversion of given pictures: find the noise from which a prompt draws them."""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from textloc_utils.generate import generate
from textloc_utils.models import Model, ModelSpec
from textloc_utils.settings import TextlocError

#: Number of fixed-point passes per step of an inversion, and the damping factor of each pass after the first.
PASSES, DAMPED = 5, 0.6
#: Guidance of an inversion, and of an edit that starts from an inversion.
UNGUIDED = 1.0


def check_picture(spec: ModelSpec, height: int, width: int) -> None:
    """Raise TextlocError for a picture that is not of the model's size."""
    if (height, width) != (spec.height, spec.width):
        raise TextlocError(f"a picture for {spec.name} must be {spec.width}x{spec.height} pixels, got {width}x{height}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """The noise (n, ...) from which prompts draw given pictures, and the cost of finding it."""

    noise: torch.Tensor
    row_evaluations: int
    seconds: float


@torch.no_grad()
def invert(
    model: Model, pictures: np.ndarray, prompts: Sequence[str], *, passes: int = PASSES, steps: int | None = None
) -> Inverted:
    """Find the noise from which ``prompts`` draw ``pictures``, uint8 (n, H, W, 3) of the model's size.

    The sampler's steps are inverted from the last to the first: DDIM steps for U-Nets, Euler steps for flow matching. A
    step is linear in the picture and in the denoiser's output f: x' = c x + d f(x). The inverse step solves
    x = (x' - d f(x)) / c with ``passes`` damped fixed-point passes that start at x'. The first pass is plain DDIM
    inversion. No guidance is used, neither here nor in an :func:`.edit` that starts from this noise. Guidance moves the
    inverted noise far away from the noise of the training, and its steps are harder to invert. For a model of two
    stages, the first stage is inverted.

    Raises TextlocError for pictures of the wrong type or size, for an autoencoder that cannot encode them, and for a
    result that is not finite.
    """
    if passes < 1:
        raise TextlocError(f"an inversion needs at least one pass per step, got {passes}")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise TextlocError(f"pictures must be uint8 (n, H, W, 3), got {pictures.dtype} {pictures.shape}")
    check_picture(model.spec, *pictures.shape[1:3])
    known, first = model.encode(pictures), replace(model, stage2=None)
    if not known.isfinite().all():
        raise TextlocError("the autoencoder's output for these pictures is not finite; try another dtype")
    with model.first_order(), _taken_back(model.pipe.scheduler, passes) as run:
        options = {"noise": known.to(model.denoiser.dtype), "guidance": UNGUIDED, "batch_size": len(known)}
        made = generate(first, prompts, [0] * len(known), steps=steps, **options)
    if run.noise is None or not run.noise.isfinite().all():
        raise TextlocError("the noise that the inversion found is not finite; try another dtype or more steps")
    return Inverted(noise=run.noise, row_evaluations=made.row_evaluations, seconds=made.seconds)


@contextlib.contextmanager
def _taken_back(scheduler, passes: int) -> Iterator[SimpleNamespace]:
    """Inside the block the scheduler goes from the finished picture to its noise, which is then ``run.noise``."""
    run = SimpleNamespace(calls=0, noise=None, known=None, steps=[])
    forward = copy.deepcopy(scheduler)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args, **kwargs):
        forward.set_timesteps(*args, **kwargs)
        device = forward.timesteps.device
        picture, answer = torch.eye(2, dtype=torch.float64, device=device).reshape(2, 2, 1, 1, 1)
        # The coefficients of each step: its result for a picture alone, and for an output of the denoiser alone.
        run.steps = [forward.step(answer, t, picture, return_dict=False)[0].flatten() for t in forward.timesteps]
        run.calls = 0
        scheduler.timesteps = forward.timesteps.flip(0).repeat_interleave(passes)
        scheduler.num_inference_steps = len(scheduler.timesteps)

    @functools.wraps(scheduler.step)
    def step(answer, timestep, sample, *args, return_dict=True, **kwargs):
        level, again = divmod(run.calls, passes)
        if not again:
            run.known = sample
        run.calls += 1
        of_picture, of_answer = run.steps[-1 - level].to(sample.dtype)
        found = (run.known - of_answer * answer[:, : sample.shape[1]]) / of_picture
        run.noise = sample + DAMPED * (found - sample) if again else found
        return SimpleNamespace(prev_sample=run.noise) if return_dict else (run.noise,)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    try:
        yield run
    finally:
        del scheduler.set_timesteps, scheduler.step
