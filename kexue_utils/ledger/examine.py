"""``@check``: runs a check where it is written, mutates it, and shows two lines with a bundle for the ledger."""

import os
import sys
import traceback
from difflib import get_close_matches
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np

from . import kinds, mutants
from .digest import code_digest
from .errors import LedgerError, Refused
from .sides import CheckSource
from .trial import DID_NOT_RUN, REJECTED, SURVIVED, Trial, Watch, caches, eager

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

    for name, value in [("uses", uses), ("of", of), ("found", found)]:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {value!r}")
    slack = tight[0] if isinstance(tight, tuple) else 0.0
    if tight and not (isinstance(tight, tuple) and len(tight) == 2 and 0 < slack <= 0.1 and tight[1]):
        raise ValueError(f"tight must be (relative slack up to 0.1, reason), got {tight!r}")

    def run(function):
        bundle = Examination(label, function, of, dict(same or {}), draws, mutants, slack).bundle()
        bundle |= {"uses": list(uses), "found": list(found)}
        display_bundle(bundle)
        return function

    return run


def cited(label, source, *, uses=()):
    """Register an equation that is taken from ``source`` and has no check: it counts against coverage."""
    display_bundle({"schema": 1, "label": label, "state": "cited", "kind": "cited", "evidence": source,
                    "mistakes": 0, "source": "", "uses": list(uses), "found": [], "mutants": {}, "functions": {},
                    "same": {}, "ran": {}, "subset": None})  # fmt: skip


