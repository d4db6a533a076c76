"""What is changed, what is left alone, and that a change reaches every reference and is always taken back."""

import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import record, survivors

from kexue_utils.attention.naive_bayes_attention import pooling
from kexue_utils.ledger import LedgerError, check, mutants
from kexue_utils.ledger.mutants import layers, mutants_of, swapped
from kexue_utils.ledger.sides import CheckSource


def names(function):
    return list(mutants_of(function, None))


def arithmetic(a, b, n=3):
    """Not 1 or 2 of these."""
    if n < 0:
        raise ValueError(f"n must not be {n - 1}")
    assert n != 7, "7"
    total: float = 0.5
    for i in range(n):
        total += a.T @ b[i, 0] - 2
    return -total


def test_names_come_from_the_source():
    assert names(arithmetic) == [
        "0.5 → 1.0",
        "+= → -= in total += a.T @ b[i, 0] - 2",
        "- → + in a.T @ b[i, 0] - 2",
        "swap a.T @ b[i, 0] - 2",
        "swap a.T @ b[i, 0]",
        "drop .T of a.T",
        "swap indices of b[i, 0]",
        "0 → 1 in i, 0",
        "0 → -1 in i, 0",
        "2 → 3 in a.T @ b[i, 0] - 2",
        "2 → 1 in a.T @ b[i, 0] - 2",
        "drop - of -total",
    ]


def inverse(x):
    return x.T ** -1


def test_mutants_leave_the_tree_as_it_was():
    """It is parsed once for all checks: what stays when something is dropped keeps its place in the text."""
    before = mutants_of(inverse, None)
    for code in before.values():
        code()
    assert names(inverse) == list(before)


MATRIX = np.array([[1, 2j], [3, 4]])


@pytest.mark.parametrize(
    "source, changed, x",
    [
        ("np.sum(x)", "np.mean(x)", MATRIX),
        ("np.exp(x)", "np.expm1(x)", 0.3),
        ("max(x, y)", "min(x, y)", 0.3),
        ("x ** 3", "x * 3", 0.3),
        ("y / x", "y * x", 0.3),
        ("y // x", "y * x", 0.3),
        ("x <= y", "x < y", 1),
        ("x == y", "x != y", 1),
        ("np.conj(x)", "x", MATRIX),
        ("x.transpose(y, z)", "x", MATRIX),
        ("x.T", "x", MATRIX),
        ("x @ MATRIX.T", "MATRIX.T @ x", MATRIX),
        ("x * 0.25", "x * 0.5", 0.3),
        ("x[y, z]", "x[z, y]", MATRIX),
    ],
)
def test_operators(source, changed, x, tmp_path):
    path = tmp_path / "module.py"
    bodies = "".join(f"def {n}(x, y=1, z=0):\n    return {b}\n" for n, b in [("f", source), ("g", changed)])
    path.write_text("import numpy as np\n" + bodies)
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    module.MATRIX = MATRIX
    spec.loader.exec_module(module)
    assert not np.array_equal(module.f(x), module.g(x))
    results = []
    for code in mutants_of(module.f, None).values():
        with swapped(module.f, code()):
            results.append(module.f(x))
    assert any(np.array_equal(result, module.g(x)) for result in results)


def two_branches(x, positive):
    if positive:
        y = x + 1
    else:
        y = x + 1
    return y


def test_only_lines_that_ran_but_one_name_for_every_check():
    first = two_branches.__code__.co_firstlineno
    assert list(mutants_of(two_branches, {first + 1, first + 4, first + 5})) == [
        "+ → - in x + 1 (2)", "1 → 2 in x + 1 (2)", "1 → 0 in x + 1 (2)",
    ]  # fmt: skip


def nothing_to_change(x):
    return x, [x]


def test_a_function_without_mutants_has_its_result_doubled():
    ((name, code),) = mutants_of(nothing_to_change, None).items()
    with swapped(nothing_to_change, code()):
        assert name == "double the result" and nothing_to_change(3) == (6, [6])
    assert nothing_to_change(3) == (3, [3])


class Base:
    def value(self, x):
        return x + 1


class Derived(Base):
    scale = 2.0
    relu = torch.relu  # C: not ours

    def value(self, x):
        return super().value(x) * self.scale

    @property
    def doubled(self):
        return 2 * self.scale

    @cached_property
    def tripled(self):
        return 3 * self.scale

    @classmethod
    def build(cls, x):
        return cls().value(x + 0)

    @staticmethod
    @lru_cache(None)
    def cached(x):
        return x - 1


