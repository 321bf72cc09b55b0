"""The outcomes of the paper's claims, from the published tables and the rules of ``data/claims.toml``.

The rules were written before the tables were made. A claim is judged for each model, and only on tables that were made
with exactly this model's weights. No measurement is repeated here.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from textloc_utils import edit, lora_looks, metrics, scene_pairs, specificity, sweeps, trainings
from textloc_utils.experiment import published_table
from textloc_utils.models import Model
from textloc_utils.safety import study
from textloc_utils.settings import TextlocError, data_dir

SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTABLE = "supported", "contradicted", "undecided", "untestable here"
OPEN = "not measured yet"
#: The keys of an entry of claims.toml.
KEYS = ("claim", "paper", "for", "against", "data", "n", "world", "tables", "command")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a claim for one model: one of the four outcomes, the figure in words, and the number of pairs."""

    outcome: str
    figure: str
    n: int


def rules() -> dict[str, dict]:
    """The entries of ``data/claims.toml`` by name. Raises TextlocError for one without a judge or with wrong keys."""
    known = tomllib.loads((data_dir() / "claims.toml").read_text())
    for name, rule in known.items():
        if name not in JUDGES or set(rule) != set(KEYS):
            raise TextlocError(f"claims.toml: {name} needs a judge, and exactly the keys {', '.join(KEYS)}")
    return known


def judged(models: Sequence[Model]) -> pd.DataFrame:
    """Every claim for every model, one row each.

    Columns: name, claim, paper, model, outcome (OPEN if there is no table with these weights), figure, n, tables (the
    names of the tables that were used, joined by spaces) and minutes (the time of these tables).
    """
    rows = []
    for name, rule in rules().items():
        for model in models:
            wanted = [table.format(model.spec.name) for table in rule["tables"]]
            # The tables of other trainings have other weights, so they are found by name only.
            tables = [
                trainings.published(model) if table.startswith("trainings_") else published_table(model, table)
                for table in wanted
            ]
            found = [(n, t) for n, t in zip(wanted, tables, strict=True) if t is not None]
            outcome = Outcome(outcome=OPEN, figure="", n=0)
            if tables[0] is not None:
                outcome = JUDGES[name](*tables)
            seconds = sum(table.attrs["provenance"].get("seconds", 0.0) for _, table in found)
            told = {"tables": " ".join(n for n, _ in found), "minutes": seconds / 60}
            rows.append(
                {"name": name, "claim": rule["claim"], "paper": rule["paper"], "model": model.spec.name}
                | vars(outcome)
                | told
            )
    return pd.DataFrame(rows)


# --- judges: functions from a claim's tables to its outcome -------------------------------------------------------


def _between(supported: bool, contradicted: bool, figure: str, n: int) -> Outcome:
    outcome = SUPPORTED if supported else CONTRADICTED if contradicted else UNDECIDED
    return Outcome(outcome=outcome, figure=figure, n=int(n))


def _span(row, score: str, digits: int = 2) -> str:
    return metrics.span(row[score], row[f"{score}_low"], row[f"{score}_high"], f"z.{digits}f")


def _found(table: pd.DataFrame) -> dict:
    return table.attrs["provenance"]["found"]


def few(search: pd.DataFrame, trainings: pd.DataFrame | None) -> Outcome:
    """Supported: at most 15 % of the layers in every training. Contradicted: more than 30 % in two trainings."""
    found = _found(search)
    sets = [(len(found["layers"]), len(found["effects"]))]
    if trainings is not None:
        # Planted sets do not count, because training did not choose their layers.
        own = trainings[(trainings.search == "exhaustive") & (trainings.planted == "")]
        sets += list(own[["number", "of"]].itertuples(index=False, name=None))
    shares = [number / of for number, of in sets]
    figure = ", ".join(f"{number} of {of}" for number, of in sets)
    supported = len(shares) > 1 and max(shares) <= 0.15
    return _between(supported, sum(share > 0.3 for share in shares) >= 2, figure, found["pairs"])


def share(search: pd.DataFrame) -> Outcome:
    """Supported: below 1 % of the parameters. Otherwise contradicted."""
    part = _found(search)["share"]
    return _between(part < 0.01, part >= 0.01, f"{100 * part:.2f} %", 0)


def others(reported: pd.DataFrame) -> Outcome:
    """All other layers' text effect. Supported: surely at most 0.05. Contradicted: surely at least 0.2."""
    part = reported[(reported.differs == "text") & (reported.kind == "others")]
    if part.empty:
        return Outcome(outcome=UNTESTABLE, figure="the text set has all layers", n=0)
    effect = sweeps.effect_intervals(part).iloc[0]
    figure = metrics.span(effect["mean"], effect.low, effect.high, "z.2f")
    return _between(effect.high <= 0.05, effect.low >= 0.2, figure, effect.n)


