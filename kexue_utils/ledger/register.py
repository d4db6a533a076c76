"""The register of equations (`ledger.json`) and what follows from it: scores, gaps, cycles, what rests on what."""

import json
from collections import Counter
from pathlib import Path

SCHEMA = 1
BUNDLE = "application/vnd.derivation-ledger+json"
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
    """The register at `path`, or an empty one where there is no file.

    Raises ValueError where the file is no register of this schema.
    """
    path = Path(path)
    if not path.exists():
        return {"schema": SCHEMA, "equations": {}, "functions": {}}
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        if ledger["schema"] == SCHEMA and ledger["equations"].keys() and ledger["functions"].keys() >= set():
            return ledger
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path.name}: not a ledger of schema {SCHEMA}; collect it again (`make ledger`)")


def dump(ledger):
    """`ledger` as the text of `ledger.json`: sorted, so that a change is a small diff."""
    return json.dumps(ledger, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def checks(ledger):
    """{label: check} of the equations that have one; those with none are left out."""
    return {label: entry["check"] for label, entry in ledger["equations"].items() if entry["check"]}


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
        for name, seen in mutants.items()
    }


def survivors(ledger):
    """(labels, function or None, mutant, reason or None) of every mutant that no check rejects, in order."""
    for label, check in sorted(checks(ledger).items()):
        for name, verdict in sorted(check["mutants"].items()):
            if verdict == "survived":
                yield [label], None, name, check["same"].get(name)
    for function, mutants in sorted(ledger["functions"].items()):
        for name, verdict in sorted(verdicts(mutants).items()):
            if verdict == "survived":
                yield mutants[name]["survives"], function, name, mutants[name].get("reason")


def blind(ledger):
    """(label, function) of every check that rejects no mutant of a function that it names."""
    for label, check in sorted(checks(ledger).items()):
        for function in check["of"]:
            mutants = ledger["functions"].get(function, {})
            if mutants and not any(label in seen["rejected_by"] for seen in mutants.values()):
                yield label, function


def rests_on(ledger):
    """{label: the labels that its check uses}, of every equation."""
    return {label: (entry["check"] or {}).get("uses", []) for label, entry in ledger["equations"].items()}


def cycle(uses):
    """Labels along one circle of `uses` (first = last), or None."""
    done = set()

    def walk(label, path):
        if label in path:
            return path[path.index(label) :] + [label]
        if label in done:
            return None
        found = next(filter(None, (walk(other, [*path, label]) for other in uses.get(label, []))), None)
        done.add(label)
        return found

    return next(filter(None, (walk(label, []) for label in sorted(uses))), None)


def solid(ledger, doubtful=()):
    """Labels that are checked and rest, all the way down, on checked equations only, none of them `doubtful`."""
    uses, fine, answer = rests_on(ledger), covered(ledger).difference(doubtful), {}

    def holds(label):
        if label not in answer:
            answer[label] = False  # a circle never becomes solid
            answer[label] = label in fine and all([holds(other) for other in uses[label]])
        return answer[label]

    return {label for label in uses if holds(label)}
