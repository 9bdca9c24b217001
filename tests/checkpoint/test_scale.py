"""Checkpoints of up to 1,024 ranks, of tiny parameters: what one rank opens, reads and hashes."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t5vae.checkpoint import rank_files
from t5vae.checkpoint.fragments import fill_model
from t5vae.checkpoint.manifest import FORMAT, fragments_of, read_manifest, seal
from t5vae.checkpoint.places import Place, grouped, places_of
from t5vae.checkpoint.rank_files import Fragments, file_name, write
from t5vae.checkpoint.verifying import own_files
from t5vae.common.errors import UserError
from t5vae.model import T5VAE, T5VAEConfig

KINDS = ("weight", "exp_avg", "exp_avg_sq")
LENGTHS = {"embedding": 3000, "norm": 7, "matrix": 1024, "bias": 1}


def laid_out(stage: int, world: int, lengths: dict[str, int] = LENGTHS) -> dict[str, Place]:
    """Where ranks hold parameters, as DeepSpeed deals them out."""
    if stage in (0, 3):
        return {name: Place(0, length, -(-length // world)) for name, length in lengths.items()}
    size, offset, places = -(-sum(lengths.values()) // world), 0, {}
    for name, length in lengths.items():
        places[name] = Place(offset, length, size)
        offset += length
    return places


def told(places: dict[str, Place]) -> list:
    return grouped([(dict.fromkeys(KINDS, torch.float32), places)])


def whole(kind: str, name: str, length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32) + 1e4 * KINDS.index(kind) + len(name) * 1e5


def saved(folder: Path, places: dict[str, Place], world: int, **more) -> Path:
    """A checkpoint of so many ranks, of the product's own files."""
    folder.mkdir(exist_ok=True)
    files = {}
    for rank in range(world):
        tensors = {"random/torch/0": torch.full((16,), rank % 256, dtype=torch.uint8)}
        for name, place in places.items():
            start, length = place.part(rank)
            for kind in KINDS if length else ():
                values = whole(kind, name, place.elements)
                tensors[f"{kind}/{name}/{start}"] = values[start : start + length]
        path = folder / file_name(rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            files[path.name] = write(path, tensors, {"random": "{}"})
    manifest = {
        "format": FORMAT,
        "step": 1,
        "layout": {"world_size": world, "zero_stage": 0, "precision": "fp32"},
        "scalars": {"step": 1.0, "loss_scale": {}},
        **{"model": {}, "data": {}, "watch": {}, "held_out": None, "weights_from": None},
        **{"files": files, "ranges": told(places), **more},
    }
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


@pytest.fixture
def opens(monkeypatch):
    """Names of the files of ranks that are opened, in order."""
    found, real = [], os.open

    def noting(path, *args, **more):
        if str(path).endswith(".safetensors"):
            found.append(Path(path).name)
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", noting)
    return found


def load(checkpoint: Path, places: dict[str, Place], rank: int) -> Fragments:
    """What a rank of some layout does to go on."""
    with fragments_of(checkpoint, read_manifest(checkpoint)) as found:
        for name, place in places.items():
            start, length = place.part(rank)
            for kind in found.kinds(name):
                values = whole(kind, name, place.elements)[start : start + length]
                assert found.read(kind, name, start, length).equal(values), (kind, name)
    return found


@pytest.mark.parametrize("world", [1, 2, 64, 1024])
@pytest.mark.parametrize("stage", [0, 1])
def test_at_the_same_layout_a_rank_opens_its_own_file_once(tmp_path, opens, stage, world):
    places = laid_out(stage, world)
    checkpoint = saved(tmp_path / "step-00000001", places, world)
    for rank in {0, world // 2, world - 1}:
        opens.clear()
        load(checkpoint, places, rank)
        assert opens in ([file_name(rank)], [])  # the last may hold nothing


@pytest.mark.parametrize("stages", [(3, 3), (1, 2), (3, 1), (1, 3)])
def test_at_another_layout_a_rank_opens_those_that_hold_its_share_once(tmp_path, opens, stages):
    """768 ranks go on from 1,024, of a parameter that all of these share."""
    before, now = stages
    lengths = {"matrix": 3 * 2**13}
    checkpoint = saved(tmp_path / "step-00000001", laid_out(before, 1024, lengths), 1024)
    for rank in (0, 1, 500, 767):
        opens.clear()
        load(checkpoint, laid_out(now, 768, lengths), rank)
        assert len(opens) == len(set(opens)) <= 3


def test_headers_are_read_once_and_of_files_that_are_needed(tmp_path, monkeypatch):
    places = laid_out(3, 64)
    checkpoint = saved(tmp_path / "step-00000001", places, 64)
    read, real = [], rank_files._header
    monkeypatch.setattr(
        rank_files, "_header", lambda path, fill: read.append(path) or real(path, fill)
    )
    load(checkpoint, places, 5)
    assert [path.name for path in read] == [file_name(5)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([(0, 1), (1, 0), (1, 1), (3, 3), (2, 3)]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.booleans(),
)
def test_every_element_is_right_at_any_other_layout(
    tmp_path_factory, before, now, stages, lengths, is_placed
):
    named = {f"p{number}": length for number, length in enumerate(lengths)}
    folder = tmp_path_factory.mktemp("layouts") / "step-00000001"
    more = {} if is_placed else {"ranges": []}
    checkpoint = saved(folder, laid_out(stages[0], before, named), before, **more)
    for rank in range(now):
        found = load(checkpoint, laid_out(stages[1], now, named), rank)
        assert (found.places is not None) == is_placed


class Plain(torch.nn.Module):
    """A model of these parameters."""

    def __init__(self, lengths: dict[str, int]):
        super().__init__()
        for name, length in lengths.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(1, length)))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_plain_model_is_filled_file_by_file_with_one_header_at_a_time(tmp_path, opens, stage):
    checkpoint = saved(tmp_path / "step-00000001", laid_out(stage, 64), 64)
    model = Plain(LENGTHS)
    opens.clear()
    with fragments_of(checkpoint, read_manifest(checkpoint)) as found:
        fill_model(model, found)
        assert found.headers == {}
    assert len(opens) == len(set(opens)) == 64
    for name, parameter in model.named_parameters():
        assert parameter[0].equal(whole("weight", name, LENGTHS[name]))


@pytest.mark.parametrize("other", [{"matrix": 1023}, {"bias": 2}, {"more": 1}])
@pytest.mark.parametrize("more", [{}, {"ranges": []}])
def test_a_plain_model_of_other_parameters_is_refused(tmp_path, other, more):
    checkpoint = saved(tmp_path / "step-00000001", laid_out(3, 4), 4, **more)
    for lengths in (LENGTHS | other, {name: LENGTHS[name] for name in ("matrix", "bias")}):
        found = fragments_of(checkpoint, read_manifest(checkpoint))
        with found, pytest.raises(ValueError, match="other parameters"):
            fill_model(Plain(lengths), found)


# What a manifest may say.


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"matrix": [0, 1024, 255]}, "weight of matrix lies elsewhere"),
        ({"matrix": [1, 1024, 256]}, "weight of matrix lies elsewhere"),
        ({"matrix": [0, 0, 256]}, "weight of matrix lies elsewhere"),
        ({"matrix": [0, 1024, 0]}, "weight of matrix lies elsewhere"),
        ({"matrix": [0, 2**62, 2**61]}, "more than the files hold"),
        ({"matrix": [0, 2**70, 2**61]}, "ranges.0.parameters.matrix.1"),
        ({"matrix": [-1, 1024, 2**61]}, "ranges.0.parameters.matrix.0"),
        ({"matrix": [0, 1024]}, "ranges.0.parameters.matrix"),
        ({"matrix": [0, 1024, 256.0]}, "ranges.0.parameters.matrix.2"),
        ({"matrix": {}}, "ranges.0.parameters.matrix"),
    ],
    ids=str,
)
def test_places_that_cannot_be_are_no_manifest(tmp_path, changes, why):
    group = {"kinds": {"weight": "F32"}, "parameters": changes}
    checkpoint = saved(tmp_path / "step-00000001", laid_out(3, 4), 4, ranges=[group])
    with pytest.raises(ValueError, match=why):
        read_manifest(checkpoint)


