"""The deliberate breaks of breaks.py can still be made; whether the suite sees them is told by python tests/breaks.py.

    python -m pytest tests/test_breaks.py
"""
import dis
import types

import pytest

from breaks import BREAKS, ROOT


def global_names(text):
    """The names that the functions of a module take from outside them."""
    codes = [compile(text, "module", "exec")]
    names = set()
    for code in codes:  # which grows
        names |= {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return names


@pytest.mark.parametrize("fault", BREAKS, ids=[fault.name for fault in BREAKS])
def test_the_code_of_a_break_stands_once_in_its_file(fault):
    original = (ROOT / fault.file).read_text(encoding="utf-8")
    assert global_names(fault.broken_text()) <= global_names(original), "of an unknown name any test is red"
    assert (ROOT / fault.tests.split()[0]).is_file()
