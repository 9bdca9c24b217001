"""Held out is held out: by what a tokenizer makes of a text, whatever it makes of it."""

import json

import numpy as np
import pytest
import xxhash
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, T5Tokenizer

import shards
from shards.format.tokenizers import train_tokenizer
from shards.write.encoders import make_text_encoder
from shards.write.stages import in_valid
from tests.shards.sources import write_tar

HALF = {"max_length": 40, "valid_fraction": 0.5}
WORDS = ["the", "first", "of", "all", "words", "that", "anybody", "may", "write"]
TEXTS = [f"{WORDS[n % 9]} {WORDS[n // 9 % 9]} {n}" for n in range(200)]
CASED = [way(text) for text in TEXTS for way in (str, str.upper, str.title)]


def normalising(folder):
    """A tokenizer for which lower and upper case are the same, and so are ﬁ and fi."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def sequences(index, split) -> list[tuple[int, ...]]:
    ids, lengths = index.read(split, np.arange(index.sequences(split)))
    return [tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]


def side_of(text: str) -> str:
    own = np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
    return "valid" if in_valid(own, 0.5)[0] else "train"


def sides(index) -> dict[str, str]:
    return {
        text: split
        for split in index.splits
        for text in index.texts(split, np.arange(index.sequences(split)))
    }


def built(tmp_path, name, lines, **options):
    (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return shards.build(tmp_path / f"{name}.txt", tmp_path / name, **HALF | options)


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
def test_what_a_tokenizer_takes_for_equal_is_kept_once_and_on_one_side(tmp_path, overflow):
    tokenizer = normalising(tmp_path / "tokenizer")
    options = {"tokenizer": tokenizer, "overflow": overflow, "max_length": 10}
    index = built(tmp_path, "a", CASED, **options)
    train, valid = sequences(index, "train"), sequences(index, "valid")
    assert train
    assert valid
    assert not set(train) & set(valid)
    assert len({*train, *valid}) == len(train) + len(valid)
    assert sides(index) == {text: side_of(text) for text in sides(index)}
    assert index.texts_read == 600
    dropped = sum(index.dropped.values())
    if overflow == "split":
        assert set("".join(sides(index))) == set("".join(TEXTS))
    else:
        assert index.sequences("train") + index.sequences("valid") + dropped == 600
    assert index.dropped["duplicate once tokenized"] >= 2 * len(sides(index))


def test_the_way_through_the_disk_does_not_show(tmp_path, small_parts, digests):
    tokenizer = normalising(tmp_path / "tokenizer")
    (tmp_path / "in").mkdir()
    once = built(tmp_path, "a", CASED, tokenizer=tokenizer)
    twice = built(tmp_path / "in", "a", CASED, tokenizer=tokenizer, workers=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "in/a")
    assert once.sha256 == twice.sha256


def test_duplicates_that_are_wanted_are_on_one_side(tmp_path):
    tokenizer = normalising(tmp_path / "tokenizer")
    index = built(tmp_path, "a", CASED, tokenizer=tokenizer, dedupe=False)
    train, valid = sequences(index, "train"), sequences(index, "valid")
    assert len(train) + len(valid) == 600
    assert not set(train) & set(valid)


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_a_lossless_tokenizer_splits_by_the_text(tmp_path, tokenizer):
    index = built(tmp_path, "a", CASED, tokenizer=tokenizer)
    assert sides(index) == {text: side_of(text) for text in CASED}
    assert index.altered is None
    assert "altered" not in json.loads((tmp_path / "a/index.json").read_text())


def test_a_grown_corpus_and_a_tokenizer_trained_anew_move_no_line(tmp_path):
    first = sides(built(tmp_path, "a", CASED, tokenizer="train:280"))
    more = [f"another line {n}" for n in range(500)]
    second = sides(built(tmp_path, "b", more + CASED, tokenizer="train:500", seed=1))
    assert first.items() <= second.items()
    assert len(second) == 1100


def test_token_ids_fall_to_the_side_of_their_text(tmp_path):
    tokenizer = train_tokenizer(CASED, 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = [np.array(row, np.int32) for row in tokenizer(CASED)["input_ids"]]
    write_tar(tmp_path / "a.tar", [{"npy": row} for row in ids])
    for overflow in ("drop", "truncate"):
        index = shards.build(
            tmp_path / "a.tar",
            tmp_path / overflow,
            **HALF | {"max_length": 12},
            tokenizer=tmp_path / "tokenizer",
            overflow=overflow,
        )
        found = sides(index)
        assert len(found) > 100
        assert found == {text: side_of(text) for text in found}


PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789= "]


def t5(extra: list[str] | None = None) -> T5Tokenizer:
    """One that knows no brace."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in PIECES)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    if extra:
        tokenizer.add_tokens([AddedToken(piece, special=False) for piece in extra])
    return tokenizer


