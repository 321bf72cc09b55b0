"""Sphinx extension: what the site needs besides its pages.

Buttons that lead to the repository where its address is known, a social card, an API page that lists the package's
modules by itself, a page on compute that is filled from what was recorded, the version below each page, and pages
without the parts of the theme that this book does not use or that fail an accessibility check.
"""

import html
import os
import pkgutil
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

import textloc_utils
from textloc_utils.book import compute

API_PAGE, MODULES = "book/api", "<!-- modules -->"
COMPUTE_PAGE = "book/compute"
CARD = "social_card.png"
MATH = re.compile(r'class="[^"]*\bmath\b')
#: One and a half megabytes of icons as a script; the theme's style sheet has the same icons as fonts.
ICONS = re.compile(r'\s*<script[^>]*src="[^"]*/fontawesome\.js[^"]*"></script>')


def know_repository(app: Sphinx, config: Config) -> None:
    """Launch, edit and issue buttons where ``repository.url`` is set or a GitHub workflow tells the address."""
    options, environment = config.html_theme_options, os.environ
    if not options.get("repository_url") and "GITHUB_REPOSITORY" in environment:
        server = environment.get("GITHUB_SERVER_URL", "https://github.com")
        options["repository_url"] = f"{server}/{environment['GITHUB_REPOSITORY']}"
    known = bool(options.get("repository_url"))
    options |= {f"use_{button}_button": known for button in ("repository", "edit_page", "issues")}
    if not known:
        options.pop("launch_buttons", None)
    # A social card has to be named by its whole address: the workflow that publishes the site tells it.
    config.html_baseurl = config.html_baseurl or environment.get("TEXTLOC_SITE_URL", "")
    options["extra_footer"] = f"Version {textloc_utils.__version__}"


def list_modules(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill the API page: one section per module, in the order of the alphabet."""
    if docname != API_PAGE:
        return
    found = pkgutil.walk_packages(textloc_utils.__path__, "textloc_utils.")
    sections = [
        f"## {module.name.removeprefix('textloc_utils.')}\n\n```{{eval-rst}}\n.. automodule:: {module.name}\n```\n"
        for module in found
        if not module.ispkg and not module.name.endswith(".__main__")  # which would run
    ]
    source[0] = source[0].replace(MODULES, "\n".join(sections))


def fill_compute(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill the page on compute and provenance with what was recorded."""
    if docname == COMPUTE_PAGE:
        for name, text in compute.page().items():
            source[0] = source[0].replace(f"<!-- {name} -->", text)


def keep_comments(app: Sphinx) -> None:
    """What is said of a constant or a property stays as written: napoleon takes what stands before a colon for a type.

    A property's docstring with sections goes through napoleon all the same.
    """
    as_written: list[str] = []

    def before(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
        as_written[:] = lines

    def after(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
        if what in ("data", "attribute") or (what == "property" and as_written.count("") < 2):
            lines[:] = as_written

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)


def resolve_short_names(app: Sphinx, env, node, content):
    """Docstrings name what stands in another module as ``module.name``, without the package before it."""
    if node.get("refdomain") != "py" or node["reftarget"].startswith("textloc_utils."):
        return None
    domain, target = env.get_domain("py"), f"textloc_utils.{node['reftarget']}"
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, content)


def describe_glued(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A picture glued from another page comes without its alternative text, which is that page's."""
    for image in doctree.findall(nodes.image):
        if "alt" not in image:
            name = Path(image["uri"]).name
            pages = map(app.env.get_doctree, sorted(app.env.found_docs))
            same = (other for page in pages for other in page.findall(nodes.image) if Path(other["uri"]).name == name)
            if texts := [other["alt"] for other in same if "alt" in other]:
                image["alt"] = texts[0]


def finish_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Leave out scripts that a page does not need; mend roles; name the social card."""
    # `sphinx_thebe`, for live cells from another host, is not used, and adds its constants twice, which is an error.
    unused = ["thebe"] if MATH.search(context.get("body", "")) else ["thebe", "mathjax", "MathJax"]
    context["script_files"] = _once(s for s in context["script_files"] if not any(u in _text(s) for u in unused))
    context["css_files"] = [s for s in context["css_files"] if "thebe" not in _text(s)]
    if "citation-list" in context.get("body", ""):
        # docutils' list holds children of a role that is deprecated and is no list item.
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
    title = html.escape(app.config.html_title if pagename == app.config.root_doc else str(context.get("title", "")))
    tags = {"og:type": "website", "og:title": title, "og:site_name": html.escape(app.config.html_title)}
    if base := app.config.html_baseurl.rstrip("/"):
        tags |= {"og:url": f"{base}/{pagename}.html", "og:image": f"{base}/_static/{CARD}"}
        tags["og:image:alt"] = (
            "A picture that spells one word, and the same with one layer patched, which spells another"
        )
    meta = "".join(f'<meta property="{name}" content="{text}" />\n' for name, text in tags.items())
    context["metatags"] = (
        context.get("metatags", "") + meta + '<meta name="twitter:card" content="summary_large_image" />'
    )


def drop_icons(app: Sphinx, exception: Exception | None) -> None:
    """Take the script of icons out of the pages and the site: fonts draw them."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            if ICONS.search(text):
                page.write_text(ICONS.sub("", text), encoding="utf-8")
        for script in Path(app.outdir, "_static", "scripts").glob("fontawesome.js*"):
            script.unlink()


def _text(script) -> str:
    return f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {}).get('body', '')}"


def _once(scripts) -> list:
    found = {}
    for script in scripts:
        found.setdefault(_text(script), script)
    return list(found.values())


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    folder = str(Path(__file__).parent.parent / "_static")
    app.connect("config-inited", lambda app, config: config.html_static_path.append(folder))
    app.connect("config-inited", know_repository)
    app.connect("source-read", list_modules)
    app.connect("source-read", fill_compute)
    app.connect("missing-reference", resolve_short_names)
    keep_comments(app)
    app.connect("doctree-resolved", describe_glued)
    app.connect("html-page-context", finish_page, priority=900)  # after the extensions that add scripts
    app.connect("build-finished", drop_icons)
    app.add_css_file("book.css")
    app.add_js_file("fold.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
