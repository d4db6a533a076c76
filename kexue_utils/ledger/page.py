"""The ledger as HTML: badge, table, survivors, found errors and the graph of what rests on what."""

from collections import namedtuple
from os.path import commonprefix
from urllib.parse import quote

from markupsafe import Markup as HTML  # its `format` and `join` escape whatever is not HTML already

from . import graph, register

# Where an equation is on the page: its link, its number in words "(3.2)", the link and title of its chapter.
Place = namedtuple("Place", "href number chapter_href chapter")

# The icon of a tone, and what it says to someone who doesn't see it.
TONES = {"good": ("✓", "checked"), "warn": ("▲", "doubtful"), "bad": ("✗", "not upheld"), "cited": ("○", "cited")}


class Page:
    """Builds every part of one page from the register.

    ledger: the register; places: {label: Place} in the order of reading; troubles: {label: word} of the equations
    that something is wrong with; home: link to the page with the ledger's table, or None.
    """

    def __init__(self, ledger, places, troubles, home):
        self.ledger, self.places, self.troubles, self.home = ledger, places, troubles, home
        self.labels = [*places, *sorted(ledger["equations"].keys() - places.keys())]
        self.checks = register.checks(ledger)

    def eq(self, label):
        """A link to the equation by its number and label."""
        place = self.places.get(label)
        return HTML('<a href="{0.href}">{0.number} {1}</a>').format(place, label) if place else HTML.escape(label)

    def eqs(self, labels):
        return HTML(", ").join(map(self.eq, labels))

    def state(self, label):
        """(tone, icon, what the icon says, word) of an equation: the word is its kind, or what is wrong with it."""
        check = self.checks.get(label)
        if not check:
            tone, word = "bad", "unchecked"
        elif label in self.troubles:
            tone, word = "warn", self.troubles[label]
        else:
            tone, word = "cited" if check["state"] == "cited" else "good", check["kind"]
        return tone, *TONES[tone], word

    def badge(self, label):
        """The line beside the equation: icon, word and its own mutants, linked to the equation's row."""
        tone, icon, says, word = self.state(label)
        rejected, counted = register.score(self.checks.get(label, {"mutants": {}})["mutants"].values())
        return HTML(
            '<a class="ledger-badge ledger-{tone}" title="{title}"{href}><span aria-hidden="true">{icon}</span> '
            '<span class="ledger-aside">Equation {label}, {says}: </span>{text}</a>'
        ).format(
            tone=tone, title=register.KINDS.get(word, word), icon=icon, label=label, says=says,
            href="" if self.home is None else HTML(' href="{}#{}"').format(self.home, row_id(label)),
            text=f"{word} · {rejected}/{counted} mutants" if counted else word,
        )  # fmt: skip

    def coverage(self, labels=None):
        """One sentence: how many of the numbered equations, or of those on a page, are checked."""
        labels = labels or self.labels
        name = "Coverage" if self.home is None else HTML('<a href="{}">Ledger</a>: coverage').format(self.home or "#")
        sentence = '<p class="ledger-coverage">{} {}/{} numbered equations upheld by a check.</p>'
        return HTML(sentence).format(name, len(register.covered(self.ledger).intersection(labels)), len(labels))

    def summary(self):
        kinds, own, shared = register.totals(self.ledger)
        covered = len(register.covered(self.ledger)), len(self.labels)
        tile = HTML('<div class="ledger-tile"><span>{}</span><strong>{}/{}</strong><span>{}</span></div>').format
        tiles = [
            tile("Coverage", *covered, "numbered equations upheld by a check"),
            tile("Equations’ mutants", *own, "small errors planted in the formulas that were rejected"),
            tile("Functions’ mutants", *shared, "small errors planted in the implementations that a check rejected"),
        ]
        rows = [[HTML("<strong>{}</strong>").format(kind), kinds[kind], words]
                for kind, words in register.KINDS.items() if kinds[kind]]  # fmt: skip
        return HTML('<div class="ledger-tiles">{}</div>{}').format(
            HTML("").join(tiles), table("Kinds of check", ["Kind", "Equations", "Means"], rows)
        )

    def table(self):
        rows = []
        for label in self.labels:
            check = self.checks.get(label, {"mutants": {}, "of": [], "uses": [], "evidence": "–"})
            kind = HTML('<span class="ledger-{0}"><span aria-hidden="true">{1}</span> {3}</span>')
            rejected, counted = register.score(check["mutants"].values())
            scores = [f"{rejected}/{counted}"] if counted else []
            for function in check["of"]:
                seen = self.ledger["functions"][function].values()
                fell = sum(label in mutant["rejected_by"] for mutant in seen)
                scores.append(code(function) + f" {fell}/{fell + sum(label in mutant['survives'] for mutant in seen)}")
            rows.append([self.eq(label), kind.format(*self.state(label)), check["evidence"],
                         HTML("<br>").join(scores) or "–", self.eqs(check["uses"]) or "–"])  # fmt: skip
        head = ["Equation", "Check", "Evidence", "Mutants rejected", "Rests on"]
        return table("Every numbered equation", head, rows, [row_id(label) for label in self.labels])

    def functions(self):
        """Every function that a check names, with the score over all checks of the book."""
        rows = []
        for function, mutants in sorted(self.ledger["functions"].items()):
            named = [label for label in self.labels if label in self.checks and function in self.checks[label]["of"]]
            score = "{}/{}".format(*register.score(register.verdicts(mutants).values()))
            module = breakable(function.rpartition(".")[0])
            rows.append([HTML("{}<br><small>{}</small>").format(code(function), module), score, self.eqs(named)])
        return table("Functions under test", ["Function", "Mutants rejected", "Checks that name it"], rows)

    def survivors(self):
        rows = [
            [
                self.eqs(labels),
                (code(function) + ": " if function else "") + HTML("<code>{}</code>").format(mutant),
                reason or HTML('<span class="ledger-bad">✗ no reason given</span>'),
            ]
            for labels, function, mutant, reason in register.survivors(self.ledger)
        ]
        if not rows:
            return "<p>None: every mutant that ran was rejected.</p>"
        return table("Mutants that no check rejects", ["Equation", "Mutant", "Why it is no error"], rows)

    def found(self):
        items = []
        for label in self.labels:
            for entry in self.checks.get(label, {"found": []})["found"]:
                source, colon, what = entry.removesuffix(".").partition(": ")
                item = HTML("<li><strong>{}</strong>{}{}. Refuted by the check of {}.</li>")
                items.append(item.format(source, colon, what, self.eq(label)))
        return HTML('<ul class="ledger-found">{}</ul>').format(HTML("").join(items)) if items else "<p>None so far.</p>"

    def graph(self):
        """For each chapter one picture, downwards from what is assumed to what follows."""
        key = HTML(
            '<p class="ledger-key">Lines lead down from what is used to what uses it. '
            '<span class="ledger-solid"></span> solid: this and everything that it rests on is checked. '
            '<span class="ledger-open"></span> dashed: not so. What rests on nothing, and nothing on it, is left out.'
            "</p>"
        )
        return key + HTML("").join(map(self.picture, dict.fromkeys(place[2:] for place in self.places.values())))

    def picture(self, chapter):
        href, title = chapter
        members = [label for label, place in self.places.items() if place[2:] == chapter]
        uses = register.rests_on(self.ledger)
        uses = {label: [other for other in uses.get(label, []) if other in self.places] for label in members}
        linked = {end for label, others in uses.items() for other in others for end in (label, other)}
        linked = [label for label in self.places if label in linked]  # also what other chapters lend
        if not linked:
            return ""
        solid, start = register.solid(self.ledger, self.troubles), commonprefix(members).rpartition("-")[0] + "-"
        nodes = {}
        for label in linked:
            text = f"{self.places[label].number} {label.removeprefix(start) if label in members else label}"
            tone = "ledger-solid" if label in solid else "ledger-open"
            nodes[label] = text, self.places[label].href, tone, f"{label}: {self.state(label)[-1]}"
        return HTML(
            '<p class="ledger-chapter"><a href="{}">{}</a></p><div class="ledger-graph" tabindex="0" role="region" '
            'aria-label="What each equation of “{}” rests on">{}</div>'
        ).format(href or "#", title, title, graph.draw({label: uses.get(label, []) for label in linked}, nodes))


def row_id(label):
    return f"ledger-{quote(label, safe='')}"


def breakable(name):
    """A dotted name that may be broken at its dots and underscores."""
    return HTML.escape(name).replace(".", HTML(".<wbr>")).replace("_", HTML("_<wbr>"))


def code(function):
    """The name of a function without its module."""
    return HTML("<code>{}</code>").format(breakable(function.rpartition(".")[2]))


def table(caption, head, rows, ids=None):
    ids = [HTML(' id="{}"').format(name) for name in ids] if ids else [""] * len(rows)
    cells = [HTML("").join(HTML("<td>{}</td>").format(cell) for cell in row) for row in rows]
    return HTML(
        '<div class="ledger-table" tabindex="0" role="region" aria-label="{0}"><table class="table">'
        "<caption>{0}</caption><thead><tr>{1}</tr></thead><tbody>{2}</tbody></table></div>"
    ).format(
        caption,
        HTML("").join(HTML('<th scope="col">{}</th>').format(name) for name in head),
        HTML("").join(HTML("<tr{}>{}</tr>").format(*row) for row in zip(ids, cells, strict=True)),
    )
