"""``@check``: runs a check where it is written, mutates it, and shows two lines with a bundle for the ledger."""

import gc
import inspect
import os
import traceback
from contextlib import nullcontext
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from . import mutants
from .digest import code_digest
from .errors import LedgerError, Refused
from .show import difference, display_bundle
from .sides import CheckSource
from .trial import DID_NOT_RUN, REJECTED, SURVIVED, Trial, caches, eager
from .watch import Watch, package_path, packages


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
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {value!r}")
    slack = tight[0] if isinstance(tight, tuple) else 0.0
    if tight and not (isinstance(tight, tuple) and len(tight) == 2 and 0 < slack <= 0.1 and tight[1]):
        raise ValueError(f"tight must be (relative slack up to 0.1, reason), got {tight!r}")

    def run(function):
        bundle = Examination(label, function, of, dict(same or {}), draws, mutants, slack).bundle()
        display_bundle(bundle | {"uses": list(uses), "found": list(found)})
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
        self.subset = None if os.environ.get("LEDGER_ALL_MUTANTS") else subset
        # What is named: [(name, its functions, each in its layers)]
        self.named = [((item if inspect.isclass(item) else mutants.layers(item)[-1]).__qualname__,
                       mutants.functions_of(item)) for item in of]  # fmt: skip
        self.functions = list(dict.fromkeys(layers[-1] for _, found in self.named for layers in found))
        self.files = {f.__code__.co_filename for f in self.functions}
        try:
            self.source = CheckSource(function)
            self.trial = Trial(function, label, draws=draws, slack=slack, literal=self.source.literal,
                               mistakes=self.source.mistakes)  # fmt: skip
            self.caches = caches(packages, [function, *self.functions])
            with eager():
                self.hold()
                helpers = self.compare_names_with_calls()
                self.mutate(helpers)
            self.judge()
        except Refused as refusal:
            raise LedgerError(label, "refused", *refusal.args) from None

    def hold(self):
        """The equation holds, on every draw."""
        self.watch = Watch(self.function, self.files)
        self.empty_caches()
        try:
            with self.watch.on():
                failed = self.trial.settle()
        except Refused:
            raise
        except Exception as error:
            file = self.function.__code__.co_filename
            at = [f"in  {f.line}" for f in traceback.extract_tb(error.__traceback__) if f.filename == file and f.line]
            raise LedgerError(self.label, "raised", f"{type(error).__name__}: {error}", *at[-1:]) from error
        if failed:
            problem = f"{self.trial.kind} · does not hold (draw {failed[0]})"
            raise LedgerError(self.label, problem, *difference(*failed[1:]))
        self.proof = self.trial.prove() if self.trial.kind == "symbolic" else None

    def compare_names_with_calls(self):
        """A check must name what it calls, and call what it names, or else f(x) = f(x) would pass.

        Returns the notebook's own functions: they need not be named.
        """
        for name, found in self.named:
            if not any(id(layers[-1].__code__) in self.watch.called for layers in found):
                raise Refused(f"never calls {name}, which it names")
        known = {id(f.__code__) for _, found in self.named for layers in found for f in layers}
        helpers = []
        for key, (code, space, sites) in self.watch.direct.items():
            if key in known or mutants.is_generated(code) or self.source.serves_mistakes_alone(sites):
                continue
            if space is not self.function.__globals__:
                raise Refused(f"calls {space['__name__']}.{code.co_qualname}",
                              "name it in of=[…], so that its mutants are tried")  # fmt: skip
            if not self.source.serves_as_input(sites):
                helpers += [space[code.co_name]] if is_of(space.get(code.co_name), code) else owner(code)
        return helpers

    def mutate(self, helpers):
        """The verdicts on the check's own mutants, and on those of each function on the lines that it executed."""
        self.fuelled = Watch(self.function, self.files, fuel=10 * self.watch.count + 1000)
        whole = {"rhs → 2·rhs": lambda side: 2 * side, "rhs → -rhs": lambda side: -1 * side}
        if self.trial.zero:  # 2·0 = -0 = 0
            whole = {"rhs → rhs + 1": lambda side: side + 1}
        self.own = {name: self.verdict(lambda change=change: nullcontext(change)) for name, change in whole.items()}
        self.own |= self.verdicts(self.function, self.source.own_mutants())
        self.theirs, self.left_out = {}, set()
        for function in self.functions:
            verdicts, left_out = self.sample(function, self.subset)
            self.theirs[function] = verdicts
            self.left_out |= {f"{function.__qualname__}: {name}" for name in left_out}
        for function in helpers:
            verdicts, _ = self.sample(function, 1)
            if SURVIVED in verdicts.values() and REJECTED not in verdicts.values():
                raise Refused(f"blind: no change of {function.__qualname__} is noticed",
                              "(if it makes inputs, call it once for both sides, or hand it rng)")  # fmt: skip
        self.empty_caches()
        if not self.trial.survives():
            raise Refused("does not hold when it is run again: it changes something outside itself")

    def sample(self, function, size):
        """The verdicts on a function's mutants, all or ``size`` by hash and until one is rejected; what is left out."""
        lines = self.watch.lines.get(function.__code__.co_filename, set())
        found, verdicts = mutants.mutants_of(function, lines), {}
        for number, name in enumerate(sorted(found, key=lambda name: sha256(name.encode()).digest()), 1):
            verdicts |= self.verdicts(function, {name: found[name]})
            if number >= (size or len(found)) and REJECTED in verdicts.values():
                break
        left_out = found.keys() - verdicts.keys()
        verdicts = {name: verdicts[name] for name in found if name in verdicts}
        if set(verdicts.values()) == {DID_NOT_RUN}:
            verdicts |= self.verdicts(function, mutants.mutants_of(function, lines, doubled=True))
        return verdicts, left_out

    def verdicts(self, function, found):
        return {name: self.verdict(lambda compiled=compiled: mutants.swapped(function, compiled()))
                for name, compiled in found.items()}  # fmt: skip

    def verdict(self, mutation):
        self.empty_caches()
        return self.trial.verdict(self.fuelled, mutation)

    def empty_caches(self):
        for cache in self.caches:
            cache.cache_clear()

    def judge(self):
        """Something is noticed, of every function that is named too; every reason explains a mutant that survives."""
        for name, found in self.named:
            verdicts = [verdict for layers in found for verdict in self.theirs[layers[-1]].values()]
            if REJECTED not in verdicts:
                ran = sum(v != DID_NOT_RUN for v in verdicts)
                raise Refused(f"blind: rejects none of {ran} mutants of {name}",
                              "(what only makes inputs can take rng, or be called outside the check)")  # fmt: skip
        if REJECTED not in self.own.values() and not self.named:
            raise Refused("no change of the right side is noticed: return numbers, or name the function in of=[…]")
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
        paths = {package_path(file): Path(file) for file in self.watch.lines if package_path(file)}
        tried = len(self.own) + sum(map(len, self.theirs.values()))
        source = self.source.source
        return {
            "schema": 1, "label": self.label, "state": "holds", "evidence": self.evidence(),
            "kind": "numeric" if self.trial.kind == "symbolic" and not self.proof else self.trial.kind,
            "mistakes": self.source.mistakes, "source": code_digest(source.text(source.node, one_line=False)),
            "mutants": self.own,
            "functions": {f"{f.__module__}.{f.__qualname__}": v for f, v in self.theirs.items() if v},
            "same": self.same,
            "ran": {path: code_digest(paths[path].read_text(encoding="utf-8")) for path in sorted(paths)},
            "subset": {"tried": tried, "of": tried + len(self.left_out)} if self.left_out else None,
        }  # fmt: skip

    def evidence(self):
        trial = self.trial
        if trial.kind == "symbolic":
            return f"32 points, {self.proof}" if self.proof else "sympy cannot decide"
        if trial.kind in ("rate", "statistical"):
            return {"rate": "fitted slope", "statistical": "6 standard errors"}[trial.kind]
        if trial.has_rng:
            reached = f", within {trial.slack:g}" if trial.slack else ", attained"
            return f"{len({draw for draw, _ in trial.schedule()})} draws" + reached * trial.has_tight
        return f"{len(trial.cases)} case" + "s" * (len(trial.cases) != 1)


def is_of(function, code):
    return inspect.isfunction(function) and function.__code__ is code


def owner(code):
    """The function of a code object, wherever it is kept: asks every object there is, so only for what has no name."""
    return [f for f in gc.get_referrers(code) if is_of(f, code)][:1]
