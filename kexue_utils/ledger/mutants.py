"""Mutants: one node of a function's syntax tree changed, compiled, and swapped in as the function's ``__code__``.

Swapping the code object reaches every reference to the function (imported names, bound methods, closures, partials,
modules built before); patching module attributes would not. Names of mutants are made of source text alone, so they are
the same on every Python.
"""

import __future__

import ast
import builtins
import inspect
import linecache
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
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
DROPPED_ATTRIBUTES, DROPPED_CALLS = {"T", "mT", "H", "mH"}, {"conj", "conjugate", "transpose"}
MODULES = {"np", "numpy", "torch", "jnp"}
CONTAINERS = {"array", "asarray", "tensor", "Fraction", "Rational", "Integer", "Matrix"}
FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
INPUTS = {"rng", "tight"}
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
        generated = function[-1].__code__.co_filename.startswith("<string")  # by a dataclass
        if function[-1].__module__ == item.__module__ and not generated and function not in found:
            found.append(function)
    return found


class Source:
    """A function's node within the top-level statement that defines it, and the lines of the file."""

    def __init__(self, function):
        """The text comes from linecache, which knows notebook cells too."""
        self.code = code = function.__code__
        self.lines = linecache.getlines(code.co_filename, function.__globals__)
        self.names = {*function.__globals__, *dir(builtins)}
        for statement in ast.parse("".join(self.lines)).body:
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
        ast.fix_missing_locations(ast.copy_location(new, slot.node))
        slot.put(new)
        try:
            module = ast.Module([self.statement], [])
            stack = [compile(module, self.code.co_filename, "exec", self.code.co_flags & FLAGS, True)]
        finally:
            slot.put(slot.node)
        while stack:
            code = stack.pop()
            if (code.co_qualname, code.co_firstlineno) == (self.code.co_qualname, self.code.co_firstlineno):
                return code
            stack += filter(inspect.iscode, code.co_consts)
        raise Refused(f"{self.code.co_qualname}: its source text is not what was compiled")


def first_line(node):
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


@dataclass(frozen=True)
class Slot:
    """A place in the syntax tree; ``executed``: did the check run this line?"""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    executed: bool

    def put(self, node):
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


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
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            read = isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), (ast.Store, ast.Del))
            if read or isinstance(root, ast.AugAssign) and field == "op":
                yield Slot(root, field, index, child, on)
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

    if isinstance(node, ast.operator) and type(node) in ARITHMETIC:  # of an augmented assignment
        other = ARITHMETIC[type(node)]
        yield f"{SYMBOL[type(node)]}= → {SYMBOL[other]}= in {short(parent)}", other()
    elif isinstance(node, ast.BinOp):
        kind = type(node.op)
        if kind in ARITHMETIC:
            other = ARITHMETIC[kind]
            yield f"{SYMBOL[kind]} → {SYMBOL[other]} in {short(node)}", ast.BinOp(node.left, other(), node.right)
        if kind is ast.Sub:
            yield f"swap {short(node)}", ast.BinOp(node.right, ast.Sub(), node.left)
        if kind is ast.MatMult:  # two vectors commute: the swap must not count as a survivor
            swapped = ast.Name("__swapped_matmul__", ast.Load())
            yield f"swap {short(node)}", ast.Call(swapped, [node.left, node.right], [])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield f"drop - of {short(node)}", node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISON:
        kind = type(node.ops[0])
        new = ast.Compare(node.left, [COMPARISON[kind](), *node.ops[1:]], node.comparators)
        yield f"{SYMBOL[kind]} → {SYMBOL[COMPARISON[kind]]} in {short(node)}", new
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, complex):
        where = f" in {short(parent)}" if isinstance(parent, (ast.expr, ast.keyword)) else ""
        values = [node.value + 1, node.value - 1] if type(node.value) is int else [2 * node.value or 1.0]
        for value in values:
            yield f"{source.text(node)} → {value!r}{where}", ast.Constant(value)
    elif isinstance(node, ast.Attribute) and node.attr in DROPPED_ATTRIBUTES:
        yield f"drop .{node.attr} of {short(node)}", node.value
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in DROPPED_CALLS and isinstance(node.func, ast.Attribute):
            module = getattr(node.func.value, "id", None) in MODULES and node.args
            yield f"drop {name} of {short(node)}", node.args[0] if module else node.func.value
        twin = TWINS.get(name)
        if twin and (isinstance(node.func, ast.Attribute) or twin in source.names):  # there is no builtin mean
            func = (ast.Attribute(node.func.value, twin, ast.Load()) if isinstance(node.func, ast.Attribute)
                    else ast.Name(twin, ast.Load()))  # fmt: skip
            yield f"{name} → {twin} in {short(node)}", ast.Call(func, node.args, node.keywords)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        a, b = node.slice.elts
        if ast.dump(a) != ast.dump(b):
            yield f"swap indices of {short(node)}", ast.Subscript(node.value, ast.Tuple([b, a], ast.Load()), ast.Load())


def doubled_result(node, parent, source):
    """The mutant of a function that has no other, or none that runs."""
    if isinstance(parent, ast.Return):
        yield "double the result", ast.Call(ast.Name("__doubled__", ast.Load()), [node], [])


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


