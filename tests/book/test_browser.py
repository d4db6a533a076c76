"""The built book in Chromium: every page is opened once and looked at in both themes, wide and on a phone."""

import functools
import http.server
import json
import re
import shutil
import threading
from urllib.parse import quote, urlsplit

import pytest
import yaml

from tools.notebooks import chapters, labels, load, notebook_path

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 400, "height": 850}
# MathJax promises nothing any more once it has failed: then this fails too, instead of waiting for ever.
SETTLED = """() => Promise.race([
  Promise.all([document.fonts.ready, window.MathJax?.startup?.promise]).then(() => true),
  new Promise((_, fail) => setTimeout(() => fail(new Error('the mathematics is not typeset after 20 s')), 20000)),
])"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(book_html):
    """Address of the built book on a local server."""
    handler = functools.partial(Quiet, directory=str(book_html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def context(site):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        context = browser.new_context(viewport=WIDE, reduced_motion="reduce", permissions=["clipboard-read"])
        yield context
        browser.close()


LOOK = """() => ({
  formulas: document.querySelectorAll('.bd-article .math').length,
  typeset: document.querySelectorAll('.bd-article .math mjx-container').length,
  errors: [...document.querySelectorAll('mjx-merror')].map(e => e.title || e.textContent),
  numbered: [...document.querySelectorAll('div.math')].filter(e => e.querySelector('.eqno')).map(e => e.id),
  images: [...document.querySelectorAll('.bd-article img')].map(e => [e.getAttribute('src'), e.alt]),
  badges: [...document.querySelectorAll('.ledger-equation')].map(
      e => [e.querySelector('div.math').id, e.querySelector('a.ledger-badge')?.href]),
})"""


# Colours of code belong to the kind of token: three of a kind are measured, the thousands of others become plain text.
FEWER_TOKENS = """() => {
  const seen = {};
  for (const token of document.querySelectorAll('.highlight pre span[class]')) {
    seen[token.className] = (seen[token.className] ?? 0) + 1;
    if (seen[token.className] > 3) token.replaceWith(...token.childNodes);
  }
}"""


# The page looks after itself one frame after its size has changed.
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def visits(site, context, book_html):
    """{page: what was seen there}: one load of every page, then a look in each theme and on a phone."""
    runner, seen = axe.Axe(), {}
    pages = sorted(
        path.relative_to(book_html).as_posix()
        for path in book_html.rglob("*.html")
        if "_static" not in path.parts and path.name != "index.html"
    )
    for name in pages:
        page = context.new_page()
        said = []
        page.on("console", lambda m, said=said: said.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("requestfailed", lambda request, said=said: said.append(f"failed: {request.url}"))
        page.on("response", lambda r, said=said: said.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on(
            "request",
            lambda r, said=said: said.append(f"outside: {r.url}") if not r.url.startswith((site, "data:")) else None,
        )
        page.goto(site + name)
        page.evaluate(SETTLED)
        look = page.evaluate(LOOK)
        page.add_style_tag(content="* { transition: none !important; }")  # colours are measured where they settle
        page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
        page.set_viewport_size(PHONE)
        look["phone"] = page.evaluate("document.documentElement.scrollWidth")
        page.set_viewport_size(WIDE)
        page.evaluate(TWO_FRAMES)
        page.evaluate(FEWER_TOKENS)
        look["axe"] = {}
        for theme, rules in (("light", {}), ("dark", {"runOnly": {"type": "rule", "values": ["color-contrast"]}})):
            page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
            report = runner.run(page, options={"resultTypes": ["violations"], "preload": False, **rules}).response
            serious = [v for v in report["violations"] if v["impact"] in ("serious", "critical")]
            look["axe"][theme] = [(v["id"], v["nodes"][0]["html"][:160]) for v in serious]
        look["said"] = said
        seen[name] = look
        page.close()
    return seen


def of(visits, key):
    """{page: what was seen under key} where it is not empty."""
    return {name: look[key] for name, look in visits.items() if look[key]}


def test_every_page_is_silent_and_asks_nobody_outside(visits):
    assert {"book/intro.html", "book/ledger.html", "search.html"} < visits.keys()
    assert of(visits, "said") == {}


def test_the_address_of_the_site_leads_to_the_introduction(site, context):
    page = context.new_page()
    page.goto(site)
    page.wait_for_url(f"{site}book/intro.html")
    page.close()


def test_mathematics_is_typeset_whole(visits):
    assert of(visits, "errors") == {}
    counts = {name: (look["formulas"], look["typeset"]) for name, look in visits.items()}
    assert {name: pair for name, pair in counts.items() if pair[0] != pair[1]} == {}
    assert any(formulas for formulas, _ in counts.values())


def test_every_numbered_equation_of_the_source_is_on_its_page(visits, root):
    for chapter in chapters(root):
        cells = load(notebook_path(root, chapter)).cells
        written = [label for cell in cells if cell.cell_type == "markdown" for label in labels(cell.source)]
        assert visits[f"notebooks/{chapter}.html"]["numbered"] == [f"equation-{label}" for label in written]


def test_no_page_scrolls_sideways_on_a_phone_even_with_every_fold_open(visits):
    assert {name: look["phone"] for name, look in visits.items() if look["phone"] > PHONE["width"]} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(visits, theme):
    assert {name: look["axe"][theme] for name, look in visits.items() if look["axe"][theme]} == {}


def test_every_image_has_alternative_text(visits):
    images = [(name, src, alt) for name, look in visits.items() for src, alt in look["images"]]
    assert [image for image in images if len(image[2].split()) < 3] == []


def test_every_badge_leads_to_its_row_and_the_row_back(visits, site, context):
    page = context.new_page()
    page.goto(site + "book/ledger.html")
    rows = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('tr[id]')].map(r => [r.id, r.querySelector('a')?.href]))"
    )
    numbered = 0
    for name, look in visits.items():
        assert [equation for equation, _ in look["badges"]] == look["numbered"]
        for equation, badge in look["badges"]:
            to = urlsplit(badge)
            assert to.path == "/book/ledger.html"
            assert rows[to.fragment] == f"{site}{name}#{equation}"
            numbered += 1
    assert numbered == len(rows) > 0
    page.goto(rows[next(iter(rows))])
    page.locator("a.ledger-badge").first.click()
    page.locator("tr:target").wait_for()
    page.locator("tr:target a").first.click()
    page.locator("div.math:target").wait_for()
    page.close()


@pytest.mark.parametrize(
    ("query", "page_found"),
    [
        ("朴素贝叶斯", "book/intro.html"),
        ("贝叶斯", "book/intro.html"),
        ("naive Bayes", "notebooks/attention/naive_bayes_attention.html"),
        ("Naive Bayes is all you need", "book/intro.html"),
        ("斯叶贝", None),  # the characters of a word in another order are not the word
    ],
)
def test_search_finds(site, context, query, page_found):
    page = context.new_page()
    page.goto(f"{site}search.html?q={quote(query)}")
    page.wait_for_function("/found|match/.test(document.querySelector('#search-results .search-summary')?.textContent)")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => new URL(a.href).pathname.slice(1))")
    page.close()
    assert links == [] if page_found is None else page_found in links


def test_a_chapter_opens_in_colab_downloads_and_copies(site, context, root):
    repository = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]
    owner_and_name = repository["url"].removeprefix("https://github.com/")
    page = context.new_page()
    for chapter in chapters(root):
        page.goto(f"{site}notebooks/{chapter}.html")
        links = page.eval_on_selector_all(".article-header-buttons a", "all => all.map(a => a.href)")
        assert (
            f"https://colab.research.google.com/github/{owner_and_name}/blob/{repository['branch']}/notebooks/{chapter}.ipynb"
            in links
        )
        source = next(link for link in links if link.startswith(site) and link.endswith(".ipynb"))
        assert json.loads(context.request.get(source).text())["cells"]
        cell = page.locator("div.cell_input:visible").first
        cell.hover()
        cell.locator("button.copybtn").click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() and copied.strip() == cell.locator("pre").inner_text().strip()
    page.close()


def test_the_theme_switch_changes_page_and_figures(site, context, root):
    page = context.new_page()
    page.goto(f"{site}notebooks/{chapters(root)[0]}.html")
    grounds, blends = {}, {}
    for _ in range(3):
        page.locator("button.theme-switch-button:visible").first.click()
        theme = page.evaluate("document.documentElement.dataset.theme")
        grounds[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        blends[theme] = page.evaluate(
            "[...document.querySelectorAll('figure img')].map(image => getComputedStyle(image).mixBlendMode)"
        )
    page.close()
    brightness = {theme: sum(map(int, re.findall(r"\d+", rgb)[:3])) for theme, rgb in grounds.items()}
    assert brightness["light"] > 600 and brightness["dark"] < 150
    assert blends["light"] and set(blends["light"]) == {"multiply"} and set(blends["dark"]) == {"screen"}


def test_badge_and_fold_of_a_check_stand_on_one_line(site, context, root):
    page = context.new_page()
    page.goto(f"{site}notebooks/{chapters(root)[0]}.html")
    page.evaluate(SETTLED)
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        boxes = page.eval_on_selector_all(
            ".check-beside",
            """all => all.map(cell => [
              cell.querySelector('summary'), cell.previousElementSibling.querySelector('.ledger-badge')
            ].map(e => e.getBoundingClientRect()).map(box => [box.left, box.right, (box.top + box.bottom) / 2]))""",
        )
        assert boxes
        assert all(fold[1] + 8 < badge[0] and abs(fold[2] - badge[2]) < 4 for fold, badge in boxes)
    page.locator(".check-beside summary").first.click()
    page.locator(".check-beside .check-stamp").first.wait_for()
    assert page.locator(".check-stamp:visible").count() == 1
    page.close()


def test_keyboard_focus_is_visible_on_the_buttons_at_the_top(site, context):
    page = context.new_page()
    page.goto(f"{site}book/intro.html")
    page.keyboard.press("Tab")  # from now on the browser shows focus
    unseen = page.eval_on_selector_all(
        ".bd-header-article button, .bd-header-article a, .search-button-field",
        """all => all.filter(e => e.offsetParent).filter(e => {
          e.focus();
          const style = getComputedStyle(e);
          return style.outlineStyle === 'none' || parseFloat(style.outlineWidth) < 2;
        }).map(e => e.className)""",
    )
    page.close()
    assert unseen == []


FORMULAS = """() => {
  const all = [...document.querySelectorAll('.bd-article div.math mjx-container[display="true"]')];
  const wide = all.filter(e => e.scrollWidth > e.clientWidth + 1);
  return { all: all.length, broken: all.filter(e => e.querySelector('mjx-linestack')).length,
           wide: wide.map(e => e.parentElement.id) };
}"""


def test_formulas_fit_a_phone_by_breaking_lines(site, context, root):
    """All but tables and a few others, in folds as well: at 400 pixels one in ten of a page may scroll in its box."""
    for chapter in chapters(root):
        page = context.new_page()
        page.set_viewport_size(PHONE)
        page.goto(f"{site}notebooks/{chapter}.html")
        page.evaluate(SETTLED)
        page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
        page.evaluate(TWO_FRAMES)
        found = page.evaluate(FORMULAS)
        page.close()
        assert found["broken"] > found["all"] / 4 and len(found["wide"]) <= found["all"] / 10, (chapter, found)


def test_lines_are_broken_anew_when_the_window_changes_its_width(site, context, root):
    page = context.new_page()
    page.goto(f"{site}notebooks/{chapters(root)[0]}.html")
    page.evaluate(SETTLED)
    wide = page.evaluate(FORMULAS)
    page.set_viewport_size(PHONE)
    page.wait_for_function(f"wide => ({FORMULAS})().broken > wide.broken + 5", arg=wide)
    page.evaluate(SETTLED)
    assert len(page.evaluate(FORMULAS)["wide"]) <= wide["all"] / 10
    page.set_viewport_size(WIDE)
    page.wait_for_function(f"wide => ({FORMULAS})().broken === wide.broken", arg=wide)
    assert page.evaluate(FORMULAS) == wide
    page.close()


def test_what_scrolls_in_its_own_box_can_be_reached_by_keyboard(site, context, root):
    page = context.new_page()
    page.set_viewport_size(PHONE)
    page.goto(f"{site}notebooks/{chapters(root)[0]}.html")
    page.evaluate(SETTLED)
    page.wait_for_function("document.querySelector('.bd-article [tabindex=\"0\"]')")
    lost = page.eval_on_selector_all(
        '.bd-article pre, .bd-article mjx-container[display="true"]',
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex !== 0).map(e => e.textContent)",
    )
    page.close()
    assert lost == []
