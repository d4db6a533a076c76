"""Sphinx extension: a badge beside every numbered equation, the parts of the ledger page, and warnings for every gap.

Directives: `{ledger-summary}`, `{ledger-table}`, `{ledger-functions}`, `{ledger-survivors}`, `{ledger-graph}`,
`{ledger-found}`, `{ledger-coverage}` (of the page that it stands on; without it, the coverage stands at the foot).
Settings: `ledger_file`, the register, from the folder of the sources; `ledger_packages`, folders, from there, in which
the source files that the checks ran are looked for before the installed packages.
"""

from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from . import register
from .digest import code_digest, fingerprint
from .page import Page, Place

logger = logging.getLogger(__name__)
PARTS = ("summary", "table", "functions", "survivors", "graph", "found", "coverage")


class BundleRenderer:
    """Shows the plain text of a check's output, not its record (entry point `myst_nb.mime_renderers`)."""

    mime_priority_overrides = [("*", register.BUNDLE, 1000)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        return [] if data.mime_type == register.BUNDLE else None


class ledger_part(nodes.General, nodes.Element):
    """Stands for a part of the ledger until every page has been read."""


def _directive(part):
    def run(self):
        return [ledger_part("", part=part)]

    return type(f"Ledger{part.title()}", (SphinxDirective,), {"run": run, "__doc__": f"The ledger's {part}."})


def _start(app):
    try:
        app.ledger = register.read(Path(app.srcdir, app.config.ledger_file))
    except ValueError as error:
        logger.warning("%s", error, type="ledger", subtype="malformed")
        app.ledger = {"schema": register.SCHEMA, "equations": {}, "functions": {}}
    app.config.html_static_path.append(str(Path(__file__).parent / "static"))
    app.add_css_file("ledger.css")


def _on_pages(env):
    """{docname: (equations, parts)}; an equation is (label, line, fingerprint)."""
    if not hasattr(env, "ledger_pages"):
        env.ledger_pages = {}
    return env.ledger_pages


def _collect(app, doctree):
    found = [
        (node["label"], node.line, fingerprint(node.astext()))
        for node in doctree.findall(nodes.math_block)
        if node.get("label")
    ]
    parts = {node["part"] for node in doctree.findall(ledger_part)}
    _purge(app, app.env, app.env.docname)
    if found or parts:
        _on_pages(app.env)[app.env.docname] = (found, parts)


def _purge(app, env, docname):
    _on_pages(env).pop(docname, None)


def _merge(app, env, docnames, other):
    pages = _on_pages(other)
    _on_pages(env).update({name: pages[name] for name in docnames if name in pages})


def _source(app, path):
    """The text of a source file that checks ran, or None where it is not to be found. Imports nothing."""
    roots = [Path(app.srcdir, folder) for folder in app.config.ledger_packages]
    try:
        spec = find_spec(Path(path).parts[0].removesuffix(".py"))
    except (ImportError, ValueError):
        spec = None
    if spec and spec.submodule_search_locations:
        roots += [Path(folder).parent for folder in spec.submodule_search_locations]
    elif spec and spec.origin:
        roots.append(Path(spec.origin).parent)
    file = next((root / path for root in roots if (root / path).is_file()), None)
    return file.read_text(encoding="utf-8") if file else None


def _problems(app, env):
    """(labels, what is wrong, why and what to do) of all that the ledger can't vouch for, at the first label."""
    ledger, checks = app.ledger, register.checks(app.ledger)
    shown = {label: mark for found, _ in _on_pages(env).values() for label, _, mark in found}
    for label, mark in shown.items():
        entry = ledger["equations"].get(label)
        if label not in checks:
            yield [label], "unchecked", "no check upholds it; write one under it, or take the number away"
        elif mark != entry["fingerprint"]:
            yield [label], "stale", "its LaTeX is not the one that was checked; run `make notebooks` and `make ledger`"
    for label in sorted(ledger["equations"].keys() - shown):
        home = ledger["equations"][label]["chapter"]
        yield (
            [label],
            "dangling",
            f"the ledger has it from {home}, but it is on no page; run `make ledger`, or put the notebook into the "
            "table of contents",
        )
    for label, check in checks.items():
        if check["state"] not in ("holds", "cited"):
            yield [label], "failed", f"its check says {check['state']!r}; correct the equation or the check"
    for path in sorted({path for check in checks.values() for path in check["ran"]}):
        text = _source(app, path)
        now = None if text is None else code_digest(text)
        stale = [label for label, check in checks.items() if check["ran"].get(path, now) != now]
        if stale:
            why = f"{path} " + ("is not to be found" if text is None else "has changed since its check ran")
            others = f", like {', '.join(stale[1:])}" if stale[1:] else ""
            yield stale, f"stale{others}", f"{why}; run `make notebooks` and `make ledger`"
    for label, function in register.blind(ledger):
        yield (
            [label],
            "blind",
            f"its check names {function} and rejects none of its mutants; draw inputs at which a mistake in it shows",
        )
    for labels, function, mutant, reason in register.survivors(ledger):
        if not reason:
            whose = f"the mutant {mutant!r}" + (f" of {function}" if function else "")
            yield labels, "survivor", f"{whose} survives without a reason; sharpen the check, or say why in `same`"
    uses = register.rests_on(ledger)
    circle = register.cycle(uses)
    if circle:
        yield circle, "circular", f"it rests on itself: {' uses '.join(circle)}; take one of these uses away"
    for label, others in uses.items():
        for other in sorted(set(others) - uses.keys()):
            yield [label], "dangling", f"it uses {other}, which no equation is called; correct the name in `uses`"


def _updated(app, env):
    """Warns on every build, also one that reads nothing anew; names the pages to write again if the ledger changed."""
    file, pages = app.config.ledger_file, _on_pages(env)
    if not Path(app.srcdir, file).exists():
        logger.warning("there is no %s; run `make ledger`", file, type="ledger", subtype="missing")
    where = {label: (docname, line) for docname, (found, _) in pages.items() for label, line, _ in found}
    app.ledger_troubles = {}
    for labels, word, message in _problems(app, env):
        kind = word.partition(",")[0]
        for label in labels:
            app.ledger_troubles.setdefault(label, kind)
        place = where.get(labels[0])
        logger.warning("equation %s: %s: %s", labels[0], word, message, location=place, type="ledger", subtype=kind)
    state = (app.ledger, app.ledger_troubles, dict(pages), {name: env.toc_fignumbers.get(name) for name in pages})
    if state != getattr(env, "ledger_state", None):
        env.ledger_state = state
        return list(pages)
    return []


def _page(app, docname):
    """The builder of HTML for the links of the page `docname`."""
    env, pages = app.env, _on_pages(app.env)
    domain, places, table = env.get_domain("math"), {}, None
    order = {name: i for i, name in enumerate(env.collect_relations())}
    for name in sorted(pages, key=lambda name: (order.get(name, len(order)), name)):
        found, parts = pages[name]
        table = name if "table" in parts and table is None else table
        title = env.titles[name].astext() if name in env.titles else name
        chapter = app.builder.get_relative_uri(docname, name)
        for label, *_ in found:
            ref = domain.resolve_xref(env, docname, app.builder, "eq", label, nodes.Element(), nodes.Text(""))
            if ref is not None:
                href = ref.get("refuri") or "#" + ref["refid"]
                places[label] = Place(href, ref.astext(), chapter, title)
    home = None if table is None else app.builder.get_relative_uri(docname, table)
    return Page(app.ledger, places, app.ledger_troubles, home)


def _resolve(app, doctree, docname):
    if app.builder.format != "html":
        for node in list(doctree.findall(ledger_part)):
            node.parent.remove(node)
        return
    if docname not in _on_pages(app.env):
        return
    found, parts = _on_pages(app.env)[docname]
    page = _page(app, docname)
    labels = [label for label, *_ in found]
    for node in list(doctree.findall(ledger_part)):
        part = node["part"]
        html = page.coverage(labels or None) if part == "coverage" else getattr(page, part)()
        node.replace_self(nodes.raw("", html, format="html"))
    for node in list(doctree.findall(nodes.math_block)):
        if node.get("label"):
            badge = nodes.raw("", page.badge(node["label"]), format="html")
            # Not replace_self, which would give the box the equation's ids a second time.
            box = nodes.container("", classes=["ledger-equation"])
            node.parent[node.parent.index(node)] = box
            box += [node, badge]
    if labels and "coverage" not in parts:
        section = next(doctree.findall(nodes.section), doctree)
        section += nodes.raw("", page.coverage(labels), format="html")


def setup(app):
    app.add_config_value("ledger_file", "book/ledger.json", "env", str)
    app.add_config_value("ledger_packages", [], "env", list)
    app.add_node(ledger_part)
    for part in PARTS:
        app.add_directive(f"ledger-{part}", _directive(part))
    app.connect("builder-inited", _start)
    app.connect("doctree-read", _collect)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("env-get-updated", _updated)  # later than env-updated: equations have their numbers
    app.connect("doctree-resolved", _resolve)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