def test_a_class_stands_for_all_that_it_defines():
    found = [item[-1].__name__ for item in mutants.functions_of(Derived)]
    assert found == ["value", "doubled", "tripled", "build", "cached"]


@pytest.mark.parametrize("reference", [
    Derived.value, Derived().value, partial(Derived().value, 2), partial(partial(Derived.value, Derived()), 2),
])  # fmt: skip
def test_every_reference_sees_the_change(reference):
    function = layers(reference)[-1]
    kept = [Derived().value, partial(Derived.value, Derived())]
    code = mutants_of(function, None)["* → / in super().value(x) * self.scale"]
    with swapped(function, code()):
        assert [call(2) for call in kept] == [1.5, 1.5] == [Derived.build(2)] * 2
    assert [call(2) for call in kept] == [6, 6]


def test_code_is_restored_whatever_happens():
    before = Derived.value.__code__
    (code, *_) = mutants_of(Derived.value, None).values()
    with pytest.raises(KeyboardInterrupt), swapped(Derived.value, code()):
        raise KeyboardInterrupt
    assert Derived.value.__code__ is before and "__doubled__" not in globals()


class TestOwnMutants:
    """Of a check: what its right side is made of and its left side is not."""

    @staticmethod
    def own(function):
        return list(CheckSource(function).own_mutants())

    def test_shared_values_and_inputs_are_left_alone(self):
        def function(rng):
            x = rng.normal(size=3) + 10
            scale = 2 * x
            shift = x - 20
            a, b = scale * 4, shift * 5
            return a * 30, b * 50 + scale, x * 6

        assert self.own(function) == [
            "- → + in x - 20", "swap x - 20", "20 → 21 in x - 20", "20 → 19 in x - 20",
            "* → / in shift * 5", "5 → 6 in shift * 5", "5 → 4 in shift * 5",
            "+ → - in b * 50 + scale", "* → / in b * 50", "50 → 51 in b * 50", "50 → 49 in b * 50",
        ]  # fmt: skip

    def test_statements_that_build_a_value(self):
        def function(rng):
            x, terms, table = rng.normal(size=4), [], {}
            total = 0.0
            for i in range(4):
                total += x[i] ** 2
                terms.append(x[i] * 3)
                table[7] = x[i] / 8

            def power(y):
                return y**9

            if (y := x + 11)[0] < 12:
                pass
            return x.sum(), total + sum(terms) + table[7] + power(x) + y + (lambda z: z * 13)(x), x

        found = " ".join(self.own(function))
        for number in (4, 2, 3, 8, 9, 11, 13):
            assert f"{number} → {number + 1} in" in found
        assert "+= → -=" in found and "12 →" not in found

    def test_a_name_that_is_used_again_is_not_what_it_was(self):
        def function(rng):
            x = rng.normal()
            a = x + 5
            right = a * 6
            a = x + 7
            return x, right, a

        assert not [name for name in self.own(function) if name.startswith("7")]
        assert "5 → 6 in x + 5" in self.own(function)

    def test_nested_functions_may_return_what_they_like(self):
        def function(rng):
            x = rng.normal()

            def square(y):
                return y * y

            return square(x), x**2, x

        assert survivors(record(function)["mutants"]) == []

    def test_a_loop_over_cases_is_an_input(self):
        def function(rng):
            for n in (2, 3, 4):
                x = rng.normal(size=n)
                yield x.sum(), x.mean() * n, x.mean()

        assert not [name for name in self.own(function) if "→" in name and "in (2, 3, 4)" in name]


def loops(n):
    total, k = 0, 0
    while k != n:
        k += 1
        total += k
    return total


def recursive(n):
    return n + recursive(n - 1) if n > 0 else 0


def noisy(x):
    print("noise")
    np.log(x - 100)
    return 2 * np.sqrt(x)


@lru_cache(None)
def table(n):
    return tuple(k * k for k in range(n))


def through_the_table(n):
    return sum(table(n))


