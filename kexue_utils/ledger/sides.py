"""What a check says: the rows that it returns, and what each side of them is made of."""

import ast
from collections import Counter
from copy import deepcopy
from typing import NamedTuple

from .errors import Refused
from .mutants import MODULES, Source, called, changes, named, slots

INPUTS = {"rng", "tight"}
CONTAINERS = {"array", "asarray", "tensor", "Fraction", "Rational", "Integer", "Matrix"}
VERDICTS = {"allclose", "array_equal", "array_equiv"}
COPIES = {"copy", "clone", "detach", "array", "asarray", "tensor", "as_tensor", "simplify", "expand", "factor", "doit"}
SIZES = {"abs", "norm", "max", "amax"}


class Binding(NamedTuple):
    """``name`` is given ``value``, or a part of it (not ``whole``), in place of what it was or in addition to it."""

    name: str
    value: ast.AST
    whole: bool = False
    replaces: bool = False


class CheckSource:
    """A check's source: ``rows`` (left, right, mistake, …) and the ``columns`` of all lefts, rights and mistakes."""

    def __init__(self, function):
        self.source = Source(function)
        self.root = self.source.node
        own = list(own_scope(self.root))
        self.bindings = [b for node in ast.walk(self.root) if node is not self.root for b in bound_by(node)]
        self.loops = any(isinstance(n, (ast.For, ast.While)) for n in own)
        results = [n.value for n in own if isinstance(n, (ast.Return, ast.Yield)) and n.value]
        self.rows = [r.elts for r in results if isinstance(r, ast.Tuple) and len(r.elts) >= 2]
        starred = any(isinstance(side, ast.Starred) for row in self.rows for side in row[:2])
        if not results or len(self.rows) != len(results) or starred:
            raise Refused("write the two sides out: return left, right, mistake")
        self.columns = [row[0] for row in self.rows], [row[1] for row in self.rows], sum((r[2:] for r in self.rows), [])
        self.mistakes = min(len(row) - 2 for row in self.rows)
        self.literal = all(is_literal(self.inlined(row[1])) for row in self.rows)
        self.refuse_what_shows_nothing()

    def refuse_what_shows_nothing(self):
        for text, left, right in self.links():
            if ast.dump(left) == ast.dump(right):
                raise Refused(f"both sides are the same expression, {text}")
            if is_literal(left):
                raise Refused("the left side is a literal: nothing is computed")
            if is_residual(left, right):
                raise Refused("the left side is a difference or ratio of both: return them as the two sides")
        for node in ast.walk(self.root):
            if isinstance(node, ast.Call) and called(node.func) in VERDICTS:
                raise Refused(f"{called(node.func)} is a verdict: return both sides, they are compared for you")

    def links(self):
        """(text of the left side, left, right), inlined, of every row; of a chain that is written out, link by link."""
        for left, right, *_ in self.rows:
            chain = isinstance(left, ast.Tuple) and isinstance(right, ast.Tuple) and len(left.elts) == len(right.elts)
            for a, b in zip(left.elts, right.elts, strict=True) if chain else [(left, right)]:
                yield self.source.text(a), self.inlined(a), self.inlined(b)

    def own_mutants(self):
        """{name: () → code}: of the right side, and of the assignments that it rests on and the left side does not."""
        left, right = (
            {id(n) for value in [*roots, *(b.value for b in self.reach(roots))] for n in ast.walk(value)}
            for roots in self.columns[:2]
        )
        places = [s for s in slots(self.root, None)
                  if id(s.parent.value if isinstance(s.parent, ast.AugAssign) else s.node) in right - left]  # fmt: skip
        return named(self.source, places, changes)

    def serves_mistakes_alone(self, sites):
        """Does nothing that is computed at these places of the source reach the two sides, but only a mistake?"""
        return all(not left and not right and wrong for left, right, wrong in map(self.ways, sites))

    def serves_as_input(self, sites):
        """Do both sides get what is computed there through the same local names, and neither is no more than that?"""
        plain = {n.id for roots in self.columns[:2] for r in roots for n in getattr(r, "elts", [r]) if is_name(n)}
        functions = [n for n in ast.walk(self.root) if isinstance(n, (ast.FunctionDef, ast.Lambda)) and n != self.root]
        return all(
            left and left == right and plain.isdisjoint(left) and not any(contains(f, site) for f in functions)
            for site in sites for left, right, _ in [self.ways(site)]
        )  # fmt: skip

    def ways(self, site):
        """For each column, the names through which it gets what is computed at a site; "" where it is there itself."""
        return [
            {b.name for b in self.reach(roots, inputs=True) if contains(b.value, site)}
            | {"" for root in roots if contains(root, site)}
            for roots in self.columns
        ]

    def reach(self, roots, inputs=False):
        """The bindings that ``roots`` rest on, those to values made with rng or tight (inputs) only if asked for."""
        found, todo = [], list(roots)
        while todo:
            for binding in self.bound(todo.pop()):
                if binding not in found and (inputs or not INPUTS & names_in(binding.value)):
                    found.append(binding)
                    todo.append(binding.value)
        return found

    def bound(self, user):
        """The bindings of the names in ``user``: without loops, not those made later or made anew in between."""
        found, names = [], names_in(user)
        for name in sorted(names):
            bindings = [b for b in self.bindings if b.name == name]
            if not self.loops and not isinstance(user, ast.FunctionDef):
                bindings = [b for b in bindings if b.value.lineno < user.lineno or isinstance(b.value, ast.FunctionDef)]
                last = max((b.value.lineno for b in bindings if b.replaces), default=0)
                bindings = [b for b in bindings if b.value.lineno >= last]
            found += bindings
        return found

    def inlined(self, node):
        """An expression with its local names replaced by their values, where these are given once and not by chance."""
        if any(isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) for n in own_scope(self.root)):
            return node  # a call for its effect: the same name need not be the same value
        count = Counter(b.name for b in self.bindings)
        values = {b.name: b.value for b in self.bindings if b.whole and not INPUTS & names_in(b.value)
                  and all(count[name] <= 1 for name in names_in(b.value) | {b.name})}  # fmt: skip

        class Inline(ast.NodeTransformer):
            def visit_Name(self, node):
                value = values.pop(node.id, None)  # popped: a name within its own value stays
                if value is None:
                    return node
                new = self.visit(deepcopy(value))
                values[node.id] = value
                return new

            def visit_Call(self, node):
                node = self.generic_visit(node)
                return argument(node) if called(node.func) in COPIES else node

        return Inline().visit(deepcopy(node))