BRACES = [f"x{n} = {{a{n}}}" if n % 2 else f"x{n} = a{n}" for n in range(100)]


def test_a_build_says_what_a_tokenizer_loses(tmp_path, capsys):
    t5().save_pretrained(tmp_path / "tokenizer")
    index = built(tmp_path, "a", BRACES, tokenizer=tmp_path / "tokenizer")
    assert (index.altered.encoded, index.altered.altered) == (100, 50)
    assert index.altered.characters == {"{": 50, "}": 50}
    from shards.cli import _print_totals

    _print_totals(index)
    assert "50.0% of 100 texts; characters lost: { }" in " ".join(capsys.readouterr().out.split())


def test_losing_only_spaces_is_said_too(tmp_path):
    t5().save_pretrained(tmp_path / "tokenizer")
    lines = ["a  b", "c d", " e"]
    index = built(tmp_path, "a", lines, tokenizer=tmp_path / "tokenizer", valid_fraction=0)
    assert index.altered.altered in (1, 2)
    assert index.altered.characters.keys() == {" "}


def test_tokens_that_are_added_and_not_special_are_pieces_as_any_other(tmp_path):
    t5(["{", "}"]).save_pretrained(tmp_path / "tokenizer")
    index = built(tmp_path, "a", [*BRACES, "<pad> a", "b</s>"], tokenizer=tmp_path / "tokenizer")
    assert index.dropped == {"special token": 2}
    assert index.sequences("train") + index.sequences("valid") == 100
    assert not index.altered or "{" not in index.altered.characters


def test_which_tokenizers_are_sure_to_give_every_text_back(tmp_path):
    lossless = train_tokenizer(TEXTS, 300)
    assert make_text_encoder(lossless).lossless
    assert make_text_encoder(shards.load_tokenizer("byte")).lossless
    normal = shards.load_tokenizer(normalising(tmp_path / "tokenizer"))
    assert not make_text_encoder(normal).lossless
    assert not make_text_encoder(t5()).lossless
    stripping = train_tokenizer(TEXTS, 300)
    stripping.add_tokens([AddedToken("<mask>", special=False, lstrip=True)])
    assert not make_text_encoder(stripping).lossless


@pytest.mark.parametrize("tokenizer", ["byte", "train:300", "t5"])
def test_a_text_too_long_to_tokenize_is_dropped_or_cut(tmp_path, tokenizer):
    if tokenizer == "t5":
        t5().save_pretrained(tokenizer := tmp_path / "tokenizer")
    letters = np.random.default_rng(0).choice(list("abcdefgh"), 2**18)
    long = "".join(letters)
    options = {"tokenizer": tokenizer, "valid_fraction": 0, "max_length": 40}
    lines = [*(f"a{n} = b" for n in range(50)), long]
    dropped = built(tmp_path, "drop", lines, **options)
    assert (dropped.dropped, dropped.overlong) == ({"too long": 1}, 1)
    assert (dropped.sequences("train"), sum(dropped.unique_lengths)) == (50, 51)
    kept = built(tmp_path, "keep", lines, **options, overflow="truncate")
    assert (kept.sequences("train"), kept.overlong) == (51, 1)
    (cut,) = (text for text in sides(kept) if long.startswith(text))
    assert len(cut) >= 20
