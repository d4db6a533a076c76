"""Which definitions of this package a function runs on, found without running it, each with a digest."""

import ast
from pathlib import Path

from kexue_utils.ledger.digest import code_digest

PACKAGE = "kexue_utils"
ROOT = Path(__file__).resolve().parents[1]


def _file(module):
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if (path / "__init__.py").exists() else path.with_suffix(".py")


class _Module:
    """The top-level names of one source file: where each is defined here, or which module it comes from."""

    def __init__(self, module):
        self.text = _file(module).read_text(encoding="utf-8")
        self.defined, self.imported = {}, {}
        for node in ast.parse(self.text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in getattr(node, "targets", None) or [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.defined[name.id] = node
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                if origin.split(".")[0] == PACKAGE:
                    self.imported |= {name.asname or name.name: (origin, name.name) for name in node.names}

    def _origin(self, module, node):
        above = module.split(".")[: -node.level or None] if node.level else []
        if node.level and _file(module).name == "__init__.py":
            above = module.split(".")[: 1 - node.level or None]
        return ".".join(above + ([node.module] if node.module else []))

    def digest(self, node):
        """Digest of a definition with its decorators, without comments and docstrings."""
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
        lines = self.text.split("\n")[: node.end_lineno]
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(inner):
                doc = inner.body[0]
                lines[doc.lineno - 1] = " " * doc.col_offset + "..."
                lines[doc.lineno : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno)
        return code_digest("\n".join(lines[first - 1 :]))


def sources(function):
    """{"path::name": digest} of every top-level definition of the package that `function` refers to, directly or not.

    Follows names and `module.name` through `from kexue_utils… import …`, at any depth; the digest is blind to
    comments, docstrings and spacing. A name that is only built at run time (getattr, strings) is not seen.
    """
    modules, found, ahead = {}, {}, [(function.__module__, function.__qualname__.split(".")[0])]
    while ahead:
        module, name = ahead.pop()
        if module not in modules:
            modules[module] = _Module(module)
        here = modules[module]
        if name in here.imported:
            origin, original = here.imported[name]
            if not _file(f"{origin}.{original}").exists():  # a definition, or handed on by a package's __init__
                ahead.append((origin, original))
            continue
        if name not in here.defined:
            continue
        key = f"{_file(module).relative_to(ROOT.parent).as_posix()}::{name}"
        if key in found:
            continue
        node = here.defined[name]
        found[key] = here.digest(node)
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                ahead.append((module, part.id))
            elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                origin, original = here.imported.get(part.value.id, (None, None))
                if origin and _file(f"{origin}.{original}").exists():
                    ahead.append((f"{origin}.{original}", part.attr))
    return dict(sorted(found.items()))
