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
from .page import Page, Place, row_id

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
    """(where, label or None, subtype, short word, message) of everything that the ledger can't vouch for."""
    ledger, checks = app.ledger, register.checks(app.ledger)
    where, shown = {}, set()
    for docname, (found, _) in _on_pages(env).items():
        for label, line, print_ in found:
            where[label] = (docname, line)
            entry = ledger["equations"].get(label)
            if entry and print_ != entry["fingerprint"]:
                yield where[label], label, "stale", "stale", (
                    f"equation {label} is stale: its LaTeX is not the one that was checked; run `make notebooks` and "
                    "`make ledger`"
                )  # fmt: skip
            if label not in checks and label not in shown:
                yield where[label], label, "unchecked", "unchecked", (
                    f"equation {label} is unchecked: no check upholds it; write one under it, or take the number away"
                )
            shown.add(label)
    at = {label: where.get(label) for label in ledger["equations"]}
    for label in sorted(ledger["equations"].keys() - shown):
        yield None, label, "dangling", "dangling", (
            f"{ledger['equations'][label]['chapter']}: equation {label} is dangling: it is in the ledger but on no page; "
            "run `make ledger`, or put its notebook into the table of contents"
        )
    for label, check in sorted(checks.items()):
        if check["state"] not in ("holds", "cited"):
            yield at[label], label, "failed", "failed", (
                f"equation {label} failed: its check says {check['state']!r}; correct the equation or the check"
            )
    ran = {}
    for label, check in sorted(checks.items()):
        for path, digest in check["ran"].items():
            ran.setdefault(path, []).append((label, digest))
    for path, users in sorted(ran.items()):
        text = _source(app, path)
        now = text and code_digest(text)
        stale = [label for label, digest in users if digest != now]
        if stale:
            why = "has changed since its checks ran" if text is not None else "was run by checks and is not to be found"
            for label in stale:
                yield None, label, None, "stale", None
            yield at[stale[0]], stale[0], "stale", "stale", (
                f"{path} {why}: {', '.join(stale)} stale; run `make notebooks` and `make ledger`"
            )
    for label, function in register.blind(ledger):
        yield at[label], label, "blind", "blind", (
            f"equation {label} is blind: its check names {function} and rejects none of its mutants; "
            "draw inputs at which a mistake in it shows, or don't name it"
        )
    for labels, function, mutant, reason in register.survivors(ledger):
        if not reason:
            for label in labels[1:]:
                yield None, label, None, "survivor", None
            yield at[labels[0]], labels[0], "survivor", "survivor", (
                f"equation {labels[0]}: the mutant {mutant!r}{f' of {function}' if function else ''} survives without a "
                "reason; sharpen the check, or say in `same` why it is no error"
            )
    uses = register.rests_on(ledger)
    circle = register.cycle(uses)
    if circle:
        yield at[circle[0]], circle[0], "cycle", "circular", f"the derivation goes in a circle: {' uses '.join(circle)}"
    for label, others in sorted(uses.items()):
        for other in sorted(set(others) - uses.keys()):
            yield at[label], label, "dangling", "dangling use", f"equation {label} uses {other}, which is not in the ledger"


def _updated(app, env):
    """Warns on every build, also one that reads nothing anew, and has the pages written again if the ledger changed."""
    file = app.config.ledger_file
    if not Path(app.srcdir, file).exists():
        logger.warning("there is no %s; run `make ledger`", file, type="ledger", subtype="missing")
    app.ledger_troubles = {}
    for place, label, subtype, word, message in _problems(app, env):
        app.ledger_troubles.setdefault(label, word)
        if message:
            logger.warning("%s", message, location=place, type="ledger", subtype=subtype)
    pages = _on_pages(env)
    state = (register.dump(app.ledger), sorted(app.ledger_troubles.items()), sorted(pages.items(), key=lambda p: p[0]))
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
    rows = {}
    if table is not None:
        base = app.builder.get_relative_uri(docname, table)
        rows = {label: f"{base}#{row_id(label)}" for label in [*places, *app.ledger["equations"]]}
    return Page(app.ledger, places, app.ledger_troubles, rows)


def _resolve(app, doctree, docname):
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
    app.connect("env-updated", _updated)
    app.connect("doctree-resolved", _resolve)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
