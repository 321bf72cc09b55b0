"""A guard's changes of a denoiser's calls, one rule at a time: which rows are whose, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from textloc_utils.patching import Fired
from textloc_utils.safety import calls
from textloc_utils.settings import TextlocError

TOKENS, WIDTH = 5, 4
OWN, EXTRA, NEGATIVE, OTHER = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).unbind()


def model(rows="doubled", **denoiser):
    architecture = SimpleNamespace(rows=rows, text="encoder_hidden_states")
    doubled = rows in ("doubled", "prompts first")
    layers = [SimpleNamespace(name="first"), SimpleNamespace(name="second")]
    return SimpleNamespace(
        architecture=architecture, doubled=doubled, layers=layers, denoiser=SimpleNamespace(**denoiser)
    )


def change(kind=calls.Change, of=None, n=2, rows=(1,), **more):
    texts = {"encoder_hidden_states": torch.stack([OWN] * len(rows) + [EXTRA] * len(rows)), **more}
    made = (
        kind(of or model(), n, list(rows), texts, (1,))
        if kind is not calls.Change
        else kind(of or model(), n, list(rows), texts)
    )
    made.batch = 2 * n
    return made


def test_rows_of_prompts_and_of_their_negatives():
    last, first = change(), change(of=model("prompts first"))
    assert last.prompt_rows(4) == [3] and last.negative_rows(4) == [1] and last.prompt_rows(2) == [1]
    assert first.prompt_rows(4) == [1] and first.negative_rows(4) == [3] and first.prompt_rows(2) == [1]
    message = "^2 prompts gave the denoiser 3 rows; allowed: the same number, or twice as many$"
    with pytest.raises(TextlocError, match=message):
        last.prompt_rows(3)
    with pytest.raises(TextlocError, match="^2 prompts gave the denoiser 4 rows; allowed: the same number$"):
        change(of=model("own call")).prompt_rows(4)
    with pytest.raises(TextlocError, match="needs negatives in the same denoiser batch"):
        last.negative_rows(2)


def test_prompts_are_told_by_their_text():
    asked = change()
    assert asked._asks(torch.stack([NEGATIVE, NEGATIVE, OTHER, OWN]))
    with pytest.raises(TextlocError, match="rows are not those of the prompts"):
        change()._asks(torch.stack([NEGATIVE, NEGATIVE, OWN, OTHER]))
    with pytest.raises(TextlocError, match="toxic prompts are in the rows of the negatives"):
        change()._asks(torch.stack([NEGATIVE, OWN, OTHER, OWN]))
    alone = change()
    alone.batch = 2  # without guidance there are no negatives to look at
    assert alone._asks(torch.stack([OTHER, OWN]))


def test_a_call_for_negatives_alone_is_told_from_one_for_prompts():
    apart = change(of=model("own call"))
    apart.batch = 2
    with pytest.raises(TextlocError, match="rows are not those of the prompts"):
        apart._asks(torch.stack([NEGATIVE, NEGATIVE]))  # the prompts' call comes first
    assert apart._asks(torch.stack([OTHER, OWN])) and not apart._asks(torch.stack([NEGATIVE, NEGATIVE]))


def test_padding_beyond_the_shorter_text_counts_for_nothing():
    padding = 9 * torch.ones(2, WIDTH)
    assert calls._same(torch.cat([OWN, padding]), OWN, EXTRA)
    assert calls._same(OWN, torch.cat([OWN, padding]), torch.cat([EXTRA, padding[:1]]))
    assert not calls._same(torch.cat([EXTRA, padding]), OWN, EXTRA)
    assert calls._same(OWN + 0.01, OWN, EXTRA) and not calls._same(0.5 * (OWN + EXTRA), OWN, EXTRA)


def test_other_embeddings_are_made_with_all_that_comes_beside_the_text():
    asked = []

    def process(text, beside):
        asked.append((text, beside))
        return 2 * text

    beside = {"image_embeds": torch.arange(4.0)[:, None]}
    made = change(calls.Embedding, model(process_encoder_hidden_states=process), rows=(0, 1), added_cond_kwargs=beside)
    ((text, told),) = asked
    assert torch.equal(text, torch.stack([EXTRA, EXTRA])) and torch.equal(
        told["image_embeds"], torch.tensor([[2.0], [3]])
    )
    noted = []
    made.fired.note = lambda name, rows: noted.append((name, rows))
    batch = torch.stack([NEGATIVE, NEGATIVE, OWN, OWN])
    _, given = made._swap("second", None, (), {"encoder_hidden_states": batch, "scale": 1})
    assert torch.equal(given["encoder_hidden_states"], torch.stack([NEGATIVE, NEGATIVE, 2 * EXTRA, 2 * EXTRA]))
    assert noted == [("second", 2)] and given["scale"] == 1 and torch.equal(batch[2], OWN)
    for wrong in (batch[:3], batch[:, :4], None):
        with pytest.raises(TextlocError, match="second does not get only the prompts' text"):
            made._swap("second", None, (), {"encoder_hidden_states": wrong})


def test_a_cleaned_prompt_of_another_length_is_refused(monkeypatch):
    made = change(calls.MoreRows)
    held = {"encoder_hidden_states": torch.stack([NEGATIVE, NEGATIVE, OTHER, OWN])}
    monkeypatch.setattr(calls, "call_rows", lambda *a: held)
    monkeypatch.setattr(calls, "select_rows", lambda *a: {"pictures": a[3], "rows": list(a[4])})
    assert made.begin((), {}) == ((), {"pictures": [0, 1, 2, 3, 3], "rows": [0, 1, 2, 3, 4]})
    held["encoder_hidden_states"] = held["encoder_hidden_states"][:, :3]
    with pytest.raises(TextlocError, match="a different number of tokens"):
        made.begin((), {})


def test_lengths_of_lent_rows_are_compared(monkeypatch):
    made = change()
    made.active, made.fired = True, Fired({})
    rows = calls._Rows(made, ())
    rows.pairs = {(1, 2)}  # the second prompt, row 3 of the batch, and the row that was added, row 4
    call = SimpleNamespace(picture_tokens=16, rows=5)
    monkeypatch.setattr(calls, "read_call", lambda *a: call)
    for lengths in (None, [7, 7, 7, 5, 5], torch.tensor([7, 7, 7, 5, 5])):
        call.lengths = lengths
        rows.check(None, (), {})
    assert rows.index((0, 1, 2), 5, torch.device("cpu")).tolist() == [2, 3, 4]
    call.lengths = [7, 7, 7, 5, 6]
    with pytest.raises(TextlocError, match="the cleaned prompt has a different length"):
        rows.check(None, (), {})
    call.rows = 6
    with pytest.raises(TextlocError, match="the guarded denoiser has 5 rows, but a module gave 6"):
        rows.check(None, (), {})
    made.active = False
    rows.check(None, (), {})
