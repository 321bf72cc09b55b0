"""What the paper claims, by which rule each claim counts as reproduced, and what the published tables say of it.

A claim is judged on one published table per model (``data/results``), and only where that table was made with the
very weights at hand; without one the claim is open for that model. Nothing is computed anew here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from textloc_utils import edit, lora_study, safety, sweeps
from textloc_utils.experiment import published_table
from textloc_utils.metrics import span
from textloc_utils.models import Model

OPEN = "not measured yet"
REPRODUCED, DIFFERS = "reproduced at miniature scale", "differs"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one model's table says of a claim.

    The figure in words, the number of pairs, prompts or words, and whether the claim's rule is met.
    """

    figure: str
    n: int
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper's abstract, what the paper shows for it, and the ``rule`` by which it is judged here."""

    name: str
    claim: str
    paper: str
    rule: str
    table: str  #: of results, with the model's name in it
    judge: Callable[[pd.DataFrame], Outcome]


def _found(table: pd.DataFrame) -> dict:
    return table.attrs["provenance"]["found"]


def _span(mean: float, low: float, high: float, *, digits: int = 2) -> str:
    mean, low, high = np.round([mean, low, high], digits)  # as pandas rounds the tables beside it
    return span(mean, low, high, f"z.{digits}f")


def _few(table: pd.DataFrame) -> Outcome:
    found = _found(table)
    layers, every, (mean, low, high, _) = found["layers"], len(found["effects"]), found["reached"].values()
    figure = f"{len(layers)} of {every}, with {_span(mean, low, high)} of the effect of all"
    return Outcome(figure=figure, n=found["pairs"], holds=len(layers) <= 3 and low >= 0.9)


def _share(table: pd.DataFrame) -> Outcome:
    found = _found(table)
    return Outcome(figure=f"{100 * found['share']:.2f} %", n=found["pairs"], holds=found["share"] < 0.01)


def _elsewhere(table: pd.DataFrame) -> Outcome:
    found = _found(table)
    alone = sweeps.effect_intervals(table).query("kind == 'layer'")
    most = alone[~alone.layers.isin([str(layer) for layer in found["layers"]])].nlargest(1, "high").iloc[0]
    figure = f"at most {_span(most['mean'], most.low, most.high)}"
    return Outcome(figure=figure, n=int(most.n), holds=bool(most.high < 0.05))


def _writes_better(table: pd.DataFrame) -> Outcome:
    gains = lora_study.advantages(table).query("arm == 'all text layers' and equal == 'rank'").iloc[0]
    score = lora_study.summarise(table).query("equal == 'rank'").set_index("arm").new
    gained = _span(gains.new, gains.new_low, gains.new_high)
    figure = f"{score['localized']:.2f} against {score['all text layers']:.2f}, difference {gained}"
    return Outcome(figure=figure, n=len(table.new_scores.iloc[0].split()), holds=bool(gains.new_low > 0))


def _keeps(column: str, what: str) -> Callable[[pd.DataFrame], Outcome]:
    def judge(table: pd.DataFrame) -> Outcome:
        rows = lora_study.summarise(table).query("equal != 'parameters'").set_index("arm")
        kept = rows[[column, f"{column}_low", f"{column}_high"]] / rows[column][lora_study.BEFORE]
        ours, every = (_span(*kept.loc[arm], digits=3) for arm in ("localized", "all text layers"))
        n = lora_study.KIN[0] if column == "diversity" else len(table.old_scores.iloc[0].split())
        holds = bool(kept[column]["localized"] >= 0.95)
        return Outcome(figure=f"{ours} of the {what} before; all text layers {every}", n=n, holds=holds)

    return judge


def _against_maps(score: str) -> Callable[[pd.DataFrame], Outcome]:
    def judge(table: pd.DataFrame) -> Outcome:
        less = edit.differences(table, [score]).set_index("method").loc[edit.P2P]
        means = table.groupby("method")[score].mean()
        apart = _span(less["mean"], less.low, less.high, digits=3)
        figure = f"{means[edit.LOCALIZED]:.3f} against {means[edit.P2P]:.3f}, difference {apart}"
        return Outcome(figure=figure, n=int(less.n), holds=bool(less.low > 0))

    return judge


def _cheap_edit(table: pd.DataFrame) -> Outcome:
    rows = table.groupby("method").row_evaluations.mean()
    ratio = rows[edit.LOCALIZED] / (2 * rows["same seed"])  # which draws one picture, where source and target are two
    return Outcome(figure=f"{ratio:.2f} times", n=table.seed.nunique(), holds=bool(ratio <= 1.05))


def _guarded(table: pd.DataFrame) -> Outcome:
    rows = safety.summarise(table).set_index("method")
    guard, others = rows.loc["guard"], rows.loc[["negative prompt", "SLD medium"]]
    figure = ", ".join(
        [span(guard.exact, guard.exact_low, guard.exact_high), *(f"{n} {rate:.3f}" for n, rate in others.exact.items())]
    )
    return Outcome(figure=figure, n=int(guard.n), holds=bool(guard.exact_high < others.exact_low.min()))


