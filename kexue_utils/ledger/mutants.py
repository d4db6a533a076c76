"""Mutants: one node of a function's syntax tree changed, compiled, and swapped in as the function's ``__code__``.

Swapping the code object reaches every reference to the function (imported names, bound methods, closures, partials,
modules built before); patching module attributes would not. Names of mutants are made of source text alone, so they are
the same on every Python.
"""

import __future__

import ast
import builtins
import copy
import inspect
import linecache
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

from .errors import Refused

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
              ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}  # fmt: skip
COMPARISON = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.FloorDiv: "//", ast.Mod: "%",
          ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}  # fmt: skip
TWINS = {a: b for pair in [("sin", "cos"), ("exp", "expm1"), ("log", "log1p"), ("sum", "mean"), ("max", "min"),
                           ("amax", "amin"), ("argmax", "argmin"), ("maximum", "minimum"), ("cumsum", "cumprod"),
                           ("softmax", "log_softmax"), ("zeros_like", "ones_like"), ("zeros", "ones")]
         for a, b in (pair, pair[::-1])}  # fmt: skip
DROPPED_CALLS, MODULES = {"conj", "conjugate", "transpose"}, {"np", "numpy", "torch", "jnp"}
LOAD = ast.Load()
FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
SKIPPED_STATEMENTS = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "defaults", "kw_defaults", "type_comment", "ctx"}


def layers(function):
    """A function, what it wraps, and so on down to the one that computes; TypeError if that is not written in Python.

    Looks through decorators, partials, methods and properties.
    """
    found = [function]
    while not inspect.isfunction(found[-1]) or hasattr(found[-1], "__wrapped__"):
        inner = [getattr(found[-1], name, None) for name in ("__wrapped__", "__func__", "fget", "func")]
        if not any(map(callable, inner)) or len(found) > 20:
            raise TypeError(f"of: {function!r} is not a Python function; name the reference that it is tested against")
        found.append(next(filter(callable, inner)))
    return list(filter(inspect.isfunction, found))


def functions_of(item):
    """The functions that an item of ``of`` stands for, each in its layers: a class stands for all that it defines."""
    if not inspect.isclass(item):
        return [layers(item)]
    found = []
    for member in vars(item).values():
        try:
            function = layers(member)
        except TypeError:  # a constant, a C function
            continue
        code = function[-1].__code__
        if function[-1].__module__ == item.__module__ and not is_generated(code) and function not in found:
            found.append(function)
    return found


def is_generated(code):
    """Was it written by a program, as the methods of a dataclass are?"""
    return code.co_filename.startswith("<string")


class Source:
    """A function's node within the top-level statement that defines it, and the lines of the file."""

    def __init__(self, function):
        """The text comes from linecache, which knows notebook cells too."""
        self.code = code = function.__code__
        self.lines = linecache.getlines(code.co_filename, function.__globals__)
        self.names = {*function.__globals__, *dir(builtins)}
        for statement in statements("".join(self.lines)):
            if first_line(statement) <= code.co_firstlineno <= statement.end_lineno:
                for node in ast.walk(statement):
                    if isinstance(node, ast.FunctionDef) and first_line(node) == code.co_firstlineno:
                        self.statement, self.node = statement, node
        if getattr(self, "node", None) is None or self.node.name != code.co_name:
            raise Refused(f"{code.co_qualname}: its source text cannot be found (a lambda? give it a name)")

    def text(self, node, one_line=True):
        """The source of a node; in names of mutants, without its line breaks."""
        cut = [line.encode() for line in self.lines[node.lineno - 1 : node.end_lineno]]  # columns count bytes
        cut[-1] = cut[-1][: node.end_col_offset]
        cut[0] = cut[0][node.col_offset :]
        text = b"".join(cut).decode()
        return " ".join(text.split()) if one_line else text

    def compile(self, slot, new):
        """The function's code object with ``new`` in one place of its syntax tree."""
        module = ast.Module([self.statement], [])
        new = copy.copy(new)  # it may be a part of the tree, and gets another place in the text
        slot.container[slot.key] = ast.fix_missing_locations(ast.copy_location(new, slot.node))
        try:
            whole = compile(module, self.code.co_filename, "exec", self.code.co_flags & FLAGS, True)
        finally:
            slot.container[slot.key] = slot.node
        for code in codes(whole):
            if (code.co_qualname, code.co_firstlineno) == (self.code.co_qualname, self.code.co_firstlineno):
                return code
        raise Refused(f"{self.code.co_qualname}: its source text is not what was compiled")


@lru_cache(maxsize=64)
def statements(text):
    """The top-level statements of a file, parsed once: mutants leave the tree as it was."""
    return ast.parse(text).body


def codes(code):
    """A code object and all within it."""
    yield code
    for constant in filter(inspect.iscode, code.co_consts):
        yield from codes(constant)


def first_line(node):
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


class Slot(NamedTuple):
    """A place in the syntax tree, ``container[key]``, and what is in it; ``executed``: did the check run this line?"""

    container: dict | list
    key: str | int
    node: ast.AST
    parent: ast.AST
    executed: bool


