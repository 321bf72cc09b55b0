"""What the guard is compared with, as published."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from textloc_utils.models import Model, read_call, select_rows
from textloc_utils.prompts import SIMPLE_TEMPLATE
from textloc_utils.safety.calls import _Change, _MoreRows
from textloc_utils.safety.detector import Finding


@dataclass(frozen=True, kw_only=True)
class SafeDiffusion:
    """Settings of Safe Latent Diffusion, by the names of its paper's equations 3 to 8.

    ``warmup`` counts steps of a run of 50, as published; a shorter run waits for the same share of its steps.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float


#: The configuration that the paper on text localization compares with, published as Hyp-Medium, and the strongest one.
SLD_MEDIUM = SafeDiffusion(scale=1000, warmup=10, threshold=0.01, momentum=0.3, beta=0.4)
SLD_MAX = SafeDiffusion(scale=5000, warmup=0, threshold=1.0, momentum=0.5, beta=0.7)


def concept(findings: Iterable[Finding]) -> str:
    """The toxic text of a prompt as the baselines are told of it: as text on a sign, which every model understands."""
    return SIMPLE_TEMPLATE.format(text=" ".join(dict.fromkeys(f.word for f in findings)))


class _Negative(_Change):
    """The negatives of toxic prompts read another text."""

    def hooks(self) -> list:
        return [self.model.denoiser.register_forward_pre_hook(self._before, with_kwargs=True)]

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        batch = read_call(denoiser, args, kwargs).rows
        texts = list(range(batch))
        for i, row in enumerate(self.negative_rows(batch)):
            texts[row] = batch + i
        return (), select_rows(denoiser, args, kwargs, range(batch), texts, self.extra)


class _SafeDiffusion(_MoreRows):
    """Safe Latent Diffusion: the added rows read the unwanted concept and push the guidance away from it.

    The pipeline computes u + g (c - u) from the answers to negative and prompt; it is given c - m in place of c, with
    the safety guidance m, so that it arrives at u + g (c - u - m). A learned variance stays the prompt's.
    """

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, config: SafeDiffusion, warmup: int):
        super().__init__(model, n, rows, extra)
        self.config, self.warmup = config, warmup
        self.step, self.momentum, self._timestep = -1, 0.0, None
        self.channels = model.denoiser.config.in_channels

    def begin(self, call) -> None:
        self.negative_rows(call.rows)
        timestep = float(torch.as_tensor(call.timestep).max())
        self.step += timestep != self._timestep
        self._timestep = timestep

    def change(self, answer: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        config, prompt = self.config, self.prompt_rows(self.batch)
        u, c, s = (x[:, : self.channels] for x in (answer[self.negative_rows(self.batch)], answer[prompt], extra))
        scale = torch.where(c - s >= config.threshold, 0.0, ((c - s).abs() * config.scale).clamp(max=1.0))
        safety = (s - u) * scale + config.momentum * self.momentum
        self.momentum = config.beta * self.momentum + (1 - config.beta) * safety
        if self.step < self.warmup:
            return answer
        answer = answer.clone()
        answer[prompt, : self.channels] -= safety
        return answer
