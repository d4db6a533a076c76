"""Executed notebooks → one register: which equation each check upholds, and everything that is refused on the way."""

import json
import re
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

from . import register
from .digest import fingerprint

# Directives whose content is shown as it stands, so that an equation in them is only an example of how to write one.
LITERAL = {"code", "code-block", "code-cell", "sourcecode", "literalinclude", "parsed-literal", "raw", "eval-rst"}
PARSER = MarkdownIt("commonmark").enable("table")
PARSER.use(front_matter_plugin).use(myst_block_plugin).use(footnote_plugin).disable("footnote_inline")
PARSER.use(dollarmath_plugin, allow_labels=True, allow_space=True, allow_digits=True).use(colon_fence_plugin)

FIELDS = {"state": str, "kind": str, "evidence": str, "mistakes": int, "source": str, "uses": list, "found": list,
          "mutants": dict, "functions": dict, "same": dict, "ran": dict}  # fmt: skip


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
        elif token.type in ("fence", "colon_fence"):
            directive = re.match(r"\{([^\s}]+)\}\s*(.*)", token.info.strip())
            if directive and directive[1] == "math":
                options, body = _options(token.content)
                label = re.search(r"^(?:label|name):\s*(\S+)", options, re.MULTILINE)
                if label:
                    yield label[1].strip("\"'"), f"{directive[2]}\n\n{body}".strip()
            elif directive and directive[1] not in LITERAL:
                yield from equations(_options(token.content)[1])


def _options(content):
    """The option block of a directive, as `key: value` lines, and the rest."""
    lines = content.split("\n")
    if lines[0].startswith("---"):
        end = next((i for i, line in enumerate(lines[1:], 1) if line.startswith("---")), len(lines))
        return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :])
    end = next((i for i, line in enumerate(lines) if not line.lstrip().startswith(":")), len(lines))
    # A colon fence that is nested without any text before it starts with colons, too, and is no option.
    end = next((i for i, line in enumerate(lines[:end]) if line.lstrip().startswith("::")), end)
    return "\n".join(line.lstrip()[1:] for line in lines[:end]), "\n".join(lines[end:])


def _cells(path, where):
    """(markdown texts, bundles, problems) of one executed notebook."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], cell, "".join(cell["source"])) for cell in notebook["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        return [], [], [f"{where}: not a notebook ({type(error).__name__}: {error}); make it anew (`make notebooks`)"]
    texts, bundles, problems = [], [], []
    for index, (kind, cell, source) in enumerate(cells, 1):
        if kind == "markdown":
            texts.append(source)
        if kind != "code":
            continue
        named = re.search(r"@check\(\s*[\"']([^\"']+)", source)
        what = f"{where}, cell {index}" + (f", check of {named[1]}" if named else "")
        if source.strip() and cell.get("execution_count") is None:
            problems.append(f"{what}: has not been executed; run `make notebooks`")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", []):
                trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output["traceback"])).strip().split("\n")
                problems.append("\n    ".join([f"{what}: raised an error", *trace[-3:]]))
            bundle = output.get("data", {}).get(register.BUNDLE)
            if bundle is not None:
                fault = _fault(bundle)
                if fault:
                    problems.append(f"{what}: malformed record of a check: {fault}; run `make notebooks`")
                else:
                    bundles.append(bundle)
    return texts, bundles, problems


def _fault(bundle):
    """What is wrong with a check's record, or None."""
    if not isinstance(bundle, dict) or bundle.get("schema") != register.SCHEMA:
        return f"schema is not {register.SCHEMA}"
    if not isinstance(bundle.get("label"), str):
        return "no label"
    if bundle.get("kind") not in register.KINDS:
        return f"{bundle['label']} has the unknown kind {bundle.get('kind')!r}, known are {', '.join(register.KINDS)}"
    wrong = [name for name, kind in FIELDS.items() if not isinstance(bundle.get(name), kind)]
    return f"{bundle['label']} lacks {', '.join(wrong)}" if wrong else None


