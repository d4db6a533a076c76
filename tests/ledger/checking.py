"""What the tests of the ledger's core share: run a check and look at its record or its refusal."""

import pytest

from kexue_utils.ledger import LedgerError, check, show


def record(function, label="test", **options):
    """The bundle of a check that holds."""
    check(label, **options)(function)
    return show.records.pop()


def failure(function, label="test", **options):
    """The lines of a check that does not hold or is refused."""
    with pytest.raises(LedgerError) as error:
        check(label, **options)(function)
    assert str(error.value).splitlines() == error.value._render_traceback_()
    return str(error.value)


def survivors(verdicts):
    return [name for name, verdict in verdicts.items() if verdict == "survived"]
