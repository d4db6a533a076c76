"""One run of a check: seeded draws, the rule of its kind, a trace of what it executed, and its mutants' verdicts."""

import io
import os
import random
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path

import numpy as np

from . import kinds
from .errors import Refused
from .mutants import swapped

REJECTED, SURVIVED, DID_NOT_RUN = "rejected", "survived", "did not run"
DIFFER = 0.9  # a classic mistake must differ on this share of the draws
HERE = str(Path(__file__).parent)


class Exhausted(BaseException):
    """A mutant executed ten times the lines of the original: an endless loop."""


class Watch:
    """Traces lines of the check, of the watched packages and of notebook functions; counts them as fuel."""

    def __init__(self, check_code, roots, extra_files=(), fuel=None):
        self.check, self.roots, self.fuel = check_code, tuple(roots), fuel
        self.files = {check_code.co_filename, *extra_files}
        self.lines, self.count, self.direct, self.seen = {}, 0, {}, {}
        end = max(line for _, _, line in check_code.co_lines() if line)
        stack = [check_code]
        while stack:
            code = stack.pop()
            end = max([end, *(line for _, _, line in code.co_lines() if line)])
            stack += [c for c in code.co_consts if hasattr(c, "co_code")]
        self.span = range(check_code.co_firstlineno, end + 1)

    def watched(self, code):
        name = code.co_filename
        if name not in self.seen:
            ours = name.startswith(self.roots) and not name.startswith(HERE)
            self.seen[name] = ours or name in self.files
        return self.seen[name]

    def within_check(self, code):
        return code.co_filename == self.check.co_filename and code.co_firstlineno in self.span

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if not self.watched(code):
            return None
        if not self.within_check(code) and code not in self.direct:
            caller, sampler = frame.f_back, takes_generator(frame)
            while caller is not None and not self.watched(caller.f_code) and not caller.f_code.co_filename.startswith(HERE):
                sampler = sampler or takes_generator(caller)
                caller = caller.f_back
            if caller is not None and self.within_check(caller.f_code) and not sampler:
                self.direct[code] = frame.f_globals.get("__name__", "?")
        lines = self.lines.setdefault(code.co_filename, set())

        def local(frame, event, argument):
            if event == "line":
                lines.add(frame.f_lineno)
                self.count += 1
                if self.fuel is not None and self.count > self.fuel:
                    raise Exhausted
            return local

        lines.add(frame.f_lineno)
        return local

    @contextmanager
    def on(self):
        before = sys.gettrace()  # a debugger's or coverage's: put back afterwards
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def takes_generator(frame):
    """A function that is handed the random generator makes inputs; a check need not name it."""
    return any(isinstance(value, np.random.Generator) for value in frame.f_locals.values())


