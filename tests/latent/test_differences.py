from itertools import pairwise

import pytest

from t5vae.latent.differences import Part, difference


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("x = a + 1", "x = a + 1", [("x = a + 1", "x = a + 1")]),
        ("x = a + 1", "x = b + 1", [("x = ", "x = "), ("a", "b"), (" + 1", " + 1")]),
        ("f(a)", "f(a, b)", [("f(a", "f(a"), ("", ", b"), (")", ")")]),
        ("not a", "a", [("not ", ""), ("a", "a")]),
        ("a\tb", "a b", [("a", "a"), ("\t", " "), ("b", "b")]),
        ("", "x", [("", "x")]),
        ("x", "", [("x", "")]),
        ("", "", []),
        ("größer", "kleiner", [("größer", "kleiner")]),
    ],
)
def test_parts_of_known_pairs(old, new, parts):
    assert difference(old, new) == [Part(*part) for part in parts]


def test_parts_add_up_to_both_texts_and_take_turns():
    old, new = "return self._name.strip(' ')  # no", "yield name.strip('\\n') or None"
    parts = difference(old, new)
    assert "".join(part.old for part in parts) == old
    assert "".join(part.new for part in parts) == new
    changed = [part.old != part.new for part in parts]
    assert all(one != two for one, two in pairwise(changed))
    assert False in changed