class CheckSource:
    """What a check returns, and which of its expressions the right side alone is made of."""

    def __init__(self, function):
        self.source = Source(function)
        self.root = self.source.node
        self.bindings = [b for node in ast.walk(self.root) if node is not self.root for b in bound_by(node)]
        self.straight = not any(isinstance(n, (ast.For, ast.While)) for n in own_scope(self.root))
        results = [n.value for n in own_scope(self.root) if isinstance(n, (ast.Return, ast.Yield)) and n.value]
        self.rows = [r.elts for r in results if isinstance(r, ast.Tuple) and len(r.elts) >= 2]
        starred = any(isinstance(side, ast.Starred) for row in self.rows for side in row[:2])
        if not results or len(self.rows) != len(results) or starred:
            raise Refused("write the two sides out: return left, right, mistake")
        self.literal = all(is_literal(self.inlined(row[1])) for row in self.rows)
        self.mistakes = min(len(row) - 2 for row in self.rows)
        self.columns = [row[0] for row in self.rows], [row[1] for row in self.rows], sum((r[2:] for r in self.rows), [])
        for left, right, *_ in self.rows:
            if ast.dump(self.inlined(left)) == ast.dump(self.inlined(right)):
                raise Refused(f"both sides are the same expression, {self.source.text(left)}")
            if is_literal(self.inlined(left)):
                raise Refused("the left side is a literal: nothing is computed")

    def own_mutants(self):
        """{name: () → code}: of the right side, and of the assignments that it rests on and the left side does not."""
        left, right = ({id(n) for value in self.reach(roots) for n in ast.walk(value)} for roots in self.columns[:2])
        places = [s for s in slots(self.root, None)
                  if id(s.parent.value if isinstance(s.parent, ast.AugAssign) else s.node) in right - left]  # fmt: skip
        return named(self.source, places, changes)

    def only_in_mistakes(self):
        """Names that serve a classic mistake alone: the two sides can't notice a change of such a function."""
        left, right, mistakes = map(self.used, self.columns)
        return identifiers(mistakes) - identifiers(left | right)

    def only_in_inputs(self):
        """Names that occur only where both sides share the result."""
        left, right, _ = map(self.used, self.columns)
        return identifiers(left & right) - identifiers(left ^ right)

    def used(self, roots):
        return {n for value in self.reach(roots, inputs=True) for n in ast.walk(value)}

    def reach(self, roots, inputs=False):
        """``roots`` and the local values that they rest on; values made with rng or tight are inputs."""
        found, todo = list(roots), list(roots)
        while todo:
            user = todo.pop()
            for name in names_in(user):
                for value in self.values(name, user):
                    if value not in found and (inputs or not INPUTS & names_in(value)):
                        found.append(value)
                        todo.append(value)
        return found

    def values(self, name, user):
        """What a local name may stand for where ``user`` uses it: without loops, not what is assigned later or lost."""
        bindings = [b for b in self.bindings if b.name == name]
        if self.straight and not isinstance(user, ast.FunctionDef):
            bindings = [b for b in bindings if b.value.lineno < user.lineno or isinstance(b.value, ast.FunctionDef)]
            last = max((b.value.lineno for b in bindings if b.replaces), default=0)
            bindings = [b for b in bindings if b.value.lineno >= last]
        return [b.value for b in bindings]

    def inlined(self, node):
        """An expression with local names replaced by their values, where the check is nothing but assignments."""
        if not all(isinstance(s, (ast.Assign, ast.FunctionDef, ast.Return)) for s in self.root.body):
            return node
        count = Counter(b.name for b in self.bindings)
        values = {b.name: b.value for b in self.bindings
                  if b.whole and count[b.name] == 1 and not INPUTS & names_in(b.value)}  # fmt: skip

        class Inline(ast.NodeTransformer):
            def visit_Name(self, node):
                value = values.pop(node.id, None)  # popped: a name within its own value stays
                if value is None:
                    return node
                new = self.visit(deepcopy(value))
                values[node.id] = value
                return new

        return Inline().visit(deepcopy(node))


class Binding(NamedTuple):
    """``name`` is given ``value``, or a part of it (not ``whole``), in place of what it was or in addition to it."""

    name: str
    value: ast.AST
    whole: bool = False
    replaces: bool = False


def bound_by(node):
    """The bindings of local names that a node makes. A loop over cases, written out or yielded, is an input."""
    links = []
    if isinstance(node, ast.Assign):
        links = [(target, node.value) for target in node.targets]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        links = [(node.target, node.value)]
    elif isinstance(node, ast.For):
        cases = is_literal(node.iter) or any(isinstance(n, ast.Yield) for n in own_scope(node))
        links = [] if cases else [(node.target, node.iter)]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        links = [(node.optional_vars, node.context_expr)]
    elif isinstance(node, ast.FunctionDef):
        yield Binding(node.name, node)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        links = [(node.value.func.value, node.value)]  # terms.append(x)
    for target, value in links:
        if isinstance(target, (ast.Tuple, ast.List)):
            same = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            part = value if isinstance(value, ast.Starred) else ast.Starred(value)
            links += zip(target.elts, value.elts if same else [part] * len(target.elts), strict=True)
            continue
        whole = isinstance(target, ast.Name) and isinstance(node, ast.Assign)
        while isinstance(target, (ast.Subscript, ast.Attribute, ast.Starred)):
            target, whole = target.value, False
        if isinstance(target, ast.Name):
            part = isinstance(value, ast.Starred)
            yield Binding(target.id, value.value if part else value, whole and not part, whole)


def own_scope(node):
    """The nodes of a function, without those of functions within it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield from own_scope(child)


def identifiers(nodes):
    return {getattr(n, "attr", getattr(n, "id", None)) for n in nodes} - {None}


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def is_literal(node):
    """Numbers only: 2, -1.5, [1, 2], (1, 2), array([1, 2]), Fraction(1, 3)."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        return name in CONTAINERS and all(map(is_literal, node.args))
    if isinstance(node, ast.UnaryOp):
        return is_literal(node.operand)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(is_literal, node.elts))
    return isinstance(node, ast.Constant)


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
