import pytest
import torch

from t5vae.common.errors import UserError
from t5vae.latent.artifacts import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
ABOUT = {"name": "é", "r2": 0.25, "list": [1, None]}
MADE_FROM = {"model_sha256": "abc", "source": {"texts": 3}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "er" / "kept.safetensors"
    write_tensors(path, TENSORS, ABOUT, 1, MADE_FROM)
    return path


def test_what_is_kept_comes_back(path):
    tensors, about = read_tensors(path, 1, MADE_FROM)
    assert about == ABOUT
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [file.name for file in path.parent.iterdir()] == ["kept.safetensors"]


def test_what_was_made_otherwise_is_not_there(path):
    assert read_tensors(path, 2, MADE_FROM) is None
    assert read_tensors(path, 1, {**MADE_FROM, "model_sha256": "abd"}) is None
    assert read_tensors(path.with_name("other"), 1, MADE_FROM) is None


def test_a_later_one_takes_its_place(path):
    write_tensors(path, {"c": torch.ones(1)}, {}, 1, MADE_FROM)
    assert read_tensors(path, 1, MADE_FROM)[0].keys() == {"c"}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no metadata"])
def test_a_damaged_file_says_what_to_do(path, damage):
    if damage == "no metadata":
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-5], "empty": b"", "text": b"hello, world\n"}[damage])
    with pytest.raises(UserError, match=r"kept.safetensors is damaged .*: remove it"):
        read_tensors(path, 1, MADE_FROM)


def test_what_cannot_be_written_leaves_what_was_there(path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5vae.latent.artifacts.save_file", no_space)
    with pytest.raises(UserError, match=r"cannot write .*kept.safetensors: .*No space left"):
        write_tensors(path, {"c": torch.ones(1)}, {}, 1, MADE_FROM)
    assert read_tensors(path, 1, MADE_FROM)[1] == ABOUT
    assert [file.name for file in path.parent.iterdir()] == ["kept.safetensors"]
