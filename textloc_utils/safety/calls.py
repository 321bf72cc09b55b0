"""The changes that a guard makes to the denoiser's calls, and the checks of these changes.

A change checks three things in a pipeline call. First, which rows of the denoiser's batch belong to the toxic prompts.
It compares their texts, and does not rely on their positions alone. Second, which modules take part
(``patching.Fired``). Third, that the sampler takes no step without the change. If a check fails, an error is raised,
and the pipeline returns no picture.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from textloc_utils.models import Model, call_rows, check_hookable, read_call, select_rows, take_rows, with_answer
from textloc_utils.patching import Batch, Fired, Patch, check_patches, copy_hooks, patch_sites
from textloc_utils.settings import TextlocError

#: A row's text counts as a prompt's text if its distance is below NEARER times the distance of the prompt's text to its
#: replacement, or below ROUNDED times the norm of the prompt's text. Encoders round differently in different batches.
NEARER, ROUNDED = 0.25, 0.02


class Change:
    """The hooks for one pipeline call with ``n`` rows of prompts, of which ``rows`` are toxic.

    ``texts`` holds the texts of these rows and then, in the same order, their replacements (``models.call_rows``).
    """

    def __init__(self, model: Model, n: int, rows: list[int], texts: dict, layers: tuple[int, ...] = ()):
        self.model, self.n, self.rows, self.layers = model, n, rows, layers
        k = len(rows)
        self.own, self.extra = (take_rows(texts, part, 2 * k) for part in (range(k), range(k, 2 * k)))
        self.batch, self.active = 0, False
        self.fired = Fired({name: {(0, None)} for name in self.sites()})
        self._known: list[tuple[object, int | None, bool]] = []
        self._changed = self._stepped = False

    def sites(self) -> list[str]:
        """Dotted names of the modules that must take part in every denoiser call for the prompts."""
        return []

    def hooks(self) -> list:
        """Register the hooks inside the denoiser and return their handles."""
        return []

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Return the new arguments of a denoiser call. This method runs before each denoiser call for the prompts."""

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Keep the hooks in place. Raises TextlocError if a module took no part, or if a step was not changed."""
        denoiser, scheduler, handles = self.model.denoiser, self.model.pipe.scheduler, []
        check_hookable(denoiser)
        taken, own = scheduler.step, vars(scheduler).get("step")

        @functools.wraps(taken)
        def step(*args, **kwargs):
            if not self._changed:
                raise TextlocError("a step was taken without the guarded denoiser; no picture is returned")
            self._changed, self._stepped = False, True
            return taken(*args, **kwargs)

        try:
            # This hook runs before those that count rows.
            handles.append(denoiser.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
            handles += self.fired.watch(denoiser) + self.hooks()
            handles.append(denoiser.register_forward_hook(self._end))
            scheduler.step = step
            yield
            self.fired.close()
            if not self._stepped:
                raise TextlocError("the pipeline took no step of its scheduler; no picture is returned")
        finally:
            for handle in handles:
                handle.remove()
            del scheduler.step
            if own is not None:
                scheduler.step = own

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.batch = read_call(denoiser, args, kwargs).rows
        self.active = self._asks(call_rows(denoiser, args, kwargs)[self.model.architecture.text])
        self.fired.clock.step = 0 if self.active else -1  # no module must take part in a call with only negatives
        return self.begin(args, kwargs) if self.active else None

    def _end(self, denoiser: nn.Module, args: tuple, output) -> None:
        self._changed |= self.active

    def _asks(self, text: torch.Tensor | list[torch.Tensor]) -> bool:
        """Whether the rows of a call have the texts of the prompts, and not only those of the negatives."""
        version = getattr(text, "_version", None)
        for known, then, answer in self._known:
            if known is text and version == then:
                return answer
        mine, other = (part[self.model.architecture.text] for part in (self.own, self.extra))
        alike = all(_same(text[at], mine[i], other[i]) for i, at in enumerate(self.prompt_rows(self.batch)))
        # In a batch that is twice as large without guidance, all rows are prompts.
        beside = self.negative_rows(self.batch) if self.batch == 2 * self.n else []
        if any(_same(text[at], mine[i], other[i]) for i, at in enumerate(beside)):
            raise TextlocError("toxic prompts are in the rows of the negatives; no picture is returned")
        # Some pipelines have a separate call for the negatives.
        if not alike and (self.model.doubled or not self._known):
            raise TextlocError("the denoiser's rows are not those of the prompts; no picture is returned")
        self._known = [*self._known[-3:], (text, version, alike)]
        return alike

    def prompt_rows(self, batch: int) -> list[int]:
        """Positions of the toxic prompts in a batch of ``n`` rows, or of 2 n rows with negatives."""
        if batch != self.n and not (self.model.doubled and batch == 2 * self.n):
            known = "allowed: the same number, or twice as many" if self.model.doubled else "allowed: the same number"
            raise TextlocError(f"{self.n} prompts gave the denoiser {batch} rows; {known}")
        first = 0 if self.model.architecture.rows == "prompts first" else batch - self.n
        return [first + row for row in self.rows]

    def negative_rows(self, batch: int) -> list[int]:
        """Positions of the toxic prompts' negatives. Raises TextlocError without guidance."""
        if batch != 2 * self.n:
            raise TextlocError(
                "this method needs negatives in the same denoiser batch as the prompts: use a guidance scale above 1"
            )
        return [(row + self.n) % batch for row in self.prompt_rows(batch)]