def bound_by(node):
    """The bindings of local names that a node makes. A loop over cases, written out or yielded, is an input."""
    links = []
    match node:
        case ast.Assign():
            links = [(target, node.value) for target in node.targets]
        case ast.AugAssign() | ast.AnnAssign(value=ast.expr()) | ast.NamedExpr():
            links = [(node.target, node.value)]
        case ast.For() if not is_literal(node.iter) and not any(isinstance(n, ast.Yield) for n in own_scope(node)):
            links = [(node.target, node.iter)]
        case ast.withitem(value, ast.expr() as target):
            links = [(target, value)]
        case ast.FunctionDef(name):
            yield Binding(name, node)
        case ast.Expr(ast.Call(ast.Attribute(target)) as value):
            links = [(target, value)]  # terms.append(x)
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


def names_in(node):
    return {n.id for n in ast.walk(node) if is_name(n)}


def is_name(node):
    return isinstance(node, ast.Name)


def contains(node, site):
    """Does the source of a node hold the site (first line, last line, first column, last column)?"""
    first, last, start, end = site
    return (node.lineno, node.col_offset) <= (first, start) and (last, end) <= (node.end_lineno, node.end_col_offset)


def argument(call):
    """What a call works on: x in f(x), module.f(x), x.f(); of others, like x.f(y), the call itself."""
    if call.args and (is_name(call.func) or names_in(call.func) <= MODULES | {"sp", "sympy"}):
        return call.args[0]
    return call if call.args else getattr(call.func, "value", call)


def is_residual(left, right):
    """a - b or its size against 0, or a / b against 1: then the right side says nothing."""
    if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Div):
        return isinstance(right, ast.Constant) and right.value == 1
    while isinstance(left, ast.Call) and called(left.func) in SIZES and argument(left) is not left:
        left = argument(left)
    difference = isinstance(left, ast.BinOp) and isinstance(left.op, ast.Sub)
    return difference and isinstance(right, ast.Constant) and right.value == 0


def is_literal(node):
    """Numbers only: 2, -1.5, [1, 2], (1, 2), array([1, 2]), Fraction(1, 3)."""
    match node:
        case ast.Call(func, arguments):
            return called(func) in CONTAINERS and all(map(is_literal, arguments))
        case ast.UnaryOp(operand=operand):
            return is_literal(operand)
        case ast.Tuple(elements) | ast.List(elements):
            return all(map(is_literal, elements))
    return isinstance(node, ast.Constant)