def slots(root, lines, on=True):
    """Every place below ``root`` that may be mutated, in source order; ``lines``: those that ran, None for all.

    Left out: defaults, annotations, decorators, strings, ``raise``, ``assert`` and guards (an ``if`` that ends so).
    """
    if isinstance(root, ast.stmt):
        if isinstance(root, SKIPPED_STATEMENTS) or is_guard(root):
            return
        on = lines is None or not lines.isdisjoint(header(root))
    for field, value in ast.iter_fields(root):
        if field in SKIPPED_FIELDS:
            continue
        container, keys = (value, range(len(value))) if isinstance(value, list) else (vars(root), [field])
        for key in keys:
            child = container[key]
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            read = isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), (ast.Store, ast.Del))
            if read or isinstance(root, ast.AugAssign) and field == "op":
                yield Slot(container, key, child, root, on)
            yield from slots(child, lines, on)


def is_guard(node):
    return isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)


def header(statement):
    """The lines of a statement without those of its body."""
    body = getattr(statement, "body", None)
    last = first_line(body[0]) - 1 if isinstance(body, list) and body else statement.end_lineno
    return range(statement.lineno, max(last, statement.lineno) + 1)


def changes(node, parent, source):
    """The changed versions of one expression: pairs (what, new node)."""

    def short(node):
        text = source.text(node)
        return text if len(text) <= 44 else text[:43] + "…"

    match node:
        case ast.operator() if type(node) in ARITHMETIC:  # of an augmented assignment
            other = ARITHMETIC[type(node)]
            yield f"{SYMBOL[type(node)]}= → {SYMBOL[other]}= in {short(parent)}", other()
        case ast.BinOp(left, op, right):
            if other := ARITHMETIC.get(type(op)):
                yield f"{SYMBOL[type(op)]} → {SYMBOL[other]} in {short(node)}", ast.BinOp(left, other(), right)
            if isinstance(op, ast.Sub):
                yield f"swap {short(node)}", ast.BinOp(right, op, left)
            if isinstance(op, ast.MatMult):  # two vectors commute: the swap must not count as a survivor
                yield f"swap {short(node)}", ast.Call(ast.Name("__swapped_matmul__", LOAD), [left, right], [])
        case ast.UnaryOp(ast.USub(), operand):
            yield f"drop - of {short(node)}", operand
        case ast.Compare(left, [op, *ops], others) if other := COMPARISON.get(type(op)):
            yield f"{SYMBOL[type(op)]} → {SYMBOL[other]} in {short(node)}", ast.Compare(left, [other(), *ops], others)
        case ast.Constant(int() | float() | complex() as value) if not isinstance(value, bool):
            where = f" in {short(parent)}" if isinstance(parent, (ast.expr, ast.keyword)) else ""
            for new in [value + 1, value - 1] if isinstance(value, int) else [2 * value or 1.0]:
                yield f"{source.text(node)} → {new!r}{where}", ast.Constant(new)
        case ast.Attribute(value, "T" | "mT" | "H" | "mH" as name):
            yield f"drop .{name} of {short(node)}", value
        case ast.Call(func, arguments, keywords):
            name, method = called(func), isinstance(func, ast.Attribute)
            if method and name in DROPPED_CALLS:
                of_module = getattr(func.value, "id", None) in MODULES and arguments  # np.conj(x), not x.conj()
                yield f"drop {name} of {short(node)}", arguments[0] if of_module else func.value
            if (twin := TWINS.get(name)) and (method or twin in source.names):  # there is no builtin mean
                new = ast.Attribute(func.value, twin, LOAD) if method else ast.Name(twin, LOAD)
                yield f"{name} → {twin} in {short(node)}", ast.Call(new, arguments, keywords)
        case ast.Subscript(value, ast.Tuple([a, b])) if ast.dump(a) != ast.dump(b):
            yield f"swap indices of {short(node)}", ast.Subscript(value, ast.Tuple([b, a], LOAD), LOAD)


def called(func):
    """The name at the end of what is called: f, x.f, module.f."""
    return getattr(func, "attr", getattr(func, "id", None))


def doubled_result(node, parent, source):
    """The mutant of a function that has no other, or none that runs."""
    if isinstance(parent, ast.Return):
        yield "double the result", ast.Call(ast.Name("__doubled__", LOAD), [node], [])


def mutants_of(function, lines, doubled=False):
    """Mutants of a library function on the ``lines`` that a check executed: {name: () → code}, in source order.

    A number tells equal names apart and counts lines that were not executed too: every check means the same by it.
    """
    source = Source(function)
    places = list(slots(source.node, lines))
    return not doubled and named(source, places, changes) or named(source, places, doubled_result)


def named(source, places, variants):
    count, found = Counter(), {}
    for place in places:
        for what, new in variants(place.node, place.parent, source):
            count[what] += 1
            if place.executed:
                found[what if count[what] == 1 else f"{what} ({count[what]})"] = partial(source.compile, place, new)
    return found


@contextmanager
def swapped(function, code):
    """Run with another code object in the function; the old one is put back whatever happens."""
    original = function.__code__
    helpers = {"__swapped_matmul__": swapped_matmul, "__doubled__": doubled}
    function.__code__ = code
    try:
        function.__globals__.update(helpers)
        yield
    finally:
        function.__code__ = original
        for name in helpers:
            function.__globals__.pop(name, None)


def swapped_matmul(a, b):
    if getattr(a, "ndim", 2) == getattr(b, "ndim", 2) == 1:
        raise TypeError("the product of two vectors does not change when they are swapped")
    return b @ a


def doubled(result):
    """Twice a result: every number of a tuple, list or dictionary."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(doubled, result))
    if isinstance(result, dict):
        return {key: doubled(value) for key, value in result.items()}
    if isinstance(result, (str, bool)):
        raise TypeError("only numbers are doubled")
    return 2 * result
