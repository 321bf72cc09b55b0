"""Draw the README's picture, book/finding.svg, from the published tables of the exhaustive search.

    .venv/bin/python scripts/readme_picture.py

The file contains the digests of the tables that it shows. So a test finds a picture that is out of date.
"""

import sys
from pathlib import Path

from matplotlib import pyplot as plt

from textloc_utils import metrics
from textloc_utils.book import plots
from textloc_utils.experiment import published_store
from textloc_utils.settings import ROOT

MODELS = ("ldm-mini", "sdxl-mini", "if-mini", "sd3-mini")


def shown() -> str:
    """The tables of the picture and the digests of their descriptions."""
    root = published_store().root
    names = [f"localize_{model}_exhaustive" for model in MODELS]
    digests = [(root / f"{name}.json").read_text().partition('"seal": "')[2][:16] for name in names]
    return ", ".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True))


def main(path: Path) -> None:
    """Draw the picture to a file."""
    effects, chosen = {}, {}
    for model in MODELS:
        table = published_store().load_published(f"localize_{model}_exhaustive")
        alone = metrics.summarise(table[table.kind == "layer"], ["layers"], ["exact"])
        alone = alone.set_axis(["layer", "n", "mean", "low", "high"], axis=1)
        effects[model] = alone.astype({"layer": int})
        chosen[model] = table.attrs["provenance"]["found"]["layers"]
    figure = plots.effects_by_model(effects, chosen, label="whole words")
    plt.rcParams.update({"svg.hashsalt": "textloc"})  # two runs give the same bytes
    figure.savefig(path, metadata={"Date": None, "Description": shown()})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "book" / "finding.svg")
