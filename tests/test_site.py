"""The built site in a real browser: it loads clean, stays on this machine, fits its window, and can be used by all."""

import functools
import http.server
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from conftest import html_pages
from textloc_utils import models
from textloc_utils.book import explorer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSERS += ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
# No name but this machine's is looked up: what a page asks for elsewhere fails, and is counted besides.
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
VIEWS = {"wide, light": (1440, "light"), "narrow, dark": (390, "dark")}


@pytest.fixture(scope="module")
def browser():
    found = [path for name in (os.environ.get("CHROMIUM"), *BROWSERS) if name and (path := shutil.which(name))]
    if not found:
        say = pytest.fail if os.environ.get("TEXTLOC_BROWSER") == "required" else pytest.skip
        say("no Chromium here: scripts/ensure_tool.sh chromium installs it where it may")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found[0], args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(site):
    """The site on a server of this machine; ends with a slash."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Watch:
    """What goes wrong on a page while it loads and is used."""

    def __init__(self, page: Page, address: str):
        self.wrong, self.bytes = [], 0
        page.on(
            "console", lambda m: self.wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url}"))
        page.on("response", self._response)
        # data: addresses hold their content themselves.
        page.on(
            "request",
            lambda r: self.wrong.append(f"outside: {r.url}") if not r.url.startswith((address, "data:")) else 0,
        )

    def _response(self, response):
        if response.status >= 400:
            self.wrong.append(f"{response.status}: {response.url}")


@pytest.fixture
def open_page(browser, address):
    """Open a page of the site by its path, running the script ``first`` before its own; returns it with its Watch.

    Every look at a page opens it anew: going on from a page cancels what it still loads, which counts as failed.
    """
    contexts = []

    def go(
        path: str, width: int = 1440, scheme: str = "light", base: str = address, first: str = ""
    ) -> tuple[Page, Watch]:
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce"))
        contexts[-1].add_init_script(first)
        page = contexts[-1].new_page()
        watch = Watch(page, base)
        page.goto(base + path, wait_until="load")
        return page, watch

    yield go
    for context in contexts:
        context.close()


def serious(page: Page) -> list[str]:
    """axe's serious and critical findings. ``preload`` would fetch style sheets anew, with wrong addresses."""
    found = Axe().run(page, options={"preload": False}).response
    # To axe, letters of their ground's very colour may be meant to be hidden.
    hidden = [v | {"nodes": [n for n in v["nodes"] if "equalRatio" in str(n["any"])]} for v in found["incomplete"]]
    return [
        f"{v['id']}: {v['help']}: {n['target']}"
        for v in found["violations"] + hidden
        if v["impact"] in ("serious", "critical")
        for n in v["nodes"]
    ]


# --- every page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_pages_load_fit_and_are_accessible(view, site, open_page):
    width, scheme = VIEWS[view]
    wrong = {}
    for path in html_pages(site):
        name = path.relative_to(site).as_posix()
        page, watch = open_page(name, width, scheme)
        page.wait_for_load_state("networkidle")
        assert page.locator("h1").count() >= 1, name
        across = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        found = watch.wrong + ([f"{across} pixels wide"] if across > width else []) + serious(page)
        # axe is content with any alternative text; a file's name says nothing.
        found += page.eval_on_selector_all(
            "main img:not(.toggler)", "all => all.map(i => i.alt).filter(alt => !/\\w+ \\w+ \\w+/.test(alt))"
        )
        wrong |= {name: found} if found else {}
        page.context.close()
    assert wrong == {}


def test_the_checks_find_what_they_look_for(address, open_page):
    """A page with planted faults is found out: nothing above passes because nothing was looked at."""
    faults = '<h1>x</h1><img src="https://elsewhere.example/x.png"><script src="none.js"></script>'
    faults += (
        '<script>undefined_name()</script><p style="color:#ccc;width:5000px">faint</p><b style="color:#fff">gone</b>'
    )
    body = f"<!DOCTYPE html><html lang='en'><title>x</title>{faults}</html>"
    page, watch = open_page("genindex.html")
    # Given by the browser itself: the site is the other tests', too.
    page.route("**/planted.html", lambda route: route.fulfill(body=body, content_type="text/html"))
    page.goto(address + "planted.html", wait_until="load")
    text = " ".join(watch.wrong)
    assert "outside: https://elsewhere.example" in text and "404" in text and "undefined_name" in text
    assert sorted(line.partition(":")[0] for line in serious(page)) == ["color-contrast", "color-contrast", "image-alt"]
    assert page.evaluate("document.documentElement.scrollWidth") > 1440


