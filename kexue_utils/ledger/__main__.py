"""`python -m kexue_utils.ledger collect | status`: write the register from the executed notebooks, or sum it up."""

import argparse
import sys
from pathlib import Path

from . import register
from .collect import Refused, collect


def status(ledger):
    """The register in a few lines of text: coverage, kinds, both mutation scores, survivors."""
    kinds, own, shared = register.totals(ledger)
    rows = [("equations checked", f"{len(register.covered(ledger))}/{len(ledger['equations'])}")]
    rows += [(f"  {kind}", kinds[kind]) for kind in register.KINDS if kinds[kind]]
    rows += [("mutants of equations rejected", "{}/{}".format(*own))]
    rows += [("mutants of functions rejected", "{}/{}".format(*shared))]
    lines = [f"{name:<32}{value}" for name, value in rows]
    lines += [f"unchecked  {label}" for label in sorted(ledger["equations"].keys() - register.checks(ledger).keys())]
    for labels, function, mutant, reason in register.survivors(ledger):
        lines.append(f"survivor   {function or labels[0]}: {mutant}  ({reason or 'NO REASON'})")
    return "\n".join(lines)


def main(arguments=None):
    """Runs one command and returns its exit status: 0, or 1 where something is refused."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
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
        text = register.dump(collect(given.notebooks, ledger, given.accept.replace(",", " ").split()))
    except (Refused, ValueError) as refusal:
        print(refusal, file=sys.stderr)
        return 1
    if not given.check:
        given.out.write_text(text, encoding="utf-8")
    elif not given.out.exists() or text != given.out.read_text(encoding="utf-8"):
        print(f"{given.out} is not what the notebooks say; run {register.COLLECT} and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
