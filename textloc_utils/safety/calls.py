"""What a guard does to the denoiser's calls."""

import functools

import torch
from torch import nn

from textloc_utils.models import Model, TextLayer, read_call, select_rows, with_answer
from textloc_utils.settings import TextlocError


class _Change:
    """Hooks for one pipeline call of ``n`` rows of prompts, of which ``rows`` are toxic.

    ``extra`` holds one row of text per toxic one (``models.call_rows``).
    """

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict):
        self.model, self.n, self.rows, self.extra = model, n, rows, extra

    def hooks(self) -> list:
        """Register the hooks and return their handles."""
        raise NotImplementedError

    def prompt_rows(self, batch: int) -> list[int]:
        """Where the toxic prompts are in a batch of ``n`` rows, or of 2 n with the negatives first."""
        if batch not in (self.n, 2 * self.n):
            raise TextlocError(f"{self.n} prompts gave the denoiser {batch} rows; known: as many, or twice that")
        return [batch - self.n + row for row in self.rows]

    def negative_rows(self, batch: int) -> list[int]:
        """Where their negatives are; TextlocError without guidance."""
        if batch != 2 * self.n:
            raise TextlocError(
                "this method needs negatives beside the prompts in the denoiser's batch: a guidance scale above 1"
            )
        return self.rows


class _Embedding(_Change):
    """The localized layers are given other texts' embeddings in place of the toxic ones'."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, layers: tuple[int, ...]):
        super().__init__(model, n, rows, extra)
        self.layers = layers
        with torch.no_grad():
            self.text = model.denoiser.process_encoder_hidden_states(
                extra["encoder_hidden_states"], extra.get("added_cond_kwargs")
            )

    def hooks(self) -> list:
        modules = [self.model.denoiser.get_submodule(self.model.layers[i].name) for i in self.layers]
        return [m.register_forward_pre_hook(self._swap, with_kwargs=True) for m in modules]

    def _swap(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        text = kwargs["encoder_hidden_states"].clone()
        text[self.prompt_rows(len(text))] = self.text
        return args, kwargs | {"encoder_hidden_states": text}


class _MoreRows(_Change):
    """Each toxic prompt's noisy picture once more, beside another text, at the end of the denoiser's batch."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict):
        super().__init__(model, n, rows, extra)
        self.batch, self.active, self.timestep = 0, False, None
        self._first: tuple | None = None

    def hooks(self) -> list:
        denoiser = self.model.denoiser
        # Ahead of the hooks that count rows.
        return [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(self._after),
        ]

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = read_call(denoiser, args, kwargs)
        self.batch, text = call.rows, kwargs["encoder_hidden_states"]
        self._first = self._first or (call.rows, text)
        # FLUX asks for negatives in a call of their own: as many rows as the prompts', with another text.
        self.active = not (call.rows == self._first[0] == self.n and text is not self._first[1])
        if not self.active:
            return None
        self.begin(call)
        pictures = [*range(call.rows), *self.prompt_rows(call.rows)]
        texts = range(call.rows + len(self.rows))
        return (), select_rows(denoiser, args, kwargs, pictures, texts, self.extra)

    def _after(self, denoiser: nn.Module, args: tuple, output):
        if not self.active:
            return None
        answer = output[0]
        return with_answer(output, self.change(answer[: self.batch], answer[self.batch :]))

    def begin(self, call) -> None:
        """Called before each denoiser call (``models.DenoiserCall``)."""

    def change(self, answer: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """The answer that the pipeline gets, from the answers to its own rows and to the rows added."""
        return answer


class _Lent(_MoreRows):
    """The added rows lend their text keys and values to the toxic prompts in the localized layers."""

    def __init__(self, model: Model, n: int, rows: list[int], extra: dict, layers: tuple[int, ...]):
        super().__init__(model, n, rows, extra)
        self.layers, self.tokens = layers, 0

    def begin(self, call) -> None:
        self.tokens = call.tokens

    def hooks(self) -> list:
        handles = super().hooks()
        for layer in (self.model.layers[i] for i in self.layers):
            for name in (layer.key, layer.value):
                module = self.model.denoiser.get_submodule(name)
                handles.append(module.register_forward_hook(functools.partial(self._lend, layer)))
        return handles

    def _lend(self, layer: TextLayer, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self.active:
            return None
        tokens = slice(None if layer.context is None else self.tokens)
        lent = output.clone()
        lent[self.prompt_rows(self.batch), tokens] = output[self.batch :, tokens]
        return lent