def test_the_first_page_is_small(open_page):
    page, _ = open_page("index.html")
    page.wait_for_url("**/book/index.html")
    page.wait_for_load_state("networkidle")
    finding = page.locator("main img[alt*='localized layers']")  # the finding in one picture, without scrolling
    assert finding.count() == 1 and finding.bounding_box()["y"] < 450
    entries = "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
    sizes = page.evaluate(f"{entries}.map(e => e.decodedBodySize)")
    assert len(sizes) > 10 and 0 < sum(sizes) < 1.5 * 2**20


def test_figures_have_no_ground_and_are_not_dimmed_in_the_dark(open_page):
    page, _ = open_page("notebooks/01_patch_one_layer.html", scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    style = page.eval_on_selector_all(
        ".cell_output img", "all => all.map(i => [getComputedStyle(i).backgroundColor, getComputedStyle(i).filter])"
    )
    assert style and set(map(tuple, style)) == {("rgba(0, 0, 0, 0)", "none")}
    assert (
        sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) < 150
    )


#: Tables of a page that are seen, and those of them that do not fit their box.
TABLES_THAT_OVERFLOW = """[...document.querySelectorAll('.bd-article table')].filter(t => t.offsetParent)
  .filter(t => t.scrollWidth > t.parentElement.clientWidth + 1).map(t => t.textContent.trim().slice(0, 60))"""


def test_wide_tables_are_folded_on_a_phone(open_page):
    path = "notebooks/02_localization.html"
    page, watch = open_page(path)
    wide = page.locator(".bd-article table:visible").count()
    rows = page.locator(".bd-article tbody tr:visible").count()
    assert wide >= 4 and page.locator(".folded:visible").count() == 0
    page, watch = open_page(path, 390)
    lists, tables = page.locator(".folded:visible"), page.locator(".bd-article table:visible")
    assert lists.count() >= 2 and lists.count() + tables.count() == wide
    assert page.evaluate(TABLES_THAT_OVERFLOW) == []
    entries, left = page.locator(".folded:visible > div"), page.locator(".bd-article tbody tr:visible")
    assert entries.count() + left.count() == rows
    # Each cell stands behind the head of its column.
    first = lists.first.locator("dl").first  # of the first row
    assert first.locator("dt").count() >= 3 and first.locator("dd").count() >= first.locator("dt").count()
    assert serious(page) == [] and watch.wrong == []
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_function("!document.querySelector('.folded:not([hidden])')")


def test_the_theme_button_changes_the_theme(open_page):
    page, watch = open_page("book/method.html")
    themes = []
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        themes.append(page.evaluate("document.documentElement.dataset.theme"))
    assert {"light", "dark"} == set(themes) and watch.wrong == []


def test_hidden_code_opens(open_page):
    page, _ = open_page("notebooks/01_patch_one_layer.html")
    cell = page.locator("details.hide").first
    code = cell.locator("pre").first
    assert not code.is_visible()
    cell.locator("summary").press("Enter")
    assert code.is_visible()


# --- search -------------------------------------------------------------------------------------------------------


def test_search(site, open_page):
    page, watch = open_page("search.html?q=classifier-free+guidance")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => new URL(a.href).pathname)")
    assert "/book/method.html" in links
    assert [link for link in links if not (site / link.lstrip("/")).is_file()] == []
    assert watch.wrong == []
    page, watch = open_page("search.html?q=xylophone")
    page.wait_for_function("document.querySelector('#search-results').textContent.includes('did not match')")
    assert page.locator("#search-results li a").count() == 0
    assert watch.wrong == []


@pytest.mark.parametrize("settings", [{"explorer": True, "collapsible": True}, {"renderer": "SVG"}])
def test_formulas_show_with_every_choice_of_their_menu(settings, open_page):
    """The menu keeps its choices in the browser, for all pages of one address."""
    choice = f"localStorage.setItem('MathJax-Menu-Settings', {json.dumps(json.dumps(settings))})"
    page, watch = open_page("book/method.html", first=choice)
    page.wait_for_selector("mjx-container", timeout=60_000)
    if "renderer" in settings:
        page.wait_for_selector("mjx-container svg", timeout=60_000)
    else:
        page.wait_for_selector("mjx-container [data-semantic-type]", timeout=60_000)
    assert watch.wrong == []


# --- the explorer -------------------------------------------------------------------------------------------------

TABLES = {path.stem: explorer.store().load_published(path.stem) for path in sorted(explorer.store().root.glob("*.csv"))}


