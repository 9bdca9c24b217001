import math
import sys

import numpy as np
import pytest

from t5vae.common.errors import UserError
from t5vae.latent.checkers import checker
from t5vae.latent.measures import measure


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("length", {"": 0, "ab c": 4, "é → ü": 5}),
        ("calls", {"f(g(x), h)": 2, "x = 1": 0, "": 0, "f(": math.nan, "\0": math.nan}),
        ("names", {"a = b + a.c(d)": 3, "import os": 0, "x =": math.nan}),
    ],
)
def test_measures_of_known_value(name, values):
    found = [measure(name)(text) for text in values]
    assert found == pytest.approx(list(values.values()), nan_ok=True)
    assert all(type(value) is float for value in found)


def test_molecules_need_rdkit_or_are_measured():
    try:
        import rdkit  # noqa: F401
    except ImportError:
        for name in ("logp", "qed"):
            with pytest.raises(UserError, match=f"measure '{name}' needs.*`pip install rdkit`"):
                measure(name)
    else:
        assert measure("logp")("CCCCCC") > measure("logp")("CCO")
        assert 0 < measure("qed")("CCO") < 1
        assert math.isnan(measure("logp")("C("))
        assert math.isnan(measure("qed")(""))


def test_a_dotted_path_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_measures.py").write_text("def spaces(text): return text.count(' ') or None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_measures", raising=False)
    spaces = measure("my_measures:spaces")
    assert spaces("a b c") == 2.0
    assert math.isnan(spaces("abc"))


def test_a_function_of_one_s_own_answers_with_a_number():
    assert measure(lambda text: np.float32(1.5))("") == 1.5

    def words(text):
        return text.split()

    for function in (words, str.upper):
        with pytest.raises(UserError, match=rf"'{function.__name__}' answers .* for 'a b'"):
            measure(function)("a b")


@pytest.mark.parametrize("make", [measure, checker])
def test_a_function_or_module_that_fails_is_one_line(tmp_path, monkeypatch, make):
    (tmp_path / "failing.py").write_text("def divide(text): return 1 / len(text)\n")
    (tmp_path / "unclosed.py").write_text("def divide(text:\n")
    monkeypatch.chdir(tmp_path)
    divide = make("failing:divide")
    assert divide("a") == 1
    with pytest.raises(UserError, match=r"'failing:divide' fails on '' .ZeroDivisionError: div"):
        divide("")
    with pytest.raises(UserError, match="'unclosed:divide' cannot be imported") as caught:
        make("unclosed:divide")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenght", "unknown measure 'lenght'; choose length"),
        ("math:no_such", "the measure 'math:no_such' cannot be imported"),
        ("math:pi", "the measure 'math:pi' is not a function"),
    ],
)
def test_a_wrong_measure_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        measure(name)
    assert "\n" not in str(caught.value)
