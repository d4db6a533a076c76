"""``@check``: runs a check where it is written, mutates it, and shows two lines with a bundle for the ledger."""

import os
import sys
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np

from . import kinds, mutants
from .digest import code_digest
from .errors import LedgerError, Refused
from .trial import DID_NOT_RUN, REJECTED, SURVIVED, Trial, Watch, empty_caches, mutable

MIME = "application/vnd.derivation-ledger+json"
packages = {__name__.split(".")[0]}  # whose functions a check must name; add your own book's package


def check(label, *, uses=(), of=(), same=None, found=(), draws=None, mutants=None, tight=0.0):
    """Check the equation ``label`` with the decorated function, at once.

    The function takes ``rng`` (numpy Generator), ``tight`` (for a bound), both or neither, and returns, or yields case
    by case, ``left, right, mistake, …``: both sides of the equation and at least one classic mistake.

    uses     labels that this equation is derived from
    of       functions, methods or classes of the library that the check exercises; each is mutated too
    same     {mutant name: reason} for mutants that mean the same; ``"f: name"`` for those of a function f
    found    errors in posts, papers or code that this check refutes: "source: what is wrong"
    draws    number of random draws (default by kind); mutants: try a subset of this size of each function's
    tight    (relative slack, reason) for a bound that is approached and not attained

    Raises LedgerError, three lines, when the equation does not hold or when the check could not fail.
    """

    def run(function):
        slack = tight[0] if isinstance(tight, tuple) else tight
        bundle = Examination(label, function, list(of), dict(same or {}), draws, mutants, slack).bundle()
        bundle |= {"uses": list(uses), "found": list(found)}
        display_bundle(bundle)
        return function

    return run


def cited(label, source, *, uses=()):
    """Register an equation that is taken from ``source`` and has no check: it counts against coverage."""
    display_bundle({"schema": 1, "label": label, "state": "cited", "kind": "cited", "evidence": source, "mistakes": 0,
                    "source": "", "uses": list(uses), "found": [], "mutants": {}, "functions": {}, "same": {}, "ran": {},
                    "subset": None})  # fmt: skip


class Examination:
    """Everything that one check has to pass; ``bundle()`` is the record of it."""

    def __init__(self, label, function, of, same, draws, limit, slack):
        self.label, self.function, self.same = label, function, same
        self.limit = None if os.environ.get("LEDGER_ALL_MUTANTS") else limit
        try:
            self.source = mutants.CheckSource(function)
            self.trial = Trial(function, label, draws=draws, slack=slack, literal=self.source.literal,
                               mistakes=self.source.mistakes)  # fmt: skip
            self.functions = mutants.functions_of(of)
            self._run()
        except Refused as refusal:
            raise LedgerError(label, "refused", *str(refusal).splitlines()) from None

    def _run(self):
        roots = package_roots()
        self.watch = Watch(self.function.__code__, roots.values(), {f.__code__.co_filename for f in self.functions})
        empty_caches(packages)
        try:
            with self.watch.on():
                failed = self.trial.settle()
        except (Refused, LedgerError):
            raise
        except Exception as error:
            raise LedgerError(self.label, "raised", f"{type(error).__name__}: {error}") from error
        if failed:
            draw, left, right = failed
            raise LedgerError(self.label, f"{self.trial.kind} · does not hold (draw {draw})", *difference(left, right)) from None
        self.proof = self.trial.prove() if self.trial.kind == "symbolic" else None
        self._named()
        fuel = 10 * self.watch.count + 1000
        loops = any("while" in line for f in [self.function, *self.functions] for line in mutants.source_of(f).lines)
        watch = Watch(self.function.__code__, roots.values(), self.watch.files, fuel) if loops else None
        with mutable(packages):
            self.own = {f"rhs → {text}": self.trial.verdict(factor=k) for text, k in [("2·rhs", 2), ("-rhs", -1)]}
            self.own |= self._verdicts(self.function, self.source.own_mutants(), watch)
            self.theirs, self.tried, self.all = {}, len(self.own), len(self.own)
            for function in self.functions:
                found = mutants.mutants_of(function, frozenset(self.watch.lines.get(function.__code__.co_filename, ())))
                chosen = sorted(found, key=lambda m: sha256(m.name.encode()).digest())[: self.limit]
                self.all, self.tried = self.all + len(found), self.tried + len(chosen)
                self.theirs[function] = self._verdicts(function, [m for m in found if m in chosen], watch)
        self._judge()

    def _verdicts(self, function, found, watch):
        verdicts = {}
        for mutant in found:
            empty_caches(packages)
            verdicts[mutant.name] = self.trial.verdict((function, mutant.code), watch=watch)
        return verdicts

    def _named(self):
        """A check that calls the library must name what it calls, and must call what it names."""
        known = {id(code) for f in self.functions for code in codes(f.__code__)}
        for code, module in self.watch.direct.items():
            if id(code) not in known and not code.co_filename.startswith("<string"):
                raise Refused(f"calls {module}.{code.co_qualname}: name it in of=[…], so that its mutants are tried")
        for function in self.functions:
            lines = self.watch.lines.get(function.__code__.co_filename, set())
            if not any(line in lines for c in codes(function.__code__) for _, _, line in c.co_lines()):
                if function.__code__.co_qualname.split(".")[0] not in {f.__code__.co_qualname.split(".")[0]
                                                                       for f in self.functions if f is not function}:  # fmt: skip
                    raise Refused(f"never calls {function.__qualname__}, which it names")

    def _judge(self):
        for function, verdicts in self.theirs.items():
            ran = [v for v in verdicts.values() if v != DID_NOT_RUN]
            if ran and REJECTED not in ran:
                raise Refused(f"blind: rejects none of {len(ran)} mutants of {function.__qualname__}")
        names = {n: v for n, v in self.own.items()}
        names |= {f"{f.__qualname__}: {n}": v for f, verdicts in self.theirs.items() for n, v in verdicts.items()}
        for name in self.same:
            if name not in names and self.limit is None:
                raise Refused(f"same names no mutant: {name!r}", *close_names(name, names))
            if names.get(name, SURVIVED) != SURVIVED:
                raise Refused(f"same explains a mutant that {names[name]}: {name!r}")

    def bundle(self):
        roots = package_roots()
        ran = {}
        for name in self.watch.lines:
            for package, root in roots.items():
                if name.startswith(root):
                    relative = f"{package}/{Path(name).relative_to(root).as_posix()}"
                    ran[relative] = code_digest(Path(name).read_text(encoding="utf-8"))
        text = self.source.source.text(self.source.source.node)
        return {
            "schema": 1, "label": self.label, "state": "holds", "kind": self.trial.kind, "evidence": self._evidence(),
            "mistakes": self.source.mistakes, "source": code_digest(text), "mutants": self.own,
            "functions": {f"{f.__module__}.{f.__qualname__}": v for f, v in self.theirs.items() if v}, "same": self.same,
            "ran": dict(sorted(ran.items())),
            "subset": {"tried": self.tried, "of": self.all} if self.tried < self.all else None,
        }  # fmt: skip

    def _evidence(self):
        trial = self.trial
        if trial.kind == "symbolic":
            return f"32 points, {self.proof}"
        if trial.kind == "rate":
            return "fitted slope"
        if trial.kind == "statistical":
            return "6 standard errors"
        draws = len({d for d, _ in trial.schedule()})
        if trial.has_rng:
            return f"{draws} draws, attained" if trial.has_tight else f"{draws} draws"
        return f"{trial.cases} case" + "s" * (trial.cases != 1)


