"""The ledger as HTML: badge, table, survivors, found errors and the graph of what rests on what."""

from collections import Counter, namedtuple
from html import escape
from os.path import commonprefix
from urllib.parse import quote

from . import graph, register

# Where an equation is on the page: its link, its number in words "(3.2)", the link and title of its chapter.
Place = namedtuple("Place", "href number chapter_href chapter")

# The icon of a tone, and what it says to someone who doesn't see it.
TONES = {"good": ("✓", "checked"), "warn": ("▲", "doubtful"), "bad": ("✗", "not upheld"), "cited": ("○", "cited")}


class Page:
    """Builds every part of one page from the register.

    ledger: the register; places: {label: Place} in the order of reading; troubles: {label: words} of the equations
    that something is wrong with; home: link to the page with the ledger's table, or None.
    """

    def __init__(self, ledger, places, troubles, home):
        self.ledger, self.places, self.troubles, self.home = ledger, places, troubles, home
        self.labels = [*places, *sorted(ledger["equations"].keys() - places.keys())]

    def check(self, label):
        return self.ledger["equations"].get(label, {}).get("check")

    def eq(self, label):
        """A link to the equation by its number and label."""
        place = self.places.get(label)
        return f'<a href="{escape(place.href)}">{place.number} {escape(label)}</a>' if place else escape(label)

    def state(self, label):
        """(tone, word) of an equation: the word is its kind, or what is wrong with it."""
        check = self.check(label)
        if not check or check["state"] not in ("holds", "cited"):
            return "bad", "failed" if check else "unchecked"
        if label in self.troubles:
            return "warn", self.troubles[label]
        return ("cited" if check["state"] == "cited" else "good"), check["kind"]

    def badge(self, label):
        """The line beside the equation: icon, word and its own mutants, linked to the equation's row."""
        tone, word = self.state(label)
        text, check = word, self.check(label)
        rejected, counted = register.score(check["mutants"].values()) if check else (0, 0)
        if counted:
            text += f" · {rejected}/{counted} mutants"
        title = register.KINDS.get(word, word)
        inner = (
            f'<span aria-hidden="true">{TONES[tone][0]}</span> <span class="ledger-aside">Equation {escape(label)}, '
            f"{TONES[tone][1]}: </span>{escape(text)}"
        )
        kind = f'class="ledger-badge ledger-{tone}" title="{escape(title)}"'
        if self.home is None:
            return f"<span {kind}>{inner}</span>"
        return f'<a {kind} href="{escape(self.home)}#{row_id(label)}">{inner}</a>'

    def coverage(self, labels=None):
        """One sentence: how many of the numbered equations are checked."""
        labels = self.labels if labels is None else labels
        number = len(register.covered(self.ledger).intersection(labels))
        name = "Coverage" if self.home is None else f'<a href="{escape(self.home) or "#"}">Ledger</a>: coverage'
        return f'<p class="ledger-coverage">{name} {number}/{len(labels)} numbered equations upheld by a check.</p>'

    def summary(self):
        checks = register.checks(self.ledger)
        kinds = Counter(check["kind"] for check in checks.values())
        own = register.score(v for check in checks.values() for v in check["mutants"].values())
        functions = self.ledger["functions"].values()
        shared = register.score(v for mutants in functions for v in register.verdicts(mutants).values())
        covered = len(register.covered(self.ledger))
        facts = [
            ("Coverage", covered, len(self.labels), "numbered equations upheld by a check"),
            ("Equations’ mutants", *own, "small errors planted in the formulas that were rejected"),
            ("Functions’ mutants", *shared, "small errors planted in the implementations that a check rejected"),
        ]
        tiles = "".join(
            f'<div class="ledger-tile"><span>{name}</span><strong>{a}/{b}</strong><span>{words}</span></div>'
            for name, a, b, words in facts
        )
        rows = [
            [f"<strong>{kind}</strong>", str(kinds[kind]), escape(words)]
            for kind, words in register.KINDS.items()
            if kinds[kind]
        ]
        table = _table("Kinds of check", ["Kind", "Equations", "Means"], rows)
        return f'<div class="ledger-tiles">{tiles}</div>{table}'

    def table(self):
        rows = []
        for label in self.labels:
            check = self.check(label) or {}
            tone, word = self.state(label)
            kind = f'<span class="ledger-{tone}"><span aria-hidden="true">{TONES[tone][0]}</span> {escape(word)}</span>'
            rejected, counted = register.score(check.get("mutants", {}).values())
            scores = [f"{rejected}/{counted}"] if counted else []
            for function in check.get("of", []):
                seen = self.ledger["functions"][function].values()
                fell = sum(label in mutant["rejected_by"] for mutant in seen)
                of = fell + sum(label in mutant["survives"] for mutant in seen)
                scores.append(f"{_code(function)} {fell}/{of}")
            uses = ", ".join(map(self.eq, check.get("uses", []))) or "–"
            evidence = escape(check.get("evidence", "–"))
            rows.append([self.eq(label), kind, evidence, "<br>".join(scores) or "–", uses])
        head = ["Equation", "Check", "Evidence", "Mutants rejected", "Rests on"]
        return _table("Every numbered equation", head, rows, [row_id(label) for label in self.labels])

    def functions(self):
        """Every function that a check names, with the score over all checks of the book."""
        rows = []
        for function, mutants in sorted(self.ledger["functions"].items()):
            named = [label for label in self.labels if function in (self.check(label) or {}).get("of", [])]
            score = "{}/{}".format(*register.score(register.verdicts(mutants).values()))
            module = escape(function.rpartition(".")[0]).replace(".", ".<wbr>").replace("_", "_<wbr>")
            cell = f"{_code(function)}<br><small>{module}</small>"
            rows.append([cell, score, ", ".join(map(self.eq, named))])
        return _table("Functions under test", ["Function", "Mutants rejected", "Checks that name it"], rows)

    def survivors(self):
        rows = [
            [
                ", ".join(map(self.eq, labels)),
                (f"{_code(function)}: " if function else "") + f"<code>{escape(mutant)}</code>",
                escape(reason) if reason else '<span class="ledger-bad">✗ no reason given</span>',
            ]
            for labels, function, mutant, reason in register.survivors(self.ledger)
        ]
        if not rows:
            return "<p>None: every mutant that ran was rejected.</p>"
        return _table("Mutants that no check rejects", ["Equation", "Mutant", "Why it is no error"], rows)

    def found(self):
        items = []
        for label in self.labels:
            for entry in (self.check(label) or {}).get("found", []):
                source, colon, text = entry.partition(": ")
                what = f"<strong>{escape(source)}</strong>: {escape(text)}" if colon else escape(entry)
                what = what.removesuffix(".") + "."
                items.append(f"<li>{what} Refuted by the check of {self.eq(label)}.</li>")
        return f'<ul class="ledger-found">{"".join(items)}</ul>' if items else "<p>None so far.</p>"

    def graph(self):
        """For each chapter one picture, downwards from what is assumed to what follows, and the same in words."""
        uses = register.rests_on(self.ledger)
        if register.cycle(uses):
            return f"<p>The derivation goes in a circle: {escape(' uses '.join(register.cycle(uses)))}.</p>"
        solid, parts, chapters = register.solid(self.ledger, self.troubles), [], {}
        for label, place in self.places.items():
            chapters.setdefault((place.chapter_href, place.chapter), []).append(label)
        for (href, title), members in chapters.items():
            start = commonprefix(members).rpartition("-")[0] + "-"
            linked = {label: [other for other in uses.get(label, []) if other in self.places] for label in members}
            linked = {label: others for label, others in linked.items() if others}
            drawn = {*linked, *(other for others in linked.values() for other in others)}
            drawn = [label for label in self.places if label in drawn]  # also what other chapters lend
            nodes = {
                label: (
                    f"{self.places[label].number} {label.removeprefix(start) if label in members else label}",
                    self.places[label].href,
                    "ledger-solid" if label in solid else "ledger-open",
                    f"{label}: {self.state(label)[1]}",
                )
                for label in drawn
            }
            parts.append(f'<p class="ledger-chapter"><a href="{escape(href) or "#"}">{escape(title)}</a></p>')
            if drawn:
                svg = graph.draw({label: linked.get(label, []) for label in drawn}, nodes)
                words = "".join(
                    f"<li>{self.eq(label)} rests on {', '.join(map(self.eq, others))}</li>"
                    for label, others in linked.items()
                )
                parts.append(
                    f'<div class="ledger-graph" tabindex="0" role="region" aria-label="What each equation of '
                    f'“{escape(title)}” rests on">{svg}</div>'
                    f"<details><summary>The same in words</summary><ul>{words}</ul></details>"
                )
            alone = [label for label in members if label not in nodes]
            if alone:
                parts.append(f"<p>Resting on nothing, and nothing on them: {', '.join(map(self.eq, alone))}.</p>")
        key = (
            '<p class="ledger-key">Lines lead down from what is used to what uses it. '
            '<span class="ledger-solid"></span> solid: this and everything that it rests on is checked. '
            '<span class="ledger-open"></span> dashed: not so.</p>'
        )
        return key + "".join(parts)


def row_id(label):
    return f"ledger-{quote(label, safe='')}"


def _code(function):
    """The name of a function without its module, to be broken at underscores only."""
    return f"<code>{escape(function.rpartition('.')[2]).replace('_', '_<wbr>')}</code>"


def _table(caption, head, rows, ids=None):
    head = "".join(f'<th scope="col">{name}</th>' for name in head)
    ids = [f' id="{name}"' for name in ids] if ids else [""] * len(rows)
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr{name}>{row}</tr>" for name, row in zip(ids, cells, strict=True))
    return (
        f'<div class="ledger-table" tabindex="0" role="region" aria-label="{caption}"><table class="table">'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
