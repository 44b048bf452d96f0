"""The deliberate breaks of breaks.py can still be made; whether the suite sees them is told by python tests/breaks.py.

    python -m pytest tests/test_breaks.py
"""
import pytest

from breaks import BREAKS, ROOT


@pytest.mark.parametrize("fault", BREAKS, ids=[fault.name for fault in BREAKS])
def test_the_code_of_a_break_stands_once_in_its_file(fault):
    compile(fault.broken_text(), fault.file, "exec")
    assert (ROOT / fault.tests.split()[0]).is_file()