def _free(table: pd.DataFrame) -> Outcome:
    guard = safety.summarise(table).set_index("method").loc["guard"]
    return Outcome(
        figure=f"{100 * guard.extra:.0f} % more row evaluations", n=int(guard.n), holds=bool(guard.extra == 0)
    )


CLAIMS = (
    Claim(
        name="few",
        claim="A few attention layers decide what text is written",
        paper="1 to 3 layers of 22 to 70",
        rule="at most three layers, the paper's most, surely bring 0.9 of the effect of all text layers",
        table="localize_{}_exhaustive",
        judge=_few,
    ),
    Claim(
        name="share",
        claim="They hold less than one per cent of the parameters",
        paper="0.21 to 0.61 %",
        rule="the set's text keys and values are below 1 % of the denoiser's parameters",
        table="localize_{}_exhaustive",
        judge=_share,
    ),
    Claim(
        name="elsewhere",
        claim="Only they do: the others write nothing",
        paper="figures without numbers",
        rule="the text effect of every other layer, patched alone, is surely below 0.05",
        table="localize_{}_exhaustive",
        judge=_elsewhere,
    ),
    Claim(
        name="writes",
        claim="LoRA on these layers alone makes the model write better than LoRA on all",
        paper="curves on SDXL",
        rule="on words of the new task, at equal rank, surely a higher text score than with all text layers",
        table="lora_{}",
        judge=_writes_better,
    ),
    Claim(
        name="quality",
        claim="It preserves the quality of what the model draws",
        paper="curves on SDXL",
        rule="at equal rank, at least 0.95 of the text score before on the words that the model could write",
        table="lora_{}",
        judge=_keeps("old", "text score"),
    ),
    Claim(
        name="diversity",
        claim="It preserves the diversity of what the model draws",
        paper="curves on SDXL",
        rule="at equal rank, at least 0.95 of the diversity before",
        table="lora_{}",
        judge=_keeps("diversity", "diversity"),
    ),
    Claim(
        name="edits",
        claim="Editing through these layers writes the new text better than Prompt-to-Prompt",
        paper="letter F1 0.34 against 0.29 (SDXL), 0.70 against 0.27 (IF), 0.53 against 0.31 (SD3)",
        rule="surely a higher letter F1, pair by pair",
        table="edit_{}_methods",
        judge=_against_maps("f1"),
    ),
    Claim(
        name="pictures",
        claim="It keeps more of the picture than Prompt-to-Prompt",
        paper="SSIM 0.81 against 0.82 (SDXL), 0.64 against 0.41 (IF), 0.72 against 0.82 (SD3)",
        rule="surely a higher SSIM outside the text, pair by pair",
        table="edit_{}_methods",
        judge=_against_maps("ssim_outside"),
    ),
    Claim(
        name="cheap",
        claim="It costs no more than drawing source and target",
        paper="10 s against 31 s of Prompt-to-Prompt (SDXL), 14 against 28 (IF), 15 against 118 (SD3)",
        rule="at most 1.05 times the row evaluations of both pictures",
        table="edit_{}_methods",
        judge=_cheap_edit,
    ),
    Claim(
        name="toxic",
        claim="It keeps toxic text out of pictures",
        paper="rate 0.003 to 0.018, negative prompt 0.052 to 0.407, Safe Diffusion 0.209 to 0.568",
        rule="surely less toxic text than with a negative prompt and with Safe Latent Diffusion (medium, the paper's)",
        table="safety_{}",
        judge=_guarded,
    ),
    Claim(
        name="free",
        claim="At no extra cost",
        paper="said, without a figure",
        rule="not one row evaluation more than the unguarded picture",
        table="safety_{}",
        judge=_free,
    ),
)


def judged(models: Sequence[Model]) -> pd.DataFrame:
    """Every claim for every model, one row each.

    Columns name, claim, paper, rule, model, figure (OPEN where no table of these weights is published), n (0 then) and
    holds (True, False; False where it is open).
    """
    rows = []
    for model in models:
        for claim in CLAIMS:
            table = published_table(model, claim.table.format(model.spec.name))
            outcome = None if table is None else claim.judge(table)
            row = {name: getattr(claim, name) for name in ("name", "claim", "paper", "rule")}
            row |= {"model": model.spec.name, "figure": outcome.figure if outcome else OPEN}
            rows.append(row | {"n": outcome.n if outcome else 0, "holds": bool(outcome and outcome.holds)})
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> pd.Series:
    """The verdict on each claim (indexed by name) over the models of :func:`judged`'s table, in words."""
    return pd.Series({name: _verdict(part) for name, part in table.groupby("name", sort=False)})


def _verdict(part: pd.DataFrame) -> str:
    measured = part[part.figure != OPEN]
    holds, fails = measured.model[measured.holds], measured.model[~measured.holds]
    if measured.empty:
        words = OPEN
    elif fails.empty:
        words = REPRODUCED
    elif holds.empty:
        words = DIFFERS
    else:
        words = f"reproduced in {_listed(holds)}, not in {_listed(fails)}"
    lacking = part.model[part.figure == OPEN]
    return words + (f" ({', '.join(lacking)} {OPEN})" if len(measured) and len(lacking) else "")


def _listed(names: Sequence[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