def _same(text: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a row has the expected text. Padding that goes beyond the shortest text is not compared."""
    tokens = min(len(text), len(own), len(other))
    text, own, other = (x[:tokens].float() for x in (text, own, other))
    limit = torch.maximum(NEARER * torch.dist(own, other), ROUNDED * own.norm())
    return bool(torch.dist(text, own) <= limit)


class Embedding(Change):
    """Give the localized layers the embeddings of the cleaned texts instead of those of the toxic texts."""

    def __init__(self, model: Model, n: int, rows: list[int], texts: dict, layers: tuple[int, ...]):
        super().__init__(model, n, rows, texts, layers)
        with torch.no_grad():
            self.text = model.denoiser.process_encoder_hidden_states(
                self.extra["encoder_hidden_states"], self.extra.get("added_cond_kwargs")
            )

    def sites(self) -> list[str]:
        return [self.model.layers[i].name for i in self.layers]

    def hooks(self) -> list:
        return [
            self.model.denoiser.get_submodule(name).register_forward_pre_hook(
                functools.partial(self._swap, name), with_kwargs=True
            )
            for name in self.sites()
        ]

    def _swap(self, name: str, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        text = kwargs.get("encoder_hidden_states")
        if not isinstance(text, torch.Tensor) or len(text) != self.batch or text.shape[1:] != self.text.shape[1:]:
            raise TextlocError(f"{name} does not get only the prompts' text; no picture is returned")
        text = text.clone()
        text[self.prompt_rows(self.batch)] = self.text
        self.fired.note(name, len(self.rows))
        return args, kwargs | {"encoder_hidden_states": text}


class MoreRows(Change):
    """Add one row per toxic prompt to the denoiser's batch, with the same noisy picture and another text."""

    def hooks(self) -> list:
        return [self.model.denoiser.register_forward_hook(self._after)]

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        denoiser, name = self.model.denoiser, self.model.architecture.text
        texts = [part[name] for part in (call_rows(denoiser, args, kwargs), self.extra)]
        if isinstance(texts[0], torch.Tensor) and texts[0].shape[1:] != texts[1].shape[1:]:
            raise TextlocError("the cleaned prompt has a different number of tokens; no picture is returned")
        pictures = [*range(self.batch), *self.prompt_rows(self.batch)]
        return (), select_rows(denoiser, args, kwargs, pictures, range(len(pictures)), self.extra)

    def _after(self, denoiser: nn.Module, args: tuple, output):
        if not self.active:
            return None
        answer = output[0]
        return with_answer(output, self.change(answer[: self.batch], answer[self.batch :]))

    def change(self, answer: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """The output that the pipeline gets, from the outputs for its own rows and for the added rows."""
        return answer


class Lent(MoreRows):
    """In the localized layers, the toxic prompts take the text keys and values of the added rows."""

    def __init__(self, model: Model, n: int, rows: list[int], texts: dict, layers: tuple[int, ...]):
        patches = tuple(Patch(source=row, target=n + i, layers=layers) for i, row in enumerate(rows))
        check_patches(model, patches, n + len(rows))
        self.places = patch_sites(model, patches)
        super().__init__(model, n, rows, texts, layers)
        self.rows_of = _Rows(self, patches)

    def sites(self) -> list[str]:
        return [*self.places]

    def hooks(self) -> list:
        return super().hooks() + copy_hooks(self.model, self.places, self.rows_of)


class _Rows(Batch):
    """Rows 0 to n - 1 are the prompts, at any position in the batch. Rows from n on are the added rows."""

    def __init__(self, change: Change, patches: tuple[Patch, ...]):
        super().__init__(change.model, patches, change.n, change.fired)
        self.change = change

    def check(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.change.active:
            call = read_call(denoiser, args, kwargs)
            self.picture_tokens, self.rows = call.picture_tokens, call.rows
            self.check_size(call.rows)
            lengths = call.lengths
            for pair in self.pairs:
                source, target = self.index(pair, call.rows, torch.device("cpu"))
                if lengths is not None and lengths[source] != lengths[target]:
                    raise TextlocError(
                        "the cleaned prompt has a different length, and this model's picture depends on the length; "
                        "use toxic text with the same number of tokens, or the method prompt swap"
                    )

    def check_size(self, batch: int) -> None:
        wanted = self.change.batch + len(self.change.rows)
        if batch != wanted:
            raise TextlocError(f"the guarded denoiser has {wanted} rows, but a module gave {batch}")

    def index(self, rows: Iterable[int], batch: int, device: torch.device) -> torch.Tensor:
        change = self.change
        first = change.prompt_rows(change.batch)[0] - change.rows[0]
        return torch.tensor([first + r if r < change.n else change.batch + r - change.n for r in rows], device=device)
