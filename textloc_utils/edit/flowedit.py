"""FlowEdit: carry a picture along the difference of what two prompts ask for (Kulikov et al. 2025, 2412.08629)."""

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
    """Inside the block a call with the source's and the target's prompt carries a picture from one to the other.

    ``known`` (1, ...) is the source's picture as the denoiser draws it. From step ``start`` of ``steps`` on, both
    prompts' velocities are taken at the picture and at the edited one, with the same noise in both, which is new in
    every step; the edited picture moves by their difference (the published method with one noise per step and equal
    guidance of both prompts). Yields what the call must start from, (2, ...). Raises TextlocError for a model that
    does not sample by flow matching with fixed noise levels, or a start beyond the last step.
    """
    scheduler = model.pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.use_dynamic_shifting:
        raise TextlocError(f"FlowEdit needs flow matching with fixed noise levels, which {model.spec.name} has not")
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
