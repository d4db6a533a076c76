"""Traces a check: which lines ran, what it called from where in its source, and whether a mutant runs for ever."""

import os
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from .mutants import codes

HERE = str(Path(__file__).parent)
packages = {__name__.partition(".")[0]}  # whose functions a check must name; add your own book's package


class Exhausted(BaseException):
    """A mutant executed ten times the lines of the original: an endless loop."""


class Watch:
    """Traces the check, its notebook (what shares its globals), the watched packages and the files of what it names.

    lines    {file: numbers of the lines that ran}
    called   {id: code object} of every function that ran
    direct   {id: (code, globals, sites)} of what the check itself called, and from where in its source
    fuel     at most so many lines: more raise Exhausted, at the same place on every machine
    """

    def __init__(self, check, files, fuel=None):
        self.globals, self.fuel = check.__globals__, fuel
        self.inside = {id(code) for code in codes(check.__code__)}
        self.library = dict.fromkeys(files, True)
        self.lines, self.called, self.direct, self.count = {}, {}, {}, 0

    def of_library(self, frame):
        name = frame.f_code.co_filename
        if name not in self.library:
            self.library[name] = package_path(name) is not None
        return self.library[name]

    def watched(self, frame):
        return self.of_library(frame) or frame.f_globals is self.globals

    def record(self, frame, event, argument):
        """The tracer of the check as it is."""
        if not self.watched(frame):
            return None
        code = frame.f_code
        self.called[id(code)] = code
        if id(code) not in self.inside and (site := self.site(frame)):
            self.direct.setdefault(id(code), (code, frame.f_globals, set()))[2].add(site)
        lines = self.lines.setdefault(code.co_filename, set())

        def local(frame, event, argument):
            if event == "line":
                lines.add(frame.f_lineno)
                self.count += 1
            return local

        lines.add(frame.f_lineno)
        return local

    def burn(self):
        """The tracer of its mutants. Every call of anything goes through it, a symbolic check makes millions: brief."""
        library, space, fuel, count = self.library, self.globals, self.fuel, 0

        def local(frame, event, argument):
            nonlocal count
            if event == "line":
                count += 1
                if count > fuel:
                    raise Exhausted
            return local

        def trace(frame, event, argument):
            watched = library.get(frame.f_code.co_filename)
            if watched or frame.f_globals is space or watched is None and self.of_library(frame):
                return local
            return None

        return trace

    def site(self, frame):
        """Where the check called this: itself, through code that is not watched (torch), or a notebook's helper.

        None where something else did, and for a function that is handed a generator: it makes inputs.
        """
        ends = self.of_library if self.of_library(frame) else self.watched
        while not any(type(value).__name__ == "Generator" for value in frame.f_locals.values()):
            frame = frame.f_back
            if frame is None or frame.f_code.co_filename.startswith(HERE):
                return None
            if id(frame.f_code) in self.inside:
                return next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            if ends(frame):
                return None
        return None

    @contextmanager
    def on(self):
        before = sys.gettrace()  # a debugger's or coverage's: put back afterwards
        sys.settrace(self.record if self.fuel is None else self.burn())
        try:
            yield
        finally:
            sys.settrace(before)


def package_path(file):
    """`package/module.py` of a source file that belongs to a watched package, else None; the ledger is not watched."""
    for name in sorted(packages & sys.modules.keys()):
        module = sys.modules[name]
        for root in getattr(module, "__path__", [module.__file__]):
            if (file == root or file.startswith(root + os.sep)) and not file.startswith(HERE):
                return Path(file).relative_to(Path(root).parent).as_posix()
    return None
