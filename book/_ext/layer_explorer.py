"""Sphinx extension: the directive ``explorer``, which shows the stored pictures and tables of ``textloc explore``.

The page holds the tables itself, so that it also works where a browser opens it as a file. Pictures are copied into the
site; ``explorer.js`` shows the chosen ones.
"""

import html
import json
import shutil
from pathlib import Path

import pandas as pd
from docutils import nodes
from PIL import Image, ImageDraw, ImageFont
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from textloc_utils.book import explorer

FOLDER = "_static/explorer"
CARD_SIZE = (1200, 630)
PICTURES = ("source", "patched", "target")


def tables() -> dict[str, pd.DataFrame]:
    """The stored tables by model."""
    store = explorer.store()
    return {path.stem: store.load_published(path.stem) for path in sorted(store.root.glob("*.csv"))}


def told(model: str, table: pd.DataFrame) -> dict:
    """What the page knows of a model: its pairs, and for each the rows of its pictures, in the order of the file."""
    pairs = []
    for seed, rows in table.groupby("seed", sort=False):
        first = rows.iloc[0]
        scores = rows[["target_score", "source_score", "ssim_outside"]].map("{:.2f}".format)
        pairs.append(
            {
                "file": f"{FOLDER}/{explorer.sprite_path(model, seed).name}",
                "source": first.source_text,
                "target": first.target_text,
                "prompt": first.prompt,
                "rows": pd.concat([rows[["site", "read"]], scores, rows.kind], axis=1).to_numpy().tolist(),
            }
        )
    about = table.attrs["provenance"]
    return {"height": about["height"], "width": about["width"], "pairs": pairs}


def markup(known: dict[str, dict], up: str) -> str:
    """The explorer's HTML; ``up`` leads from the page to the site's root."""
    models = "".join(f"<option>{html.escape(name)}</option>" for name in known)
    figures = "".join(
        f'<figure class="explorer-{name}"><div class="explorer-picture pixels" role="img" aria-label="{name}"></div>'
        f'<figcaption><span>{name.capitalize()}</span> <span class="explorer-read"></span></figcaption></figure>'
        for name in PICTURES
    )
    rows = "".join(f'<tr><th scope="row">{name}</th>{"<td></td>" * 4}</tr>' for name in PICTURES)
    data = json.dumps({"root": up, "models": known}, ensure_ascii=False).replace("</", "<\\/")
    return f"""
<div class="explorer" id="layer-explorer" role="group" aria-label="Layer explorer">
<noscript><p>The explorer needs JavaScript. What it shows is in <code>data/results/explorer</code>.</p></noscript>
<div class="explorer-controls">
<label>Model <select id="explorer-model">{models}</select></label>
<label>Pair <select id="explorer-pair"></select></label>
<label class="explorer-slider">Patched <input type="range" id="explorer-site" min="0" max="0" value="0"></label>
</div>
<p class="explorer-prompt"></p>
<p class="explorer-status" role="status"></p>
<div class="explorer-pictures">{figures}</div>
<div class="explorer-bars" aria-hidden="true"></div>
<p class="explorer-legend" aria-hidden="true"><span class="explorer-key target"></span> target score
<span class="explorer-key source"></span> source score, by patched site; choose one</p>
<div class="explorer-table" role="region" aria-label="Readings and scores" tabindex="0">
<table class="table"><thead><tr><th scope="col">picture</th><th scope="col">OCR reads</th>
<th scope="col">target score</th><th scope="col">source score</th>
<th scope="col">SSIM outside the text</th></tr></thead><tbody>{rows}</tbody></table></div>
</div>
<script type="application/json" id="explorer-data">{data}</script>
<script src="{up}_static/explorer.js"></script>
"""


class Explorer(SphinxDirective):
    """``{explorer}``: the layer explorer, over every model with stored pictures."""

    def run(self) -> list[nodes.Node]:
        known = {model: told(model, table) for model, table in tables().items()}
        if not known:
            raise self.error(f"no tables in {explorer.store().root}; textloc explore MODEL writes them")
        for path in explorer.store().root.iterdir():
            self.env.note_dependency(str(path))
        return [nodes.raw("", markup(known, "../" * self.env.docname.count("/")), format="html")]


def copy_pictures(app: Sphinx) -> None:
    """Copy the stored pictures to the site before the pages are written."""
    if app.builder.format != "html":
        return
    target = Path(app.outdir, FOLDER)
    target.mkdir(parents=True, exist_ok=True)
    for path in explorer.store().root.glob(f"*{explorer.SUFFIX}"):
        shutil.copyfile(path, target / path.name)


def draw_card(app: Sphinx) -> None:
    """The site's social card: a source's picture and what one patched layer makes of it, from the stored pictures."""
    if app.builder.format != "html":
        return
    known = tables()
    rows = pd.concat(known.values())
    told_well = rows[(rows.kind == "layer") & (rows.read == rows.target_text)]
    if told_well.empty:  # no single layer brings a whole word in any stored pair: no picture to show
        return
    best = told_well.iloc[0]
    table = known[best.model]
    rows = table[table.seed == best.seed].reset_index(drop=True)
    height = table.attrs["provenance"]["height"]
    sheet = Image.open(explorer.sprite_path(best.model, best.seed)).convert("RGB")
    card = Image.new("RGB", CARD_SIZE, "white")
    pen = ImageDraw.Draw(card)
    pen.text((600, 110), app.config.html_title, fill="#222", anchor="mm", font=ImageFont.load_default(50))
    for left, row, said in ((30, 0, best.source_text), (610, rows.index[rows.site == best.site][0], best.read)):
        picture = sheet.crop((0, row * height, sheet.width, (row + 1) * height))
        card.paste(picture.resize((560, 280), Image.Resampling.NEAREST), (left, 210))
        caption = f"the prompt says {said}" if row == 0 else f"{best.site} reads {said}"
        pen.text((left + 280, 530), caption, fill="#222", anchor="mm", font=ImageFont.load_default(34))
    card.save(Path(app.outdir, "_static", "social_card.png"), optimize=True)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_directive("explorer", Explorer)
    app.connect("builder-inited", copy_pictures)
    app.connect("builder-inited", draw_card)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
