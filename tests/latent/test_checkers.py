import sys

import pytest

from t5vae.common.errors import UserError
from t5vae.latent import checker


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        (
            "python",
            ["x = 1", "for a in b: pass", "f(x)[1:]"],
            ["x =", "", "# note", " x = 1", "\0"],
        ),
        ("json", ['{"a": [1, null]}', "3"], ["", "{'a': 1}", "NaN", "[1,]", "[" * 100_000]),
        ("regex:[ab]+", ["abba"], ["", "abc", "ab\n"]),
    ],
)
def test_checkers_tell_valid_from_invalid(name, valid, invalid):
    is_valid = checker(name)
    assert [is_valid(text) for text in valid] == [True] * len(valid)
    assert [is_valid(text) for text in invalid] == [False] * len(invalid)


def test_python_checker_prints_no_warnings(recwarn):
    assert checker("python")("x = '\\d' is 1")
    assert not recwarn.list


@pytest.mark.parametrize("path", ["my_checks:is_short", "my_checks.is_short"])
def test_a_dotted_path_is_found_in_the_working_folder(tmp_path, monkeypatch, path):
    (tmp_path / "my_checks.py").write_text(
        "def is_short(text): return text[:1] and len(text) < 4\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_checks", raising=False)
    before = list(sys.path)
    is_short = checker(path)
    assert (is_short("abc"), is_short("abcd"), is_short("")) == (True, False, False)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pyhton", "unknown checker 'pyhton'; choose python"),
        ("regex:(", "not a regular expression"),
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such", "cannot be imported"),
        ("math:pi", "not a function"),
        (":f", "cannot be imported"),
        ("str.isdigit", "cannot be imported"),
    ],
)
def test_a_wrong_checker_is_one_line(name, message):
    with pytest.raises(UserError, match="(?s)" + message.replace("(", r"\(")) as caught:
        checker(name)
    assert "\n" not in str(caught.value)


def test_smiles_needs_rdkit_or_checks_molecules():
    try:
        import rdkit  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install rdkit"):
            checker("smiles")
    else:
        is_molecule = checker("smiles")
        assert is_molecule("CCO")
        assert not is_molecule("")
        assert not is_molecule("C(")


def test_a_function_is_its_own_checker():
    assert checker(str.isdigit) is str.isdigit
