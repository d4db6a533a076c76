"""Executed notebooks → one register: which equation each check upholds, and everything that is refused on the way.

What has been collected is sound in itself: every check holds and belongs to an equation, every reason explains a
survivor, and what an equation rests on exists and leads in no circle.
"""

import json
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser
from sphinx.directives.patches import MathDirective

from . import register
from .digest import fingerprint

# Directives whose content is shown as it stands, so that an equation in them is only an example of how to write one.
LITERAL = {"code", "code-block", "code-cell", "sourcecode", "literalinclude", "parsed-literal", "raw", "eval-rst"}
PARSER = create_md_parser(MdParserConfig(enable_extensions={"dollarmath", "colon_fence"}), RendererHTML)


class Refused(Exception):
    """The notebooks can't be collected; `problems` holds one message for each thing to mend."""

    def __init__(self, problems):
        super().__init__("\n".join(problems))
        self.problems = problems


def equations(markdown):
    """(label, LaTeX) of every numbered equation in MyST text, in order, also inside directives."""
    for token in PARSER.parse(markdown):
        if token.type == "math_block_label":
            yield token.info, token.content
        directive = token.type in ("fence", "colon_fence") and re.match(r"\{(\S+)\}(.*)", token.info.strip())
        if directive and directive[1] not in LITERAL:
            parsed = parse_directive_text(MathDirective, directive[2].strip(), token.content, validate_options=False)
            body = "\n".join(parsed.body)
            if directive[1] != "math":
                yield from equations(body)
            elif label := parsed.options.get("label", parsed.options.get("name")):
                yield label, "\n\n".join([*parsed.arguments, body])


def collect(notebooks, previous=None, accept=()):
    """The register of all notebooks under the folder `notebooks`.

    `previous` is the committed register: an equation that has changed since, under a check that has not, is refused
    unless `accept` holds its label. Raises `Refused`, with every problem, each naming file and label.
    """
    collection = Collection(Path(notebooks))
    collection.uses()
    collection.drift((previous or {}).get("equations", {}), set(accept))
    if not collection.home and not collection.problems:
        collection.problems.append(f"{collection.folder.name}: no notebook with a numbered equation")
    if collection.problems:
        raise Refused(collection.problems)
    return collection.ledger


