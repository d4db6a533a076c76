"""One check, run: seeded draws, the rule of its kind, and whether it still holds with a mutant in place."""

import gc
import inspect
import io
import os
import random
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from hashlib import sha256

import numpy as np

from . import kinds
from .errors import Refused
from .sides import INPUTS
from .watch import Exhausted

REJECTED, SURVIVED, DID_NOT_RUN = "rejected", "survived", "did not run"
DIFFER = 0.9  # a classic mistake must differ on this share of the draws
SECONDS = 60  # for one proof; behind the fuel, for one mutant too


class Trial:
    """A check's function with everything that fixes its outcome: label (seeds), draws, kind, slack."""

    def __init__(self, function, label, *, draws=None, slack=0.0, literal=False, mistakes=1):
        self.function, self.label, self.slack = function, label, slack
        self.takes = set(inspect.signature(function).parameters)
        if others := self.takes - INPUTS:
            raise Refused(f"a check takes rng and tight, not {', '.join(sorted(others))}")
        self.has_rng, self.has_tight = "rng" in self.takes, "tight" in self.takes
        self.literal, self.draws, self.kind, self.mistakes = literal, draws, None, max(mistakes, 1)

    def call(self, draw, tight=False):
        """The cases of one draw; the seed depends on the label and the draw alone."""
        shift = int(os.environ.get("LEDGER_SEED_SHIFT", "0"))
        seed = [int.from_bytes(sha256(self.label.encode()).digest()[:8], "big"), draw, int(tight), shift]
        rng = np.random.default_rng(seed)
        arguments = {"rng": rng, "tight": tight}
        with seeded((seed[0] + 8 * draw + 4000 * shift + tight) % 2**63):
            return kinds.as_cases(self.function(**{name: arguments[name] for name in self.takes}))

    def schedule(self):
        """(draw, tight) of every call; a bound is called once more with tight on each draw."""
        draws = range(self.draws or (kinds.DRAWS[self.kind] if self.has_rng else 1))
        return [(d, tight) for tight in ([False, True] if self.has_tight else [False]) for d in draws]

    def settle(self):
        """Run everything once: sets the kind, raises Refused, or returns the first case that does not hold."""
        cases = self.call(0)
        self.kind = kinds.classify(cases, has_rng=self.has_rng, has_tight=self.has_tight, literal=self.literal)
        self.cases, told, values = [], [], set()
        for draw, tight in self.schedule():
            cases = self.call(draw, tight)
            if any(len(mistakes) < self.mistakes for *_, mistakes in cases):
                raise Refused("no classic mistake is returned: say what the equation is often confused with")
            for left, right, mistakes in cases:
                if not kinds.holds(self.kind, left, right, mistakes, tight, self.slack):
                    return draw, left, right
            if not tight:
                self.cases += cases
                values.add(tuple((kinds.frozen(left), kinds.frozen(right)) for left, right, _ in cases))
            told.append([
                any(kinds.differs(self.kind, left, right, mistakes[k], tight, self.slack)
                    for left, right, mistakes in cases)
                for k in range(self.mistakes)
            ])  # fmt: skip
        if self.has_rng and len(values) == 1 and len(told) > 1 + self.has_tight:
            raise Refused("both sides are the same on every draw: what is drawn never reaches them")
        for k, differs in enumerate(zip(*told, strict=True)):
            if not any(differs) or self.kind != "bound" and sum(differs) < DIFFER * len(differs):
                raise Refused(f"classic mistake {k + 1} differs on {sum(differs)} of {len(differs)} draws",
                              "it must be told apart from the equation (on 90 % of the draws)")  # fmt: skip
        kinds.inspect(self.kind, self.cases, self.literal)
        self.zero = kinds.is_zero([right for _, right, _ in self.cases])
        return None

    def prove(self):
        """The rung of sympy's ladder that proves every case; None if one is out of its reach."""
        from . import symbolic

        with limit(SECONDS, "sympy did not decide in {} s: split the identity, or return floats (numeric)"):
            rungs = {symbolic.prove(a, b) for left, right, _ in self.cases for a, b in kinds.pairs(left, right)}
        return None if None in rungs else max(rungs, key=list(symbolic.LADDER).index)

    def survives(self, change=None):
        """Does the check still hold, with ``change`` made to its right side? Ends at the first draw that fails."""
        for draw, tight in self.schedule():
            for left, right, mistakes in self.call(draw, tight):
                right = kinds.changed(right, change) if change else right
                if not kinds.holds(self.kind, left, right, mistakes, tight, self.slack):
                    return False
        return True

    def verdict(self, watch, mutation):
        """Rejected, survived, or did not run; ``mutation()``: a context that may give a change of the right side."""
        try:
            with silence(), limit(SECONDS, "out of time"), watch.on(), mutation() as change:
                return SURVIVED if self.survives(change) else REJECTED
        except ArithmeticError:
            return REJECTED
        except (Exception, Exhausted):
            return DID_NOT_RUN


@contextmanager
def seeded(seed):
    """The global generators of random and torch, seeded for one draw and then put back as they were."""
    torch = sys.modules.get("torch")
    before, before_torch = random.getstate(), torch and torch.get_rng_state()
    random.seed(seed)
    if torch:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed records a stack for every device there might be
    try:
        yield
    finally:
        random.setstate(before)
        if torch:
            torch.set_rng_state(before_torch)


@contextmanager
def silence():
    """Mutants warn, print and divide by zero; none of it belongs on the page. Nor does a finalizer of something else,
    which the garbage collector would run at the bottom of a mutant's endless recursion, where it can't but fail.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with np.errstate(all="ignore"):
                yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def limit(seconds, advice):
    """Refused after so many seconds. A backstop: a timer only exists in the main thread of a POSIX process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise Refused(advice.format(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def eager():
    """Compiled code set aside while mutants run: it would not see a changed function. Only if dynamo is loaded."""
    return sys.modules["torch"].compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def caches(packages, functions):
    """The ``lru_cache``s of the packages and of the functions' modules: a cached table hides the mutant under it."""
    own = (*(f"{name}." for name in packages), *(f"{f.__module__}." for f in functions))
    spaces = [vars(module) for name, module in list(sys.modules.items()) if name.split(".")[0] in packages]
    values = [value for space in [*spaces, *(f.__globals__ for f in functions)] for value in list(space.values())]
    values += [member for value in values if inspect.isclass(value) for member in vars(value).values()]
    cached = {id(value): value for value in values if hasattr(type(value), "cache_clear")}.values()
    return [c for c in cached if f"{c.__module__}.".startswith(own) and not c.__module__.startswith(__package__)]
