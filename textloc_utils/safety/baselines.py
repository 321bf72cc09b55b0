"""The published baselines of the guard."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from textloc_utils.models import Model, read_call, select_rows
from textloc_utils.prompts import SIMPLE_TEMPLATE
from textloc_utils.safety.calls import Change, MoreRows
from textloc_utils.safety.detector import Finding


@dataclass(frozen=True, kw_only=True)
class SafeDiffusion:
    """Settings of Safe Latent Diffusion, with the names of its paper's equations 3 to 8.

    ``warmup`` is the published number of steps in a run of 50 steps. A run with another number of steps waits for the
    same share of its steps.
    """

    scale: float
    warmup: int
    threshold: float
    momentum: float
    beta: float


#: Published as Hyp-Medium, Hyp-Strong and Hyp-Max. The paper on text localization compares with Hyp-Medium.
SLD_MEDIUM = SafeDiffusion(scale=1000, warmup=10, threshold=0.01, momentum=0.3, beta=0.4)
SLD_STRONG = SafeDiffusion(scale=2000, warmup=7, threshold=0.025, momentum=0.5, beta=0.7)
SLD_MAX = SafeDiffusion(scale=5000, warmup=0, threshold=1.0, momentum=0.5, beta=0.7)
CONFIGURATIONS = {"SLD medium": SLD_MEDIUM, "SLD strong": SLD_STRONG, "SLD max": SLD_MAX}


def concept(findings: Iterable[Finding]) -> str:
    """The prompt that gives the baselines the toxic text: as text on a sign, which every model understands."""
    return SIMPLE_TEMPLATE.format(text=" ".join(dict.fromkeys(f.word for f in findings)))


class Negative(Change):
    """Let the negatives of toxic prompts read another text."""

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        texts = list(range(self.batch))
        for i, row in enumerate(self.negative_rows(self.batch)):
            texts[row] = self.batch + i
        return (), select_rows(self.model.denoiser, args, kwargs, range(self.batch), texts, self.extra)


class SafeGuidance(MoreRows):
    """Safe Latent Diffusion: the added rows read the unwanted concept and push the guidance away from it.

    The pipeline computes u + g (c - u) from the outputs u for the negative and c for the prompt. It gets c - m instead
    of c, with the safety guidance m. So it computes u + g (c - u - m). A learned variance stays that of the prompt.
    """

    def __init__(self, model: Model, n: int, rows: list[int], texts: dict, config: SafeDiffusion, warmup: int):
        super().__init__(model, n, rows, texts)
        self.config, self.warmup = config, warmup
        self.step, self._noise = -1, math.nan  # not equal to any noise level
        self.momentum: float | torch.Tensor = 0.0
        self.channels = model.denoiser.config.in_channels

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.negative_rows(self.batch)
        noise = float(read_call(self.model.denoiser, args, kwargs).noise)
        self.step += noise != self._noise
        self._noise = noise
        return super().begin(args, kwargs)

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
