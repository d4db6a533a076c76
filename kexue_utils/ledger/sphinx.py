"""Sphinx extension: a badge beside every numbered equation, the parts of the ledger page, and warnings for every gap.

Directives: `{ledger-summary}`, `{ledger-table}`, `{ledger-functions}`, `{ledger-survivors}`, `{ledger-graph}`,
`{ledger-found}`, `{ledger-coverage}` (of the page that it stands on; without it, the coverage stands at the foot).
Settings: `ledger_file`, the register, from the folder of the sources; `ledger_packages`, folders, from there, in which
the source files that the checks ran are looked for before the installed packages.

The register is sound in itself, as `collect` has seen to that; here it is compared with the pages and the sources.
"""

from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from . import register
from .digest import code_digest, fingerprint
from .page import Page, Place

logger = logging.getLogger(__name__)
PARTS = ("summary", "table", "functions", "survivors", "graph", "found", "coverage")
AGAIN = f"execute its notebook again, then run {register.COLLECT}"


class BundleRenderer:
    """Shows the plain text of a check's output, not its record (entry point `myst_nb.mime_renderers`)."""

    mime_priority_overrides = [("*", register.BUNDLE, 1000)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        return [] if data.mime_type == register.BUNDLE else None


class ledger_part(nodes.General, nodes.Element):
    """Stands for a part of the ledger until every page has been read."""


class Part(SphinxDirective):
    """`{ledger-…}`: a part of the ledger."""

    def run(self):
        return [ledger_part("", part=self.name.removeprefix("ledger-"))]


def start(app):
    file = Path(app.srcdir, app.config.ledger_file)
    try:
        app.ledger = register.read(file)
    except ValueError as error:
        raise ExtensionError(str(error)) from None
    if not file.exists():
        logger.warning("there is no %s; run %s", file.name, register.COLLECT, type="ledger", subtype="missing")
    app.config.html_static_path.append(str(Path(__file__).parent / "static"))
    app.add_css_file("ledger.css")


def on_pages(env):
    """{docname: (equations, parts)}; an equation is (label, line, fingerprint)."""
    if not hasattr(env, "ledger_pages"):
        env.ledger_pages = {}
    return env.ledger_pages


def remember(app, doctree):
    equations = [(node["label"], node.line, fingerprint(node.astext()))
                 for node in doctree.findall(nodes.math_block) if node.get("label")]  # fmt: skip
    parts = {node["part"] for node in doctree.findall(ledger_part)}
    if equations or parts:
        on_pages(app.env)[app.env.docname] = equations, parts


def forget(app, env, docname):
    on_pages(env).pop(docname, None)


def merge(app, env, docnames, other):
    on_pages(env).update({name: found for name, found in on_pages(other).items() if name in docnames})


def source(app, path):
    """The text of a source file that checks ran, or None where it is not to be found. Imports nothing."""
    roots = [Path(app.srcdir, folder) for folder in app.config.ledger_packages]
    if package := find_spec(path.partition("/")[0].removesuffix(".py")):
        roots += [Path(place).parent for place in package.submodule_search_locations or [package.origin]]
    file = next((root / path for root in roots if (root / path).is_file()), None)
    return file and file.read_text(encoding="utf-8")


def problems(app, env):
    """(labels, what is wrong, why and what to do) of all that the ledger can't vouch for, at the first label."""
    ledger, checks = app.ledger, register.checks(app.ledger)
    shown = {label: mark for equations, _ in on_pages(env).values() for label, _, mark in equations}
    for label, mark in shown.items():
        if label not in checks:
            yield [label], "unchecked", "no check upholds it; write one under it, or take the number away"
        elif mark != ledger["equations"][label]["fingerprint"]:
            yield [label], "stale", f"its LaTeX is not the one that was checked; {AGAIN}"
    for label in sorted(ledger["equations"].keys() - shown):
        home = ledger["equations"][label]["chapter"]
        why = f"it was collected from {home}, but is on no page; put that into the table of contents, or collect again"
        yield [label], "dangling", why
    for path in sorted({path for check in checks.values() for path in check["ran"]}):
        text = source(app, path)
        now = None if text is None else code_digest(text)
        if stale := [label for label, check in checks.items() if check["ran"].get(path, now) != now]:
            what = "is not to be found" if text is None else "has changed since its check ran"
            others = f", like {', '.join(stale[1:])}" if stale[1:] else ""
            yield stale, f"stale{others}", f"{path} {what}; {AGAIN}"
    for labels, function, mutant, reason in register.survivors(ledger):
        if not reason:
            whose = f"the mutant {mutant!r}" + (f" of {function}" if function else "")
            yield labels, "survivor", f"{whose} survives without a reason; sharpen the check, or say why in `same`"


def compare(app, env):
    """Warns on every build, also one that reads nothing anew. All pages with equations are written again."""
    where = {label: (name, line) for name, (found, _) in on_pages(env).items() for label, line, _ in found}
    app.ledger_troubles = {}
    for labels, word, message in problems(app, env):
        kind = word.partition(",")[0]
        for label in labels:
            app.ledger_troubles.setdefault(label, kind)
        place = where.get(labels[0])
        logger.warning("equation %s: %s: %s", labels[0], word, message, location=place, type="ledger", subtype=kind)
    return list(on_pages(env))


def page_of(app, docname):
    """The builder of HTML for the links of the page `docname`."""
    env, places, home = app.env, {}, None
    link = app.builder.get_relative_uri
    for name in dict.fromkeys([*env.collect_relations(), *sorted(on_pages(env))]):  # in the order of reading
        equations, parts = on_pages(env).get(name, ([], ()))
        if "table" in parts and home is None:
            home = link(docname, name)
        for label, *_ in equations:
            reference = env.get_domain("math").resolve_xref(
                env, docname, app.builder, "eq", label, nodes.Element(), nodes.Text("")
            )
            href = reference.get("refuri") or "#" + reference["refid"]
            places[label] = Place(href, reference.astext(), link(docname, name), env.titles[name].astext())
    return Page(app.ledger, places, app.ledger_troubles, home)


def resolve(app, doctree, docname):
    """Puts badges and parts in their places; builders of other formats leave both out."""
    equations, parts = on_pages(app.env).get(docname, ([], ()))
    if app.builder.format != "html" or not (equations or parts):
        for node in list(doctree.findall(ledger_part)):
            node.parent.remove(node)
        return
    page, labels = page_of(app, docname), [label for label, *_ in equations]

    def raw(part):
        return nodes.raw("", page.coverage(labels) if part == "coverage" else getattr(page, part)(), format="html")

    for node in list(doctree.findall(ledger_part)):
        node.replace_self(raw(node["part"]))
    for node in list(doctree.findall(nodes.math_block)):
        if node.get("label"):
            # Not replace_self, which would give the box the equation's ids a second time.
            box = nodes.container("", classes=["ledger-equation"])
            node.parent[node.parent.index(node)] = box
            box += [node, nodes.raw("", page.badge(node["label"]), format="html")]
    if labels and "coverage" not in parts:
        section = next(doctree.findall(nodes.section), doctree)
        section += raw("coverage")


def setup(app):
    app.add_config_value("ledger_file", "book/ledger.json", "env", str)
    app.add_config_value("ledger_packages", [], "env", list)
    app.add_node(ledger_part)
    for part in PARTS:
        app.add_directive(f"ledger-{part}", Part)
    app.connect("builder-inited", start)
    app.connect("doctree-read", remember)
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("env-get-updated", compare)  # later than env-updated: equations have their numbers
    app.connect("doctree-resolved", resolve)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
