"""Sphinx extension: the directive ``lab``, which lets a reader's browser run the miniatures with patched layers.

What the lab loads is exported by ``textloc_utils.book.lab`` where it changed, and copied into the site. The page itself
holds only what its controls need.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from textloc_utils import prompts
from textloc_utils.book import lab

FOLDER = "_static/lab"
PICTURES = ("source", "patched", "target")
#: What the page tells of a miniature; all else is loaded with it.
TOLD = ("height", "width", "steps", "seeds", "layers", "pooled", "known", "prompts")
WORDS = 40  #: words that the inputs offer


def known(runtime: int, models: dict[str, dict]) -> dict:
    """What the page's controls need; ``runtime`` is the size of what all models share, in bytes."""
    pair = prompts.make_pairs(1)[0]
    return {
        "runtime": runtime,
        "pair": [pair.source_text, pair.target_text],
        "words": prompts.test_words()[:WORDS],
        "models": {
            name: {key: about[key] for key in TOLD} | {"bytes": sum(about["bytes"].values())}
            for name, about in models.items()
        },
    }


def markup(data: dict, up: str) -> str:
    """The lab's HTML; ``up`` leads from the page to the site's root."""
    figures = "".join(
        f'<figure class="lab-{name}"><canvas class="pixels" width="128" height="64" role="img"></canvas>'
        f'<figcaption><strong>{name.capitalize()}</strong> <span class="lab-read"></span> '
        f'<a hidden>Download<span class="visually-hidden"> the {name} picture</span></a></figcaption></figure>'
        for name in PICTURES
    )
    word = 'type="text" list="lab-words" autocomplete="off" autocapitalize="characters" spellcheck="false" size="8"'
    text = json.dumps({"root": up} | data, ensure_ascii=False).replace("</", "<\\/")
    return f"""
<div class="lab" id="lab" role="group" aria-label="Lab">
<noscript><p>The lab needs JavaScript. The <a href="explorer.html">layer explorer</a> tells where its pictures are.</p>
</noscript>
<p class="lab-note" id="lab-note" role="alert" hidden>The lab cannot run here. <span id="lab-reason"></span>
The <a href="explorer.html">layer explorer</a> shows stored pictures on every device.</p>
<form id="lab-form" novalidate>
<div class="explorer-controls">
<label>Model <select id="lab-model"></select></label>
<label>Source <input id="lab-source" {word}></label>
<label>Target <input id="lab-target" {word}></label>
<datalist id="lab-words"></datalist>
<label>Seed <select id="lab-seed"></select></label>
</div>
<div class="explorer-controls" id="lab-factors" role="group" aria-label="What both prompts name besides"></div>
<p class="explorer-prompt" id="lab-prompt"></p>
<fieldset><legend>Patched: here the source's run reads the target's prompt</legend>
<div class="lab-layers" id="lab-layers" role="group" aria-label="Layers"></div>
<div class="lab-sets" role="group" aria-label="Sets of layers">
<button type="button" id="lab-known">localized</button> <button type="button" id="lab-all">all</button>
<button type="button" id="lab-none">none</button> <button type="button" id="lab-invert">invert</button></div>
<div class="explorer-controls"><label class="explorer-slider">From step
<input type="range" id="lab-start" min="0" value="0">
<span id="lab-steps"></span></label></div>
</fieldset>
<div class="lab-buttons">
<button type="submit" class="lab-main" id="lab-draw">Draw</button>
<button type="button" id="lab-find">Find the layer</button> <button type="button" id="lab-stop">Stop</button>
<button type="button" id="lab-copy">Copy link</button></div>
</form>
<progress id="lab-progress" max="1" value="0" aria-label="Progress" hidden></progress>
<p class="explorer-status" id="lab-status" role="status"></p>
<div class="explorer-pictures">{figures}</div>
<div id="lab-found" hidden>
<div class="explorer-bars" id="lab-bars" aria-hidden="true"></div>
<p class="explorer-legend" aria-hidden="true"><span class="explorer-key target"></span> target score
<span class="explorer-key source"></span> source score, by patched place; choose one</p>
<div class="explorer-table" role="region" aria-label="Each place patched alone" tabindex="0">
<table class="table"><thead><tr><th scope="col">patched</th><th scope="col">reads</th>
<th scope="col">target score</th><th scope="col">source score</th></tr></thead>
<tbody id="lab-rows"></tbody></table></div>
</div>
</div>
<script type="application/json" id="lab-data">{text}</script>
<script src="{up}{FOLDER}/lab.js"></script>
"""


class Lab(SphinxDirective):
    """``{lab}``: the lab, over every miniature that it can run."""

    def run(self) -> list[nodes.Node]:
        data = known(self.env.app.lab_runtime, self.env.app.lab_models)
        return [nodes.raw("", markup(data, "../" * self.env.docname.count("/")), format="html")]


def prepare(app: Sphinx) -> None:
    """Export what changed, and copy the lab's files to the site before the pages are written."""
    say = logging.getLogger(__name__).info
    app.lab_models = lab.build(say)
    app.lab_runtime = lab.publish(Path(app.outdir, FOLDER)) if app.builder.format == "html" else 0


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_directive("lab", Lab)
    app.connect("builder-inited", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