class Examination:
    """Everything that one check has to pass; ``bundle()`` is the record of it."""

    def __init__(self, label, function, of, same, draws, subset, slack):
        self.label, self.function, self.same = label, function, same
        self.named = [(item if isinstance(item, type) else mutants.layers(item)[-1]).__qualname__ for item in of]
        self.subset = None if os.environ.get("LEDGER_ALL_MUTANTS") else subset
        self.items = [mutants.functions_of(item) for item in of]
        self.functions = list(dict.fromkeys(layers[-1] for item in self.items for layers in item))
        try:
            self.source = CheckSource(function)
            self.trial = Trial(function, label, draws=draws, slack=slack, literal=self.source.literal,
                               mistakes=self.source.mistakes)  # fmt: skip
            with eager():
                self._run()
        except Refused as refusal:
            raise LedgerError(label, "refused", *refusal.args) from None

    def _run(self):
        files = {f.__code__.co_filename for f in self.functions}
        self.watch = Watch(self.function, package_roots().values(), files)
        self.caches = caches(packages, [self.function, *self.functions])
        self._empty_caches()
        try:
            with self.watch.on():
                failed = self.trial.settle()
        except (Refused, LedgerError):
            raise
        except Exception as error:
            file = self.function.__code__.co_filename
            at = [f"in  {f.line}" for f in traceback.extract_tb(error.__traceback__) if f.filename == file and f.line]
            raise LedgerError(self.label, "raised", f"{type(error).__name__}: {error}", *at[-1:]) from error
        if failed:
            problem = f"{self.trial.kind} · does not hold (draw {failed[0]})"
            raise LedgerError(self.label, problem, *difference(*failed[1:]))
        self.proof = self.trial.prove() if self.trial.kind == "symbolic" else None
        self._compare_names_with_calls()
        self._mutate(Watch(self.function, package_roots().values(), files, fuel=10 * self.watch.count + 1000))
        self._judge()

    def _compare_names_with_calls(self):
        """A check must name what it calls, and call what it names, or else f(x) = f(x) would pass."""
        known = {id(f.__code__) for item in self.items for layers in item for f in layers}
        self.helpers = []
        for key, (code, space) in self.watch.direct.items():
            generated = code.co_filename.startswith("<string")  # by a dataclass
            if key in known or generated or code.co_name in self.source.only_in_mistakes():
                continue
            if space is not self.function.__globals__:
                raise Refused(f"calls {space['__name__']}.{code.co_qualname}",
                              "name it in of=[…], so that its mutants are tried")  # fmt: skip
            if code.co_name not in self.source.only_in_inputs():
                self.helpers.append(code)
        for item, name in zip(self.items, self.named, strict=True):
            if not any(id(layers[-1].__code__) in self.watch.called for layers in item):
                raise Refused(f"never calls {name}, which it names")

    def _mutate(self, watch):
        """The verdicts on the check's own mutants, and on those of each function on the lines that it executed."""
        whole = {"rhs → 2·rhs": lambda side: 2 * side, "rhs → -rhs": lambda side: -1 * side}
        if self.trial.zero:  # 2·0 = -0 = 0
            whole = {"rhs → rhs + 1": lambda side: side + 1}
        own, self.theirs, self.left_out = self.source.own_mutants(), {}, set()
        self.own = {name: self.trial.verdict(watch, change=change) for name, change in whole.items()}
        self.own |= self._verdicts(watch, self.function, own)
        for function in self.functions:
            lines = self.watch.lines.get(function.__code__.co_filename, set())
            found = mutants.mutants_of(function, lines)
            by_hash, verdicts = sorted(found, key=lambda name: sha256(name.encode()).digest()), {}
            for number, name in enumerate(by_hash, 1):
                verdicts |= self._verdicts(watch, function, {name: found[name]})
                if number >= (self.subset or len(found)) and REJECTED in verdicts.values():
                    break
            self.left_out |= {f"{function.__qualname__}: {name}" for name in found if name not in verdicts}
            self.theirs[function] = {name: verdicts[name] for name in found if name in verdicts}
            if {*self.theirs[function].values()} == {DID_NOT_RUN}:
                more = mutants.mutants_of(function, lines, doubled=True)
                self.theirs[function] |= self._verdicts(watch, function, more)
        for code in self.helpers:
            self._not_blind(watch, code)
        self._empty_caches()
        if not self.trial.survives():
            raise Refused("does not hold when it is run again: it changes something outside itself")

    def _not_blind(self, watch, code):
        """A notebook's own function need not be named, but f(x) = f(x) must not pass."""
        function = next((f for f in every_function(self.function.__globals__) if f.__code__ is code), None)
        found = mutants.mutants_of(function, self.watch.lines[code.co_filename]) if function else {}
        verdicts = []
        for name, compiled in found.items():
            verdicts += self._verdicts(watch, function, {name: compiled}).values()
            if REJECTED in verdicts:
                return
        if SURVIVED in verdicts:
            raise Refused(f"blind: no change of {code.co_qualname} is noticed",
                          "(if it makes inputs, call it once for both sides, or hand it rng)")  # fmt: skip

    def _verdicts(self, watch, function, found):
        verdicts = {}
        for name, compiled in found.items():
            self._empty_caches()
            verdicts[name] = self.trial.verdict(watch, function=function, compiled=compiled)
        return verdicts

    def _empty_caches(self):
        for cache in self.caches:
            cache.cache_clear()

    def _judge(self):
        for item, name in zip(self.items, self.named, strict=True):
            verdicts = [v for layers in item for v in self.theirs[layers[-1]].values()]
            if REJECTED not in verdicts:
                ran = sum(v != DID_NOT_RUN for v in verdicts)
                raise Refused(f"blind: rejects none of {ran} mutants of {name}",
                              "(what only makes inputs can take rng, or be called outside the check)")  # fmt: skip
        names = dict(self.own)
        for function, verdicts in self.theirs.items():
            names |= {f"{function.__qualname__}: {name}": verdict for name, verdict in verdicts.items()}
        for name in self.same:
            if name not in names and name not in self.left_out:
                close = get_close_matches(name, [*names, *self.left_out], 3, 0.3)
                raise Refused(f"same names no mutant: {name!r}", *(f"did you mean {match!r}" for match in close))
            if names.get(name, SURVIVED) != SURVIVED:
                raise Refused(f"same explains a mutant that is {names[name]}: {name!r}".replace("is did", "did"))

    def bundle(self):
        ran = {}
        for name in self.watch.lines:
            for package, root in package_roots().items():
                if name.startswith(root):
                    relative = f"{package}/{Path(name).relative_to(root).as_posix()}"
                    ran[relative] = code_digest(Path(name).read_text(encoding="utf-8"))
        tried = len(self.own) + sum(map(len, self.theirs.values()))
        source = self.source.source
        return {
            "schema": 1, "label": self.label, "state": "holds", "evidence": self._evidence(),
            "kind": "numeric" if self.trial.kind == "symbolic" and not self.proof else self.trial.kind,
            "mistakes": self.source.mistakes, "source": code_digest(source.text(source.node, one_line=False)),
            "mutants": self.own,
            "functions": {f"{f.__module__}.{f.__qualname__}": v for f, v in self.theirs.items() if v},
            "same": self.same, "ran": dict(sorted(ran.items())),
            "subset": {"tried": tried, "of": tried + len(self.left_out)} if self.left_out else None,
        }  # fmt: skip

    def _evidence(self):
        trial = self.trial
        if trial.kind == "symbolic":
            return f"32 points, {self.proof}" if self.proof else "sympy cannot decide"
        if trial.kind in ("rate", "statistical"):
            return {"rate": "fitted slope", "statistical": "6 standard errors"}[trial.kind]
        if trial.has_rng:
            reached = f", within {trial.slack:g}" if trial.slack else ", attained"
            return f"{len({draw for draw, _ in trial.schedule()})} draws" + reached * trial.has_tight
        return f"{len(trial.cases)} case" + "s" * (len(trial.cases) != 1)


