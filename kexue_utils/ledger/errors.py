"""The errors of the ledger: short enough to read in a notebook, precise enough to mend."""


class LedgerError(Exception):
    """A check that does not hold, or one that is refused because it could not fail."""

    def __init__(self, label, problem, *lines):
        self.label, self.problem, self.lines = label, problem, lines
        super().__init__("\n".join([f"✗ {label} · {problem}", *(f"  {line}" for line in lines)]))

    def _render_traceback_(self):  # IPython prints this instead of a stack
        return str(self).splitlines()


class Refused(Exception):
    """Raised inside the runner, turned into a LedgerError that carries the label."""
