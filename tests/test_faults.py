"""The fault campaign in short form; `make faults` runs it with many more inputs."""

import pytest
from faults import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_is_lost(kind):
    outcome = KINDS[kind].run(KINDS[kind].few, 0)
    assert outcome.tried == KINDS[kind].few
    errors = "\n".join(f"{case!r:.300}\n{error}" for case, error in outcome.examples.values())
    assert not outcome.lost, errors