class Trial:
    """A check's function with everything that fixes its outcome: label (seeds), draws, kind, slack."""

    def __init__(self, function, label, *, draws=None, slack=0.0, literal=False, mistakes=1):
        self.function, self.label, self.slack = function, label, slack
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        if extra := set(names) - {"rng", "tight"}:
            raise Refused(f"a check takes rng and tight, not {', '.join(sorted(extra))}")
        self.has_rng, self.has_tight = "rng" in names, "tight" in names
        self.literal, self.draws, self.kind, self.mistakes = literal, draws, None, mistakes

    def call(self, draw, tight=False):
        """The cases of one draw; the seed depends on the label and the draw alone."""
        shift = int(os.environ.get("LEDGER_SEED_SHIFT", "0"))
        seed = [int.from_bytes(sha256(self.label.encode()).digest()[:8], "big"), draw, int(tight), shift]
        rng = np.random.default_rng(seed)
        random.seed(draw)
        if (torch := sys.modules.get("torch")) is not None:
            torch.manual_seed(seed[0] % 2**31 + draw + 1000 * shift)
        arguments = {"rng": rng} if self.has_rng else {}
        if self.has_tight:
            arguments["tight"] = tight
        before = rng.bit_generator.state
        cases = kinds.as_cases(self.function(**arguments))
        self.drew = not self.has_rng or before != rng.bit_generator.state
        return cases

    def schedule(self):
        """(draw, tight) of every call; a bound is called once more with tight on each draw."""
        draws = range(self.draws or (kinds.DRAWS[self.kind] if self.has_rng else 1))
        return [(d, tight) for tight in ([False, True] if self.has_tight else [False]) for d in draws]

    def settle(self):
        """Run everything once: sets the kind, raises Refused or returns the first case that does not hold."""
        cases = self.call(0)
        self.kind = kinds.classify(cases, has_rng=self.has_rng, has_tight=self.has_tight, literal=self.literal)
        needed = max(self.mistakes, 1)
        if any(len(mistakes) < needed for *_, mistakes in cases):
            raise Refused("no classic mistake is returned: say what the equation is often confused with")
        told, frozen, self.cases = [[] for _ in range(needed)], set(), 0
        for draw, tight in self.schedule():
            cases = self.call(draw, tight)
            if not self.drew:
                raise Refused("rng is never used: every draw is the same")
            frozen.add(tuple((kinds.frozen(left), kinds.frozen(right)) for left, right, _ in cases))
            differs = [False] * needed
            for left, right, mistakes in cases:
                self.cases += 1
                if not self.case_holds(left, right, mistakes, draw, tight):
                    return draw, left, right
                for k in range(needed):
                    differs[k] = differs[k] or self.mistaken(left, mistakes[k], draw, tight)
            for k in range(needed):
                told[k].append(differs[k])
        if self.has_rng and len(frozen) == 1 and len(self.schedule()) > 1:
            raise Refused("both sides are the same on every draw: what is drawn never reaches them")
        for k, differs in enumerate(told):
            share = sum(differs) / len(differs)
            if not any(differs) or self.kind != "bound" and share < DIFFER:
                raise Refused(f"classic mistake {k + 1} differs on {sum(differs)} of {len(differs)} draws: it must be told apart")
        return None

    def mistaken(self, left, mistake, draw, tight):
        if self.kind == "rate":
            return True  # it sets the tolerance
        if self.kind == "symbolic":
            from . import symbolic

            return not symbolic.agree(left, mistake, np.random.default_rng([draw, 1]))
        if self.kind == "bound":
            return not kinds.holds("bound", left, mistake, tight=tight, slack=self.slack)
        return kinds.differs(self.kind, left, mistake)

    def case_holds(self, left, right, mistakes, draw, tight):
        if self.kind != "symbolic":
            kind = "numeric" if self.kind == "definition" else self.kind
            return kinds.holds(kind, left, right, mistakes, tight, self.slack)
        from . import symbolic

        pairs = zip(kinds.parts(left), kinds.parts(right), strict=True)
        return all(symbolic.agree(a, b, np.random.default_rng([draw, 1])) for a, b in pairs)

    def prove(self):
        from . import symbolic

        rungs = [symbolic.prove(a, b) for draw, tight in self.schedule() for left, right, _ in self.call(draw, tight)
                 for a, b in zip(kinds.parts(left), kinds.parts(right), strict=True)]  # fmt: skip
        return max(rungs, key=list(symbolic.LADDER).index)

    def survives(self, factor=1):
        """Does the check still hold, with the right side times ``factor``? Ends at the first draw that fails."""
        for draw, tight in self.schedule():
            for left, right, mistakes in self.call(draw, tight):
                if factor != 1:
                    right = kinds.scaled(right, factor)
                if not self.case_holds(left, right, mistakes, draw, tight):
                    return False
        return True

    def verdict(self, mutated=None, factor=1, watch=None):
        """Rejected, survived, or did not run; ``mutated`` is (function, code) to swap in."""
        try:
            with silence():
                if watch is not None:
                    watch.count = 0
                with swapped(*mutated) if mutated else nothing(), watch.on() if watch else nothing():
                    return SURVIVED if self.survives(factor) else REJECTED
        except ArithmeticError:
            return REJECTED
        except (Exception, Exhausted):
            return DID_NOT_RUN


@contextmanager
def nothing():
    yield


@contextmanager
def silence():
    """Mutants warn, print and divide by zero; none of it belongs on the page."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def mutable(packages):
    """Caches emptied and compiled code set aside, so that a mutant is seen; both restored afterwards."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        sys.modules["torch"].compiler.set_stance("force_eager")
    try:
        yield
    finally:
        if dynamo is not None:
            sys.modules["torch"].compiler.set_stance("default")
        empty_caches(packages)


def empty_caches(packages):
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in packages or name == "__main__":
            if name.startswith(__package__):
                continue
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