def codes(code):
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from codes(constant)


def package_roots():
    """{package: its folder}, for the watched packages that are loaded."""
    return {p: str(Path(sys.modules[p].__file__).parent) + os.sep for p in sorted(packages) if p in sys.modules}


def close_names(name, names):
    from difflib import get_close_matches

    return [f"did you mean {match!r}" for match in get_close_matches(name, names, 3, 0.4)]


def difference(left, right):
    """Where two sides differ most, in two lines."""
    if any(map(kinds.is_sympy, kinds.parts(left))):
        return f"left   {str(left)[:60]}", f"right  {str(right)[:60]}"
    if isinstance(left, kinds.Slope):
        return f"left   slope {left.fitted:.3f}, last pair {left.last:.3f}", f"right  {right}"
    for a, b in zip(kinds.parts(left), kinds.parts(right), strict=False):
        a, b = np.asarray(a.mean if isinstance(a, kinds.Mean) else kinds.to_array(a)), kinds.to_array(b)
        if a.shape != b.shape or not a.size:
            return f"left   shape {a.shape}", f"right  shape {b.shape}"
        if a.dtype == object or a.dtype.kind in "iub":
            unequal = np.flatnonzero((a != b).reshape(-1))
        else:
            gap = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), np.inf).reshape(-1)
            unequal = [] if kinds.close(a, b) else [int(gap.argmax())]
        if len(unequal):
            at = f" at {tuple(int(i) for i in np.unravel_index(unequal[0], a.shape))}" if a.ndim else ""
            show = lambda x: str(x) if isinstance(x, (Fraction, int)) else f"{x:.6g}"  # noqa: E731
            x, y = a.reshape(-1)[unequal[0]].item() if a.dtype != object else a.reshape(-1)[unequal[0]], b.reshape(-1)[unequal[0]]
            return f"left   {show(x)}{at}", f"right  {show(y.item() if hasattr(y, 'item') else y)}"
    return "left and right differ",


def summary(bundle):
    """The two short lines under a check."""

    def score(verdicts):
        ran = [v for v in verdicts.values() if v != DID_NOT_RUN]
        return f"{ran.count(REJECTED)}/{len(ran)}"

    if bundle["state"] == "cited":
        return f"○ {bundle['label']} · cited: {bundle['evidence']}"
    open_ = [n for n, v in bundle["mutants"].items() if v == SURVIVED and n not in bundle["same"]]
    lines = [f"{'▲' if open_ else '✓'} {bundle['label']} · {bundle['kind']}, {bundle['evidence']} · {score(bundle['mutants'])} mutants"]
    others = [f"{name.rsplit('.', 1)[-1]} {score(v)}" for name, v in bundle["functions"].items()]
    if bundle["subset"]:
        others.append("{tried} of {of} tried".format(**bundle["subset"]))
    while others:
        line = "  " + others.pop(0)
        while others and len(line) + len(others[0]) < 58:
            line += " · " + others.pop(0)
        lines.append(line)
    return "\n".join(lines + [f"  survives without a reason: {name}" for name in open_])


def display_bundle(bundle):
    """Show the lines in a notebook, with the bundle beside them; elsewhere, print the lines."""
    records.append(bundle)
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        from IPython.display import display

        display({"text/plain": summary(bundle), MIME: bundle}, raw=True)
    else:
        print(summary(bundle))


records = []  # bundles of this process, for tests and scripts
