"""What a check says: the rows that it returns, and what each side of them is made of."""

import ast
from collections import Counter
from copy import deepcopy
from typing import NamedTuple

from .errors import Refused
from .mutants import Source, called, changes, named, slots

INPUTS = {"rng", "tight"}
CONTAINERS = {"array", "asarray", "tensor", "Fraction", "Rational", "Integer", "Matrix"}
VERDICTS = {"allclose", "array_equal", "array_equiv"}


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


