"""Every fault a few times; `make chaos` tries them by the hundred."""

from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS, Fault
from tests.chaos.lab import Lab
from tests.runs import IGNORED

pytestmark = IGNORED


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_holds(tmp_path: Path, tiny_base: Path, fault: Fault) -> None:
    row = fault(Lab(tmp_path, tiny_base), FAULTS[fault][0])
    if not row.tried:
        pytest.skip("this takes the rights to become another user")
    assert not row.failures, row.failures