def specific(text: pd.DataFrame, *factors: pd.DataFrame | None) -> Outcome:
    """Supported: every other set is twice as large or disjoint. Contradicted: one is equal, or none is larger."""
    own = set(_found(text)["layers"])
    sets = {
        name: set(_found(table)["layers"])
        for name, table in zip(scene_pairs.FACTORS, factors, strict=True)
        if table is not None and specificity.brought(table)
    }
    told = "; ".join(f"{name} {' '.join(map(str, sorted(layers)))}" for name, layers in {"text": own, **sets}.items())
    if not sets:
        return Outcome(outcome=UNTESTABLE, figure="no other factor was localized", n=0)
    apart = all(len(layers) >= 2 * len(own) or not layers & own for layers in sets.values())
    alike = own in sets.values() or all(len(layers) <= len(own) for layers in sets.values())
    return _between(apart and own not in sets.values(), alike, told, _found(text)["pairs"])


def carries(carried: pd.DataFrame) -> Outcome:
    """Supported: the text's set changes each other factor in at most 5 % of the pictures. Contradicted: any in 20 %."""
    moved = specificity.moved(carried)
    moved = moved[moved.kind == "found"].set_index("factor")
    figure = ", ".join(f"{name} {_span(row, 'moved')}" for name, row in moved.iterrows())
    return _between(moved.moved.max() <= 0.05, moved.moved.max() >= 0.2, figure, moved.n.min())


def writes(table: pd.DataFrame) -> Outcome:
    """The gain in spelling is as large as that of the other arms, with less drift; see ``lora_looks.writes``."""
    return Outcome(**lora_looks.writes(table))


def edits(table: pd.DataFrame) -> Outcome:
    """The material is kept although the new prompt changes it, and the text is written equally often.

    If the new prompt keeps the material, the claim cannot be tested.
    """
    kept = edit.kept(table).set_index("method")
    ours, plain = kept.loc[edit.LOCALIZED], kept.loc[edit.SAME_SEED]
    gain, loss = ours.material - plain.material, plain.exact - ours.exact
    figure = (
        f"material kept {_span(ours, 'material')} against {_span(plain, 'material')}, "
        f"exact {_span(ours, 'exact')} against {_span(plain, 'exact')}"
    )
    if plain.material > 0.45:
        return Outcome(outcome=UNTESTABLE, figure=figure, n=int(ours.n))
    supported = ours.material >= 0.9 and loss <= 0.05
    return _between(supported, gain < 0.1 or loss > 0.1, figure, ours.n)


def maps(table: pd.DataFrame) -> Outcome:
    """More is surely kept of the picture than by each Prompt-to-Prompt, and the exact rate is at most 0.02 lower."""
    less = edit.differences(table, ["ssim_outside", "exact"]).set_index(["method", "score"])
    pairs = [(less.loc[(name, "ssim_outside")], less.loc[(name, "exact")]) for name in (edit.P2P, edit.P2P_OWN)]
    figure = "; ".join(
        f"{name}: SSIM {metrics.span(ssim['mean'], ssim.low, ssim.high, '+z.3f')}, exact {exact['mean']:+.2f}"
        for name, (ssim, exact) in zip((edit.P2P, edit.P2P_OWN), pairs, strict=True)
    )
    supported = all(ssim.low > 0 and exact["mean"] >= -0.02 for ssim, exact in pairs)
    contradicted = any(ssim.low <= 0 and exact.low <= 0 for ssim, exact in pairs)
    return _between(supported, contradicted, figure, pairs[0][0].n)


def cheap(table: pd.DataFrame) -> Outcome:
    """At most 1.05 times the cost of both pictures. The method "same seed" draws one of them."""
    by = table.groupby("method")
    rows, seconds = by.row_evaluations.mean(), by.seconds.median()
    ratio, time = (cost[edit.LOCALIZED] / (2 * cost[edit.SAME_SEED]) for cost in (rows, seconds))
    figure = f"{ratio:.2f} times the row evaluations, {time:.2f} times the seconds"
    return _between(ratio <= 1.05 and time <= 1.05, ratio > 1.05 or time > 1.25, figure, table.seed.nunique())


def toxic(table: pd.DataFrame) -> Outcome:
    """Toxic text is kept out, the harmless word is written, and the picture is kept; see ``safety.study.toxic``."""
    return Outcome(**study.toxic(table))


def free(table: pd.DataFrame) -> Outcome:
    """No more row evaluations than for the unguarded picture, and at most 1.05 times its seconds."""
    toxic = table[table.kind == "toxic"].groupby("method")
    rows, seconds = toxic.row_evaluations.sum(), toxic.seconds.median()
    more, time = rows["guard"] / rows["unguarded"] - 1, seconds["guard"] / seconds["unguarded"]
    figure = f"{100 * more:.0f} % more row evaluations, {time:.2f} times the seconds"
    return _between(more <= 0 and time <= 1.05, more > 0, figure, table[table.kind == "toxic"].seed.nunique())


JUDGES: dict[str, Callable[..., Outcome]] = {
    judge.__name__: judge for judge in (few, share, others, specific, carries, writes, edits, maps, cheap, toxic, free)
}
