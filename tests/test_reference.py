"""The tables of configuration keys, and that the documents have them as they are."""

from pathlib import Path

import pytest

from t5vae.config import keys
from t5vae.config.reference import BEGIN, END, describe_keys, tables, updated

TRAINING = Path(__file__).parents[1] / "docs/training.md"


def test_every_key_says_what_it_means():
    found = describe_keys()
    assert [key.name for key in found] == keys()
    for key in found:
        assert key.meaning, key.name
        assert key.kind, key.name
        assert key.default, key.name


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("run.name", "str", '""'),
        ("data.shards", "str | [{path, weight}, ...]", "required"),
        ("data.micro_batch_size", "int | null", "null"),
        ("model.normalize", "true | false", "true"),
        ("objective.mmd.kernel", "rbf | multi_rbf | imq | legacy", '"imq"'),
        ("optim.betas", "[float, float]", "[0.9, 0.98]"),
        ("deepspeed.zero_stage", "0 | 1 | 2 | 3", "1"),
        ("launcher.srun_args", "[str, ...]", "[]"),
        ("launcher.slurm", "{name: value, ...} | null", "null"),
    ],
)
def test_kinds_and_defaults_are_as_one_writes_them(name, kind, default):
    found = [(key.kind, key.default) for key in describe_keys() if key.name == name]
    assert found == [(kind, default)]


def test_the_document_has_every_key_as_the_code_has_it():
    """`make docs` mends it."""
    text = TRAINING.read_text()
    assert updated(text) == text
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_section_is_one_table():
    text = tables()
    assert text.count("\n### model\n") == text.count("\n### model.t5\n") == 1
    own = text.split("\n### model\n")[1].split("\n### ")[0]
    assert "| `latent_size` | int | `256` |" in own
    assert "`d_model`" not in own
    assert '| `on_corrupt` | error \\| skip | `"error"` |' in text


def test_only_what_is_between_the_marks_is_replaced():
    text = f"before\n{BEGIN}old\n{END}after\n"
    assert updated(text) == f"before\n{BEGIN}{tables()}\n\n{END}after\n"
    assert updated(updated(text)) == updated(text)