def pairs(model: str) -> list:
    return [rows.reset_index(drop=True) for _, rows in TABLES[model].groupby("seed", sort=False)]


def shown(page: Page) -> dict:
    """What the explorer says: the reading and the scores of each picture, from its table."""
    rows = page.eval_on_selector_all(
        "#layer-explorer tbody tr", "all => all.map(r => [...r.children].map(c => c.textContent))"
    )
    return {name: values for name, *values in rows}


def expected(row) -> list[str]:
    scores = [f"{row[s]:.2f}" for s in ("target_score", "source_score", "ssim_outside")]
    return [row["read"] or "no text found", *scores]


def patched_picture(page: Page) -> np.ndarray:
    """The picture on the screen, at its own size: shown at twice that, so that no pixel is divided."""
    page.locator(".explorer-patched .explorer-picture").evaluate(
        """async element => {
            const image = new Image();
            image.src = getComputedStyle(element).backgroundImage.slice(5, -2);
            await image.decode();
            Object.assign(element.style, {boxSizing: "content-box", border: "none", width: "256px", height: "128px"});
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        }"""
    )
    image = Image.open(io.BytesIO(page.locator(".explorer-patched .explorer-picture").screenshot())).convert("RGB")
    return np.asarray(image.resize((128, 64), Image.Resampling.BOX)).astype(float)


@pytest.mark.parametrize("model", TABLES)
def test_explorer_shows_what_is_stored(model, open_page):
    page, watch = open_page("book/explorer.html")
    page.select_option("#explorer-model", model)
    names = page.eval_on_selector_all("#explorer-pair option", "all => all.map(o => o.textContent)")
    assert names == [f"{p.source_text[0]} → {p.target_text[0]}" for p in pairs(model)]
    last = len(names) - 1
    page.select_option("#explorer-pair", index=last)
    rows = pairs(model)[last]
    slider = page.locator("#explorer-site")
    slider.focus()
    page.keyboard.press("Home")
    for i in range(2, len(rows)):
        assert slider.get_attribute("aria-valuetext") == rows.site[i]
        told = shown(page)
        wanted = {"source": 0, "patched": i, "target": 1}
        assert told == {name: expected(rows.iloc[row]) for name, row in wanted.items()}
        status = page.locator(".explorer-status").inner_text()
        assert rows.site[i] in status and (rows.read[i] or "no text found") in status
        page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == rows.site.iloc[-1]  # the end holds
    assert watch.wrong == []


def test_explorer_draws_the_chosen_picture(open_page):
    model = next(iter(TABLES))
    rows, others = pairs(model)[:2]
    stored, elsewhere = (
        np.asarray(Image.open(explorer.sprite_path(model, part.seed.iloc[0])).convert("RGB"))
        .astype(float)
        .reshape(len(part), -1, models.spec(model).width, 3)
        for part in (rows, others)
    )
    page, _ = open_page("book/explorer.html")
    page.select_option("#explorer-model", model)
    for i in (2, len(rows) // 2, len(rows) - 1):
        page.locator("#explorer-site").fill(str(i - 2))
        difference = np.abs(stored - patched_picture(page)).mean((1, 2, 3))
        # The border and the enlargement to a fraction of a pixel blur the comparison, most where edges are sharp.
        other = np.abs(elsewhere - patched_picture(page)).mean((1, 2, 3)).min()
        assert difference[i] < other / 3 and difference[i] == difference.min()
    ground = page.locator(".explorer-patched .explorer-picture")
    assert ground.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"


@pytest.mark.parametrize("width", [390, 1440])
def test_explorer_by_keyboard_alone(width, open_page):
    page, watch = open_page("book/explorer.html", width)
    order = []
    for _ in range(120):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == "explorer-site":
            break
    assert [i for i in order if i.startswith("explorer-")] == ["explorer-model", "explorer-pair", "explorer-site"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    before = page.locator(".explorer-status").inner_text()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    after = page.locator(".explorer-status").inner_text()
    assert before != after and serious(page) == [] and watch.wrong == []


def test_explorer_from_a_file(site, browser, open_page):
    """No server: the page holds its tables, and the pictures lie beside it."""
    page, watch = open_page("book/explorer.html", base=site.as_uri() + "/")
    model = list(TABLES)[-1]
    page.select_option("#explorer-model", model)
    assert shown(page)["source"] == expected(pairs(model)[0].iloc[0])
    picture = patched_picture(page)
    assert picture.std() > 10
    assert watch.wrong == []