def collect(notebooks, previous=None, accept=()):
    """The register of all notebooks under the folder `notebooks`.

    `previous` is the committed register: an equation that has changed since, under a check that has not, is refused
    unless `accept` holds its label. Raises `Refused`, with every problem, each naming file and label.
    """
    notebooks = Path(notebooks)
    ledger = {"schema": register.SCHEMA, "equations": {}, "functions": {}}
    problems, home, found = [], {}, []
    for path in sorted(notebooks.rglob("*.ipynb")):
        chapter = path.relative_to(notebooks).with_suffix("").as_posix()
        if any(part.startswith(".") for part in path.relative_to(notebooks).parts):
            continue
        where = f"{notebooks.name}/{chapter}.ipynb"
        texts, bundles, wrong = _cells(path, where)
        problems += wrong
        found += [(where, chapter, bundle) for bundle in bundles]
        for label, latex in (pair for text in texts for pair in equations(text)):
            if label in home:
                problems.append(f"{where}: duplicate label {label}, which {home[label]} has already")
                continue
            home[label] = where
            ledger["equations"][label] = {"chapter": chapter, "latex": latex.strip(), "check": None,
                                          "fingerprint": fingerprint(latex)}  # fmt: skip
    if not home and not problems:
        problems.append(f"{notebooks.name}: no notebook with a numbered equation")
    for where, chapter, bundle in found:
        problems += _enter(ledger, where, chapter, bundle)
    problems += _reasons(ledger, found) + _uses(ledger, home) + _drift(ledger, previous, set(accept), home)
    if problems:
        raise Refused(problems)
    return ledger


def _enter(ledger, where, chapter, bundle):
    """Puts one check's record into the register; returns the problems."""
    label = bundle["label"]
    entry = ledger["equations"].get(label)
    if entry is None or entry["chapter"] != chapter:
        return [f"{where}: dangling check: no equation in this notebook carries the label {label}"]
    if entry["check"]:
        return [f"{where}: {label} has two checks; merge them (a check may yield case after case)"]
    functions = {re.sub(r"^__main__\b", chapter, name): seen for name, seen in bundle["functions"].items()}
    entry["check"] = {key: value for key, value in bundle.items() if key not in ("schema", "label", "functions")}
    entry["check"]["of"] = sorted(functions)
    for function, mutants in functions.items():
        register_of = ledger["functions"].setdefault(function, {})
        for mutant, verdict in mutants.items():
            seen = register_of.setdefault(mutant, {"rejected_by": [], "survives": []})
            if verdict in ("rejected", "survived"):
                seen["rejected_by" if verdict == "rejected" else "survives"].append(label)
    return []


def _reasons(ledger, found):
    """Enters the reasons for functions' survivors; returns the reasons that explain nothing."""
    problems = []
    for where, _, bundle in found:
        label = bundle["label"]
        check = ledger["equations"].get(label, {}).get("check") or {"of": []}
        for key, reason in bundle["same"].items():
            if key in bundle["mutants"]:
                if bundle["mutants"][key] != "survived":
                    problems.append(f"{where}: {label}: reason for {key!r}, which does not survive; delete it")
                continue
            short, _, mutant = key.partition(": ")
            functions = [ledger["functions"][name] for name in check["of"] if f".{name}".endswith(f".{short}")]
            seen = next((mutants[mutant] for mutants in functions if mutant in mutants), None)
            if seen and seen["rejected_by"]:
                other = seen["rejected_by"][0]
                problems.append(f"{where}: {label}: reason for {key!r}, which the check of {other} rejects; delete it")
            elif seen and seen["survives"]:
                seen["reason"] = reason
            elif not bundle.get("subset"):  # of a subset, the others may be explained all the same
                problems.append(f"{where}: {label}: reason for {key!r}, but no such mutant survives; delete it")
    return problems


def _uses(ledger, home):
    uses = register.rests_on(ledger)
    problems = [
        f"{home[label]}: {label} uses {other}, but no equation carries that label"
        for label, others in sorted(uses.items())
        for other in others
        if other not in uses
    ]
    circle = register.cycle(uses)
    if circle:
        problems.append(f"{home[circle[0]]}: the derivation goes in a circle: {' uses '.join(circle)}")
    return problems


def _drift(ledger, previous, accept, home):
    problems = [f"ACCEPT names {label}, but no equation carries that label" for label in sorted(accept - home.keys())]
    for label, entry in sorted(ledger["equations"].items()):
        old = (previous or {}).get("equations", {}).get(label)
        if not (old and old["check"] and entry["check"]) or label in accept:
            continue
        if old["fingerprint"] != entry["fingerprint"] and old["check"]["source"] == entry["check"]["source"]:
            problems.append(
                f"{home[label]}: {label} has changed but its check has not, so it upholds the old formula. Change the "
                f"check, or, if both say the same, `make ledger ACCEPT={label}`\n"
                f"    was  {' '.join(old['latex'].split())}\n    is   {' '.join(entry['latex'].split())}"
            )
    return problems
