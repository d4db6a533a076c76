"""`python -m kexue_utils.ledger collect | status`: write the register from the executed notebooks, or sum it up."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from . import register
from .collect import Refused, collect


def status(ledger):
    """The register in a few lines of text: coverage, kinds, both mutation scores, survivors."""
    checks = register.checks(ledger)
    kinds = Counter(check["kind"] for check in checks.values())
    own = register.score(v for check in checks.values() for v in check["mutants"].values())
    shared = register.score(v for mutants in ledger["functions"].values() for v in register.verdicts(mutants).values())
    rows = [("equations checked", f"{len(register.covered(ledger))}/{len(ledger['equations'])}")]
    rows += [(f"  {kind}", kinds[kind]) for kind in register.KINDS if kinds[kind]]
    rows += [("mutants of equations rejected", "{}/{}".format(*own))]
    rows += [("mutants of functions rejected", "{}/{}".format(*shared))]
    lines = [f"{name:<32}{value}" for name, value in rows]
    for label in sorted(ledger["equations"].keys() - checks.keys()):
        lines.append(f"unchecked  {label}")
    for labels, function, mutant, reason in register.survivors(ledger):
        lines.append(f"survivor   {function or labels[0]}: {mutant}  ({reason or 'NO REASON'})")
    return "\n".join(lines)


def main(arguments=None):
    """Runs one command and returns its exit status: 0, or 1 where something is refused."""
    parser = argparse.ArgumentParser(prog="python -m kexue_utils.ledger", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect", help="write the register from the executed notebooks")
    one.add_argument("--notebooks", type=Path, default="notebooks", metavar="DIR")
    one.add_argument("--accept", default="", metavar="LABEL,…", help="equations that their old check still upholds")
    one.add_argument("--check", action="store_true", help="write nothing; fail if the register would change")
    for command in (one, commands.add_parser("status", help="sum the register up")):
        command.add_argument("--out", type=Path, default="book/ledger.json", metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        ledger = register.read(given.out)
        if given.command == "status":
            print(status(ledger))
            return 0
        accept = [label.strip() for label in given.accept.split(",") if label.strip()]
        text = register.dump(collect(given.notebooks, ledger, accept))
    except (Refused, ValueError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    if given.check:
        if not given.out.exists() or text != given.out.read_text(encoding="utf-8"):
            print(f"{given.out} is not what the notebooks say; run `make ledger`", file=sys.stderr)
            return 1
    else:
        given.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
