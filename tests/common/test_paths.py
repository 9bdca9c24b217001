"""Tests of t5vae.common.paths."""

from pathlib import Path

import pytest

from t5vae.common.errors import UserError
from t5vae.common.paths import expanded


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/data", "/home/ada/data"),
        ("~", "/home/ada"),
        ("$SCRATCH/runs", "/scratch/ada/runs"),
        ("${SCRATCH}2/a b", "/scratch/ada2/a b"),
        ("s3://$BUCKET/a/${BUCKET}.d", "s3://words/a/words.d"),
        ("$LIKE_HOME/a", "/home/ada/a"),
        ("a~/b", "a~/b"),
        ("costs $5", "costs $5"),
        ("a$", "a$"),
        ("", ""),
    ],
)
def test_the_home_and_variables_are_put_in(monkeypatch, written, meant):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.setenv("BUCKET", "words")
    monkeypatch.setenv("LIKE_HOME", "~")
    assert expanded(written) == meant


@pytest.mark.parametrize("written", ["$NO_SUCH/a", "a/${NO_SUCH}", "s3://b/$NO_SUCH", "$EMPTY/a"])
def test_a_variable_that_is_not_set_is_refused_by_name(monkeypatch, written):
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=r"'NO_SUCH'|'EMPTY'") as caught:
        expanded(written)
    assert len(str(caught.value).splitlines()) == 1


def test_the_home_of_nobody_stays_as_it_is():
    assert expanded("~no-such-user/a") == "~no-such-user/a"
    assert expanded("~root/a") == str(Path("~root").expanduser() / "a")
