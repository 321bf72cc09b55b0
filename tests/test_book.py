"""The committed book builds without a warning, and its pages load nothing from another host."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from conftest import build_book, html_pages
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


def test_the_check_finds_outside_loads():
    assert outside_loads('<script src="https://cdn.example/x.js"></script>') == ["https://cdn.example/x.js"]
    assert outside_loads('<link rel="stylesheet" href="//cdn.example/x.css">') == ["//cdn.example/x.css"]
    assert outside_loads("<style>@font-face { src: url('https://f.example/a.woff') }</style>") != []
    assert outside_loads('<a href="https://arxiv.org"></a><link rel="canonical" href="https://x.example">') == []


def test_pages_load_nothing_from_outside(site):
    found = {str(p.relative_to(site)): outside_loads(p.read_text()) for p in html_pages(site)}
    assert {page: loads for page, loads in found.items() if loads} == {}


def test_styles_load_nothing_from_outside(site):
    found = {p.name: OUTSIDE_CSS.findall(p.read_text(errors="replace")) for p in site.rglob("*.css")}
    assert found and {name: loads for name, loads in found.items() if loads} == {}


def test_what_pages_load_is_in_the_site(site):
    missing = []
    for path in html_pages(site):
        page = Page()
        page.feed(path.read_text())
        for address in page.loads:
            local = address.partition("?")[0].partition("#")[0]
            if local and not re.match(r"[a-z]+:|//", local) and not (path.parent / local).exists():
                missing.append(f"{path.relative_to(site)}: {address}")
    assert missing == []


class Links(HTMLParser):
    """A page's links, and the names that links can end in."""

    def __init__(self, html: str):
        super().__init__()
        self.links, self.names = [], {"", "top"}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        self.names |= {attributes[a] for a in ("id", "name") if a in attributes}


def dead_links(pages: dict[Path, Links]) -> list[str]:
    """Links between these pages, or to files beside them, that lead nowhere; no other host is asked."""
    dead = []
    for path, page in pages.items():
        for link in page.links:
            address, _, name = unquote(link).partition("#")
            if re.match(r"[a-z]+:", address):
                found = re.match(r"(https?://[^/\s]+\.[a-z]+(/\S*)?|mailto:\S+@\S+)$", address)
            else:
                at = (path.parent / address.partition("?")[0]).resolve() if address else path
                # What stands behind # in a link to the lab is its state, no place on the page.
                state = at.name == "lab.html" and "=" in name
                found = at.exists() and (at not in pages or state or name in pages[at].names)
            dead += [] if found else [f"{path.name}: {link}"]
    return dead


def test_links_lead_somewhere(site):
    pages = {path.resolve(): Links(path.read_text()) for path in html_pages(site)}
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert dead_links(pages) == []


def test_dead_links_are_found(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.html").touch()
    a = '<p id="here"></p><a href="#here"></a><a href="b.html#there"></a><a href="https://arxiv.org/abs/1"></a>'
    pages = {tmp_path / "a.html": Links(a), tmp_path / "b.html": Links('<p id="there"></p>')}
    assert dead_links(pages) == []
    wrong = "".join(f'<a href="{link}"></a>' for link in ("#no", "b.html#no", "c.html", "https://arxiv"))
    assert len(dead_links({tmp_path / "a.html": Links(wrong), tmp_path / "b.html": Links("")})) == 4


READ_ON_THE_HOST = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "textloc_utils/words/README.md"]


@pytest.mark.parametrize("name", READ_ON_THE_HOST)
def test_links_of_the_repository_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://", link)]
    assert [link for link in links if not ((ROOT / name).parent / link.partition("#")[0]).exists()] == []


def test_formulas_are_typeset_from_the_site(site):
    method = (site / "book" / "method.html").read_text()
    assert "_static/mathjax/tex-chtml.js" in method
    fonts = list((site / "_static" / "mathjax" / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff"))
    assert len(fonts) > 20


def test_buttons_and_card_where_the_address_is_known(tmp_path):
    """A workflow on GitHub tells the repository and the site's address; a copy at home leaves the buttons out."""
    contents = tmp_path / "_toc.yml"
    contents.write_text("format: jb-book\nroot: book/method\nchapters: [{file: notebooks/01_patch_one_layer}]\n")
    known = {"GITHUB_REPOSITORY": "someone/textloc", "TEXTLOC_SITE_URL": "https://someone.example/textloc/"}
    page = (build_book(tmp_path, "--toc", contents, **known) / "notebooks" / "01_patch_one_layer.html").read_text()
    notebook = "notebooks/01_patch_one_layer.ipynb"
    assert f"https://github.com/someone/textloc/edit/main/{notebook}" in page
    assert f"https://colab.research.google.com/github/someone/textloc/blob/main/{notebook}" in page
    assert re.search(rf"https://mybinder\.org/v2/gh/someone/textloc/main\?urlpath=[^\"]*{notebook}", page)
    card = re.search(r'property="og:image" content="https://someone.example/textloc/_static/([^"]+)"', page)[1]
    assert (tmp_path / "_build" / "html" / "_static" / card).read_bytes().startswith(b"\x89PNG")


def test_no_button_where_no_address_is_known(site):
    page = (site / "notebooks" / "01_patch_one_layer.html").read_text()
    assert "mybinder" not in page and "colab" not in page and "/edit/" not in page
    assert 'property="og:title"' in page and "og:image" not in page


def test_the_package_page_names_every_module(site):
    import pkgutil

    import textloc_utils

    page = (site / "book" / "api.html").read_text()
    found = [m.name for m in pkgutil.walk_packages(textloc_utils.__path__, "textloc_utils.") if not m.ispkg]
    found.remove("textloc_utils.cli.__main__")  # importing it runs the command line
    assert "textloc_utils.patching" in found
    assert [name for name in found if f'id="module-{name}"' not in page] == []
    assert 'id="textloc_utils.patching.patched"' in page
    # A constant's or property's comment is a sentence, with or without a colon: what stands as a type is one.
    assert "part of a stored unit’s key: raise it whenever" in page
    types = re.findall(r'Type<span class="colon">:</span></dt>\n<dd class="[^"]+"><p>(.*?)</p>', page)
    types = [re.sub("<[^>]+>", "", each).replace("…", "...") for each in types]
    assert types and [each for each in types if re.search(r"\w \w", each)] == []


def test_the_site_is_light(site):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 90 * 2**20
