"""A ledger of equations: every numbered equation has a check, and every check is itself tested by mutation.

In a notebook ``from kexue_utils.ledger import check``; after executing, ``python -m kexue_utils.ledger collect``; in
the book the extension ``kexue_utils.ledger.sphinx``. Names load on first use: rendering needs neither numpy nor sympy.

To read it, begin with ``examine`` (what a check has to pass) and follow what it uses: ``sides`` (what the two sides are
made of), ``trial`` (running it), ``kinds`` and ``symbolic`` (when it holds), ``mutants`` (what is changed), ``watch``
(what ran), ``show`` (the two lines). From there the record goes through ``collect`` into the ``register``, and through
``sphinx``, ``page`` and ``graph`` onto the page. ``digest`` and ``errors`` serve all of them.
"""

from importlib import import_module

_HOME = {
    "check": "examine", "cited": "examine", "packages": "watch",
    "LedgerError": "errors", "Mean": "kinds", "Slope": "kinds",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
