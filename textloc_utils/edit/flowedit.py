"""FlowEdit: move a picture by the difference of the velocities for two prompts (Kulikov et al. 2025, 2412.08629)."""

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from textloc_utils.generate import step_generator
from textloc_utils.models import Model
from textloc_utils.settings import TextlocError


@contextlib.contextmanager
def carried_over(model: Model, known: torch.Tensor, start: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Inside the block, a call with the source's and the target's prompt edits the source's picture.

    ``known`` (1, ...) is the source's picture in the denoiser's space. From step ``start`` of ``steps`` on, the
    velocity of the source's prompt is computed at the source's picture, and that of the target's prompt at the edited
    picture. Both pictures have the same noise, which is new in every step. The edited picture moves by the difference
    of the velocities. This is the published method with one noise per step and equal guidance of both prompts. Yields
    the noise with which the call must start, (2, ...). Raises TextlocError for a model that does not sample by flow
    matching with fixed noise levels, or for a start after the last step.
    """
    scheduler = model.pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.use_dynamic_shifting:
        raise TextlocError(f"FlowEdit needs flow matching with fixed noise levels, but {model.spec.name} has none")
    if not 0 <= start < steps:
        raise TextlocError(f"step {start} is out of range; this run's steps are 0 to {steps - 1}")
    forward = copy.deepcopy(scheduler)
    forward.set_timesteps(steps, device=known.device)
    levels, times = forward.sigmas[start:], forward.timesteps[start:]
    run = SimpleNamespace(edited=known.clone(), step=0)

    def rows() -> torch.Tensor:
        noise = torch.randn(known.shape, generator=step_generator(seed, run.step)).to(known)
        level = levels[run.step].to(known)
        source = (1 - level) * known + level * noise
        return torch.cat([source, run.edited + source - known])

    def set_timesteps(*args, **kwargs):
        scheduler.timesteps, scheduler.num_inference_steps = times, len(times)

    def step(answer, timestep, sample, *args, return_dict=True, **kwargs):
        run.edited = run.edited + (levels[run.step + 1] - levels[run.step]) * (answer[1:] - answer[:1])
        run.step += 1
        found = rows().to(sample.dtype)
        return SimpleNamespace(prev_sample=found) if return_dict else (found,)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    try:
        yield rows()
    finally:
        del scheduler.set_timesteps, scheduler.step