def every_function(space):
    """The Python functions that a notebook defines, in its classes too."""
    for value in list(space.values()):
        if isinstance(value, type) and value.__module__ == space["__name__"]:
            yield from (layers[-1] for layers in mutants.functions_of(value))
        elif callable(value):
            try:
                yield from mutants.layers(value)
            except TypeError:
                continue


def package_roots():
    """{package: its folder}, for the watched packages that are loaded."""
    return {p: str(Path(sys.modules[p].__file__).parent) + os.sep for p in sorted(packages) if p in sys.modules}


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
            with np.errstate(invalid="ignore"):
                gap = np.nan_to_num(np.abs(a - b), nan=np.inf).reshape(-1)
            unequal = [int(gap.argmax())] if gap.max() > 0 else []
        if len(unequal):
            at = f" at {tuple(int(i) for i in np.unravel_index(unequal[0], a.shape))}" if a.ndim else ""
            show = lambda x: str(x) if isinstance(x, (Fraction, int)) else f"{x:.6g}"  # noqa: E731
            x, y = a.astype(object).reshape(-1)[unequal[0]], b.astype(object).reshape(-1)[unequal[0]]
            return f"left   {show(x)}{at}", f"right  {show(y)}"
    return "left and right differ",


def summary(bundle):
    """The two short lines under a check."""

    def score(verdicts):
        ran = [v for v in verdicts.values() if v != DID_NOT_RUN]
        return f"{ran.count(REJECTED)}/{len(ran)}"

    if bundle["state"] == "cited":
        return f"○ {bundle['label']} · cited: {bundle['evidence']}"
    unexplained = [n for n, v in bundle["mutants"].items() if v == SURVIVED and n not in bundle["same"]]
    first = [f"{'▲' if unexplained else '✓'} {bundle['label']}", f"{bundle['kind']}, {bundle['evidence']}",
             f"{score(bundle['mutants'])} mutants"]  # fmt: skip
    second = [f"{name.rsplit('.', 1)[-1]} {score(verdicts)}" for name, verdicts in bundle["functions"].items()]
    if bundle["subset"]:
        second.append("{tried} of {of} tried".format(**bundle["subset"]))
    lines = filled(first) + ["  " + line for line in filled(second)]
    return "\n".join(lines + [f"  survives without a reason: {name}" for name in unexplained])


def filled(pieces, width=58):
    """Pieces joined by a dot, in lines that a page's column does not cut off."""
    lines = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) < width:
            lines[-1] += " · " + piece
        else:
            lines.append(("  " if lines else "") + piece)
    return lines


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
