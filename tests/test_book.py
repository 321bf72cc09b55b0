"""The committed book builds without a warning, and its pages load nothing from another host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from textloc_utils.settings import ROOT

# Elements whose address a browser fetches on loading the page; a link to click is no load.
LOADING = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
}
# Relations of <link> that name a place without fetching it.
NAMING = {"canonical", "author", "license", "next", "prev", "search", "index", "alternate"}
OUTSIDE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
OUTSIDE_CSS = re.compile(r"""(?:url\(|@import)\s*['"]?\s*(?:https?:)?//[^'")\s]*""", re.IGNORECASE)


class Page(HTMLParser):
    """Collects what a page fetches on loading, what it says in inline styles, and the text of its body."""

    def __init__(self):
        super().__init__()
        self.loads, self.styles, self.in_style = [], "", False

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.in_style = tag == "style"
        self.styles += attributes.get("style", "")
        if tag == "link" and set(attributes.get("rel", "").split()) <= NAMING:
            return
        self.loads += [attributes[a] for a in LOADING.get(tag, ()) if a in attributes]

    def handle_data(self, data):
        if self.in_style:
            self.styles += data


def outside_loads(html: str) -> list[str]:
    """Addresses on other hosts that a browser would fetch for this page."""
    page = Page()
    page.feed(html)
    return [a for a in page.loads if OUTSIDE.match(a.strip())] + OUTSIDE_CSS.findall(page.styles)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The book as committed, built anew from the executed notebooks."""
    out = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "--path-output", out]
    built = subprocess.run([*command, "--all", "-W", "-n", "--keep-going"], cwd=out, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return out / "_build" / "html"


def test_the_check_finds_outside_loads():
    assert outside_loads('<script src="https://cdn.example/x.js"></script>') == ["https://cdn.example/x.js"]
    assert outside_loads('<link rel="stylesheet" href="//cdn.example/x.css">') == ["//cdn.example/x.css"]
    assert outside_loads("<style>@font-face { src: url('https://f.example/a.woff') }</style>") != []
    assert outside_loads('<a href="https://arxiv.org"></a><link rel="canonical" href="https://x.example">') == []


def pages(site: Path) -> list[Path]:
    """All pages; what lies below ``_static`` in HTML is the theme's templates."""
    found = [p for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts]
    assert site / "book" / "method.html" in found
    return found


def test_pages_load_nothing_from_outside(site):
    found = {str(p.relative_to(site)): outside_loads(p.read_text()) for p in pages(site)}
    assert {page: loads for page, loads in found.items() if loads} == {}


def test_styles_load_nothing_from_outside(site):
    found = {p.name: OUTSIDE_CSS.findall(p.read_text(errors="replace")) for p in site.rglob("*.css")}
    assert found and {name: loads for name, loads in found.items() if loads} == {}


def test_what_pages_load_is_in_the_site(site):
    missing = []
    for path in pages(site):
        page = Page()
        page.feed(path.read_text())
        for address in page.loads:
            local = address.partition("?")[0].partition("#")[0]
            if local and not re.match(r"[a-z]+:|//", local) and not (path.parent / local).exists():
                missing.append(f"{path.relative_to(site)}: {address}")
    assert missing == []


def test_formulas_are_typeset_from_the_site(site):
    method = (site / "book" / "method.html").read_text()
    assert "_static/mathjax/tex-chtml.js" in method
    fonts = list((site / "_static" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))
    assert len(fonts) > 20