class Collection:
    """The register in the making, the problems met, and where each label was found."""

    def __init__(self, folder):
        self.folder, self.problems, self.home = folder, [], {}
        self.ledger = {"schema": register.SCHEMA, "equations": {}, "functions": {}}
        bundles = []
        for path in sorted(folder.rglob("*.ipynb")):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                try:
                    bundles += self.read(path)
                except (ValueError, KeyError, TypeError) as error:
                    where = f"{folder.name}/{path.relative_to(folder).as_posix()}"
                    self.problems.append(f"{where}: not a notebook ({type(error).__name__}: {error})")
        entered = [(where, bundle) for where, chapter, bundle in bundles if self.enter(where, chapter, bundle)]
        for where, bundle in entered:  # once it is known which check rejects what
            self.reasons(where, bundle)

    def read(self, path):
        """Enters the equations of one notebook; returns its checks' records, [(where, chapter, bundle)]."""
        chapter, bundles = path.relative_to(self.folder).with_suffix("").as_posix(), []
        where = f"{self.folder.name}/{chapter}.ipynb"
        for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                self.enter_equations(where, chapter, source)
            if cell["cell_type"] != "code":
                continue
            check = re.search(r"@check\(\s*[\"']([^\"']+)", source)
            what = f"{where}, cell {index}" + (f", check of {check[1]}" if check else "")
            if source.strip() and cell["execution_count"] is None:
                self.problems.append(f"{what}: has not been executed")
            for output in cell["outputs"]:
                if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", []):
                    trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output["traceback"])).strip().split("\n")
                    self.problems.append("\n    ".join([f"{what}: raised an error", *trace[-3:]]))
                bundle = output.get("data", {}).get(register.BUNDLE)
                if bundle and bundle["schema"] != register.SCHEMA:
                    self.problems.append(f"{what}: its schema is not {register.SCHEMA}; execute the notebook again")
                elif bundle:
                    bundles.append((where, chapter, bundle))
        return bundles

    def enter_equations(self, where, chapter, markdown):
        for label, latex in equations(markdown):
            if label in self.home:
                self.problems.append(f"{where}: duplicate label {label}, which {self.home[label]} has already")
                continue
            self.home[label] = where
            self.ledger["equations"][label] = {"chapter": chapter, "latex": latex.strip(), "check": None,
                                               "fingerprint": fingerprint(latex)}  # fmt: skip

    def enter(self, where, chapter, bundle):
        """Puts one check's record under its equation and its functions; was there one to put it under?"""
        label = bundle["label"]
        entry = self.ledger["equations"].get(label)
        if entry is None or entry["chapter"] != chapter:
            self.problems.append(f"{where}: dangling check: no equation in this notebook carries the label {label}")
            return False
        if entry["check"]:
            self.problems.append(f"{where}: {label} has two checks; merge them (a check may yield case after case)")
            return False
        functions = {re.sub(r"^__main__\b", chapter, name): seen for name, seen in bundle["functions"].items()}
        entry["check"] = {key: value for key, value in bundle.items() if key not in ("schema", "label", "functions")}
        entry["check"]["of"] = sorted(functions)
        for function, mutants in functions.items():
            known = self.ledger["functions"].setdefault(function, {})
            for mutant, verdict in mutants.items():
                seen = known.setdefault(mutant, {"rejected_by": [], "survives": []})
                if verdict != "did not run":
                    seen["rejected_by" if verdict == "rejected" else "survives"].append(label)
        return True

    def reasons(self, where, bundle):
        """Enters the reasons for functions' survivors, unless another check rejects the mutant."""
        for key, reason in bundle["same"].items():
            short, _, mutant = key.partition(": ")
            for function in self.ledger["equations"][bundle["label"]]["check"]["of"]:
                seen = self.ledger["functions"][function].get(mutant)
                if key in bundle["mutants"] or seen is None or not f".{function}".endswith(f".{short}"):
                    continue
                if seen["rejected_by"]:
                    self.problems.append(f"{where}: {bundle['label']}: reason for {key!r}, "
                                         f"which the check of {seen['rejected_by'][0]} rejects; delete it")  # fmt: skip
                elif bundle["label"] in seen["survives"]:
                    seen["reason"] = reason

    def uses(self):
        """What an equation rests on exists, and the derivation leads in no circle."""
        uses = register.rests_on(self.ledger)
        for label, others in uses.items():
            for other in sorted(set(others) - uses.keys()):
                self.problems.append(f"{self.home[label]}: {label} uses {other}, but no equation carries that label")
        try:
            TopologicalSorter(uses).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]
            path = " uses ".join(circle)
            self.problems.append(f"{self.home[circle[0]]}: the derivation goes in a circle: {path}")

    def drift(self, previous, accept):
        """An equation that changed while its check did not: the check may uphold the old formula."""
        for label in sorted(accept - self.home.keys()):
            self.problems.append(f"--accept names {label}, but no equation carries that label")
        for label, entry in sorted(self.ledger["equations"].items()):
            old = previous.get(label, {"check": None})
            if label in accept or not old["check"] or not entry["check"]:
                continue
            if old["fingerprint"] != entry["fingerprint"] and old["check"]["source"] == entry["check"]["source"]:
                self.problems.append(
                    f"{self.home[label]}: {label} has changed but its check has not, so it upholds the old formula. "
                    f"Change the check, or, if both say the same, collect with --accept {label}\n"
                    f"    was  {' '.join(old['latex'].split())}\n    is   {' '.join(entry['latex'].split())}"
                )
