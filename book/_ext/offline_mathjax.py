"""Sphinx extension: serve MathJax from the site itself, so that formulas show without a network.

The files come from the installed package ``sphinx-mathjax-offline``. Its own extension copies all 24 MB;
this one leaves out what neither a page nor a reader's settings in the formulas' menu ask for, such as the
speech of other languages than English.
"""

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx

# One file typesets TeX to HTML; the rest is fetched on demand. The formulas' menu offers another renderer and an
# explorer that speaks: the browser keeps these choices, and without their files would leave bare TeX.
PARTS = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2", "output/svg.js", "output/svg/fonts")
PARTS += ("a11y", "input/mml.js", "input/mml", *(f"sre/mathmaps/{name}.json" for name in ("base", "en", "nemeth")))


def mathjax_folder() -> Path:
    """Folder of the package's MathJax files; the package's name is no Python identifier, so it is looked up."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise ModuleNotFoundError("sphinx-mathjax-offline is not installed; run `make setup`")
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx) -> None:
    """Copy the needed files to ``_static/mathjax`` before the pages are written."""
    if app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir, "_static", "mathjax")
    for part in PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / part, target / part)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx; ``_config.yml`` sets ``mathjax_path`` to the copied file."""
    app.connect("builder-inited", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
