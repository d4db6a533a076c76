"""The register of equations (`ledger.json`) and what follows from it: scores, gaps, cycles, what rests on what."""

import json
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

SCHEMA = 1
BUNDLE = "application/vnd.derivation-ledger+json"
COLLECT = f"`python -m {__package__} collect`"  # what messages tell to run
KINDS = {
    "symbolic": "Both sides are expressions: equal at 32 random points and proved equal by computer algebra.",
    "exact": "Integers, fractions or whole enumerations, without rounding: equal in every case tried.",
    "numeric": "Floating-point numbers: equal to about nine digits on every random draw. Evidence, not a proof.",
    "definition": "A fixed case against typed values: it fixes what the symbols mean.",
    "rate": "The slope of error against step size, on logarithmic scales, is the order that the equation claims.",
    "bound": "Never violated on any random draw, and attained in the case of equality.",
    "statistical": "The mean of many samples lies within six standard errors of the claim.",
    "cited": "A theorem taken from the literature by name: not checked here, and counted against coverage.",
}


def read(path):
    """The register at `path`, or an empty one where there is no file; ValueError where the file is something else."""
    path = Path(path)
    if not path.exists():
        return {"schema": SCHEMA, "equations": {}, "functions": {}}
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        if ledger["schema"] == SCHEMA and {"equations", "functions"} <= ledger.keys():
            return ledger
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path.name}: not a ledger of schema {SCHEMA}; make it anew with {COLLECT}")


def dump(ledger):
    """`ledger` as the text of `ledger.json`: sorted, so that a change is a small diff."""
    return json.dumps(ledger, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def checks(ledger):
    """{label: check} of the equations that have one; those with none are left out."""
    return {label: entry["check"] for label, entry in sorted(ledger["equations"].items()) if entry["check"]}


def covered(ledger):
    """Labels of the equations that a check upholds; a citation is not a check."""
    return {label for label, check in checks(ledger).items() if check["state"] == "holds"}


def score(verdicts):
    """(rejected, counted) of mutants' verdicts; a mutant that did not run counts neither way."""
    count = Counter(verdicts)
    return count["rejected"], count["rejected"] + count["survived"]


def verdicts(mutants):
    """{mutant: verdict} over the whole book of one function: a single check that rejects a mutant is enough."""
    return {
        name: "rejected" if seen["rejected_by"] else "survived" if seen["survives"] else "did not run"
        for name, seen in sorted(mutants.items())
    }


def totals(ledger):
    """Number of checks by kind, and the two mutation scores (rejected, counted): of equations, of functions."""
    own = [verdict for check in checks(ledger).values() for verdict in check["mutants"].values()]
    shared = [verdict for mutants in ledger["functions"].values() for verdict in verdicts(mutants).values()]
    return Counter(check["kind"] for check in checks(ledger).values()), score(own), score(shared)


def survivors(ledger):
    """(labels, function or None, mutant, reason or None) of every mutant that no check rejects, in order."""
    for label, check in checks(ledger).items():
        for name, verdict in sorted(check["mutants"].items()):
            if verdict == "survived":
                yield [label], None, name, check["same"].get(name)
    for function, mutants in sorted(ledger["functions"].items()):
        for name, verdict in verdicts(mutants).items():
            if verdict == "survived":
                yield mutants[name]["survives"], function, name, mutants[name].get("reason")


def rests_on(ledger):
    """{label: the labels that its check uses}, of every equation."""
    return {label: (entry["check"] or {}).get("uses", []) for label, entry in sorted(ledger["equations"].items())}


def solid(ledger, doubtful=()):
    """Labels that are checked and rest, all the way down, on checked equations only, none of them `doubtful`."""
    uses, fine, found = rests_on(ledger), covered(ledger).difference(doubtful), set()
    for label in TopologicalSorter(uses).static_order():  # what is used comes before what uses it
        if label in fine and found.issuperset(uses[label]):
            found.add(label)
    return found