@pytest.mark.parametrize("kinds", [{"weight": "I32"}, {"weight": None}, []])
def test_kinds_of_other_dtypes_are_no_manifest(tmp_path, kinds):
    group = {"kinds": kinds, "parameters": {"matrix": [0, 4, 1]}}
    checkpoint = saved(tmp_path / "step-00000001", laid_out(3, 4), 4, ranges=[group])
    with pytest.raises(ValueError, match="kinds"):
        read_manifest(checkpoint)


def test_places_need_the_files_of_all_ranks(tmp_path):
    checkpoint = saved(tmp_path / "step-00000001", laid_out(3, 4), 4)
    manifest = read_manifest(checkpoint)
    del manifest["files"][file_name(1)]
    (checkpoint / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(ValueError, match=r"ranges: .*files of some ranks are missing"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"matrix": [0, 1024, 512]}, {"weight": "F32"}),
        ({"matrix": [9, 1024, 300]}, {"weight": "F32"}),
        ({"matrix": [0, 1024, 256]}, {"weight": "BF16"}),
        ({"matrix": [0, 1024, 256]}, {"exp_inf": "F32"}),
        ({"other": [0, 1024, 256]}, {"weight": "F32"}),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_a_header_is_damage(tmp_path, changes, kinds):
    group = {"kinds": kinds, "parameters": changes}
    checkpoint = saved(tmp_path / "step-00000001", laid_out(3, 4), 4, ranges=[group])
    (name,), (kind,) = changes, kinds
    with fragments_of(checkpoint, read_manifest(checkpoint)) as found:
        assert found.length(kind, name) == 1024
        with pytest.raises(
            UserError, match=r"rank-0000\d.safetensors is damaged: it does not hold"
        ):
            found.read(kind, name, 0, 1024)