def test_endless_loops_and_recursion_do_not_run():
    def function(rng):
        n = int(rng.integers(2, 30))
        return (loops(n), recursive(n)), (n * (n + 1) // 2, n * (n + 1) // 2), (n * n, n)

    verdicts = record(function, of=[loops, recursive])["functions"]
    ours = verdicts[f"{__name__}.loops"]
    assert ours["+= → -= in k += 1"] == ours["1 → 0"] == "did not run"
    assert ours["+= → -= in total += k"] == "rejected"
    assert "did not run" in verdicts[f"{__name__}.recursive"].values()


def test_no_garbage_is_collected_at_the_bottom_of_an_endless_recursion():
    seen = []

    def function(rng):
        n = int(rng.integers(2, 30))
        seen.append(gc.isenabled())
        return recursive(n), n * (n + 1) // 2, n

    record(function, of=[recursive])
    assert gc.isenabled() and seen[0] and not all(seen)  # the check itself runs as ever, its mutants don't collect


def test_endless_generators_do_not_run():
    from itertools import count

    def function(rng):
        n = int(rng.integers(2, 30))
        total = 0
        for k in count():
            if k == n:
                break
            total += k
        return total, until(n), n

    def until(n):
        total = 0
        for k in count():
            if k == n - 0:
                return total
            total += k

    assert "did not run" in record(function, of=[until])["functions"][f"{__name__}.{until.__qualname__}"].values()


def test_mutants_are_silent_and_caches_are_emptied(capfd, recwarn):
    def silent(rng):
        x = 200 + rng.random()
        return noisy(x) ** 2, 4 * x, x

    def cached(rng):
        n = int(rng.integers(2, 9))
        return through_the_table(n), (n - 1) * n * (2 * n - 1) // 6, n

    bundle = record(silent, of=[noisy])
    out, err = capfd.readouterr()
    assert set(out.splitlines()) == {"noise", *out.splitlines()[-3:]} and err == "" and not recwarn.list
    assert bundle["functions"][f"{__name__}.noisy"]["2 → 3 in 2 * np.sqrt(x)"] == "rejected"
    assert survivors(record(cached, of=[table, through_the_table])["functions"][f"{__name__}.table"]) == []
    assert table(3) == (0, 1, 4)


def test_tracers_are_put_back():
    def tracer(frame, event, argument):
        return None

    def function(rng):
        x = rng.normal()
        return np.sin(2 * x), 2 * np.sin(x) * np.cos(x), np.sin(x)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        record(function)
        assert sys.gettrace() is tracer
        with pytest.raises(LedgerError):
            check("broken")(lambda rng: 1)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_compiled_functions_are_seen():
    compiled = torch.compile(affine, backend="eager")

    def function(rng):
        x = torch.from_numpy(rng.normal(size=3))
        return compiled(x), x + x + 1, x

    verdicts = record(function, of=[compiled])["functions"][f"{__name__}.affine"]
    assert len(verdicts) > 4 and set(verdicts.values()) == {"rejected"}


def affine(x):
    return 2 * x + 1


LISTING = """
import json, sys, types
sys.modules.setdefault("numpy", types.ModuleType("numpy"))  # not needed for names
from kexue_utils.ledger.mutants import mutants_of

def functions(code):
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from functions(constant)

path, found = sys.argv[1], {}
with open(path, encoding="utf-8") as file:
    module = compile(file.read(), path, "exec", dont_inherit=True)
for code in functions(module):
    if code.co_name.isidentifier() and "<locals>" not in code.co_qualname:
        function = types.FunctionType(code, {}, closure=tuple(types.CellType() for _ in code.co_freevars))
        try:
            found[code.co_qualname] = [name for name, compiled in mutants_of(function, None).items() if compiled()]
        except Exception as error:  # a class body
            found[code.co_qualname] = [type(error).__name__]
print(json.dumps(found))
"""


def test_names_are_the_same_on_every_python():
    """On the Pythons that this machine has; the continuous integration has more than one."""
    listings = {}
    root = Path(mutants.__file__).parents[2]
    for name in [sys.executable, *filter(shutil.which, ("python3.11", "python3.12", "python3.13", "python3.14"))]:
        for module in (pooling, mutants):
            run = subprocess.run([name, "-c", LISTING, module.__file__], cwd=root, capture_output=True, text=True)
            if run.returncode == 0:
                listings.setdefault(module.__name__, []).append(json.loads(run.stdout))
    assert len(listings) == 2
    for first, *others in listings.values():
        assert sum(map(len, first.values())) > 40 and all(other == first for other in others)