def test_beyond_a_parameters_end_nothing_is_saved(tmp_path):
    places = laid_out(1, 4)
    checkpoint = saved(tmp_path / "step-00000001", places, 4)
    with fragments_of(checkpoint, read_manifest(checkpoint)) as found:
        for start, length, there in ((1020, 8, 4), (1024, 1, 0), (5000, 3, 0)):
            with pytest.raises(ValueError, match=f"{there} of {length} elements are saved"):
                found.read("weight", "matrix", start, length)
        assert found.read("weight", "matrix", 7, 0).shape == (0,)


# Of a model of 11 billion parameters.


@pytest.fixture(scope="module")
def eleven_billion() -> dict[str, int]:
    t5 = {"d_model": 1024, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "d_kv": 128}
    with torch.device("meta"):
        model = T5VAE(T5VAEConfig(t5={**t5, "vocab_size": 32128}, sequence_length=512))
    lengths = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert 11e9 < sum(lengths.values()) < 12e9
    return lengths


@pytest.mark.parametrize("world", [768, 1024])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_manifest_of_a_large_model_on_many_ranks_is_small(eleven_billion, stage, world):
    ranges = told(laid_out(stage, world, eleven_billion))
    assert len(json.dumps(ranges)) < 50_000
    files = {file_name(rank): {"bytes": 129_000_000, "sha256": "0" * 64} for rank in range(world)}
    assert len(seal({"files": files, "ranges": ranges})) < 400_000
    assert len(places_of(ranges)) == len(KINDS) * len(eleven_billion)


# Hashing.


@pytest.mark.parametrize(("saved_by", "world"), [(1024, 1024), (1024, 768), (8, 1024), (1024, 1)])
def test_ranks_hash_each_file_once_and_about_as_many(saved_by, world):
    files = [file_name(rank) for rank in range(saved_by)]
    parts = [own_files(files, rank, world) for rank in range(world)]
    assert sorted(name for part in parts for name in part) == files
    assert max(map(len, parts)) == -(-saved_by // world)
    if saved_by == world:
        assert parts == [[name] for name in files]
