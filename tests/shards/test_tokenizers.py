import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CanineTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from shards import load_tokenizer
from shards.format.tokenizers import fingerprint, train_tokenizer
from shards.write.encoders import make_encoder
from t5vae.common.errors import UserError

LINES = [f"self.assertEqual(value[{i}], {i % 7}):" for i in range(200)]
TRAINED = train_tokenizer(LINES, 400)
BYTE = load_tokenizer("byte")
PIECES = ["▁", "▁self", "self", ".", "▁value", "value", "lue", "[", "]", "assert", *"abcdefvq01E=,"]
T5 = T5Tokenizer(
    vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in PIECES)],
    extra_ids=0,
)
TOKENIZERS = {"train": TRAINED, "t5": T5, "byte": BYTE, "slow": CanineTokenizer()}
ALL = pytest.mark.parametrize("name", TOKENIZERS)
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS | st.sampled_from("self.value[0] \U0001f600e\u0301 "), max_size=60)


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTE], ids=["train", "byte"])
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_round_trip_is_lossless(tokenizer, text):
    if not make_encoder(tokenizer, "text").usable([text])[0]:
        return
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == 1
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_ids_are_those_of_t5():
    ids = TRAINED.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"])
    assert ids == [0, 1, 2]
    assert (TRAINED.pad_token_id, TRAINED.eos_token_id, TRAINED.unk_token_id) == (0, 1, 2)


def test_no_piece_holds_both_letters_and_punctuation():
    pieces = TRAINED.convert_ids_to_tokens(TRAINED("self.assertEqual(value[1], 1):")["input_ids"])
    words = [piece.removeprefix("Ġ") for piece in pieces[:-1]]
    assert "self" in words
    assert all(word.isalnum() or not any(map(str.isalnum, word)) for word in words)


def test_training_is_deterministic_and_survives_saving(tmp_path):
    again = train_tokenizer(LINES, 400)
    assert fingerprint(again) == fingerprint(TRAINED)
    again.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded(["a", "some text"], padding=True, truncation=True, max_length=2)  # leaves state behind
    assert fingerprint(loaded) == fingerprint(TRAINED) != fingerprint(train_tokenizer(LINES, 401))
    assert fingerprint(BYTE) != fingerprint(TRAINED)


@ALL
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_encoders_give_the_ids_of_their_tokenizer(name, texts):
    encoder = make_encoder(TOKENIZERS[name], "text")
    texts = [text for text in texts if encoder.usable([text])[0]]
    tokens, lengths = encoder.encode(texts)
    rows = [TOKENIZERS[name](text)["input_ids"] for text in texts]
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int64)
    assert tokens.tolist() == [token for row in rows for token in row]
    assert lengths.tolist() == [len(row) for row in rows]


def test_a_call_that_pads_and_truncates_leaves_the_encoder_alone():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TRAINED.backend_tokenizer, pad_token="<pad>", eos_token="</s>"
    )
    tokenizer(["a", LINES[0]], padding=True, truncation=True, max_length=2)
    lengths = make_encoder(tokenizer, "text").encode(["a", LINES[0]])[1]
    assert lengths.tolist() == [2, len(TRAINED(LINES[0])["input_ids"])]


@ALL
def test_texts_with_special_tokens_or_without_any_token_are_not_usable(name):
    encoder = make_encoder(TOKENIZERS[name], "text")
    end = TOKENIZERS[name].eos_token
    texts = ["x", f"a{end}b", "é", end, "", "?!"]
    assert encoder.usable(texts).tolist() == [True, False, True, False, False, True]
    assert encoder.usable([]).tolist() == []


def test_texts_that_the_tokenizer_leaves_nothing_of_are_not_usable():
    assert make_encoder(T5, "text").usable(["\u2003 ", "a b", "\u3000", "_"]).tolist() == [
        False,
        True,
        False,
        True,
    ]


@ALL
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, max_length=st.integers(7, 20))
def test_pieces_fit_and_make_up_the_text(name, text, max_length):
    encoder = make_encoder(TOKENIZERS[name], "text")
    if not encoder.usable([text])[0]:
        return
    pieces = list(encoder.cut(text, max_length))
    assert "".join(pieces) == text
    assert encoder.encode(pieces)[1].max() <= max_length


@pytest.mark.parametrize("name", ["train", "t5", "byte"])
def test_pieces_are_filled(name):
    encoder = make_encoder(TOKENIZERS[name], "text")
    lengths = encoder.encode(list(encoder.cut(" ".join(LINES), 32)))[1]
    assert lengths[:-1].min() >= 29
    assert lengths.max() <= 32


@pytest.mark.parametrize("name", ["train", "byte"])
def test_no_character_is_cut_and_one_that_does_not_fit_is_left_out(name):
    encoder = make_encoder(TOKENIZERS[name], "text")
    assert list(encoder.cut("a\U0001f600b\U0001f600", 5)) == ["a", "\U0001f600", "b", "\U0001f600"]
    assert list(encoder.cut("a\U0001f600b\U0001f600", 4)) == ["a", "b"]
    assert list(encoder.cut("\U0001f600", 2)) == []


def ids(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def test_token_arrays_are_ended_and_checked():
    encoder = make_encoder(BYTE, "tokens")
    rows = [(5, 6), (5, 6, 1), (5, 6, 1, 0, 0), (5, 6, 0), (5, 0, 6), (5, 1, 6), (5, 384), (1,), ()]
    items = [ids(*row) for row in rows]
    assert encoder.usable(items).tolist() == [True] * 4 + [False] * 5
    tokens, lengths = encoder.encode(items[:4])
    assert tokens.tolist() == [5, 6, 1] * 4
    assert (tokens.dtype, lengths.dtype, lengths.tolist()) == (np.int32, np.int64, [3] * 4)
    assert encoder.encode([])[0].dtype == np.int32
    assert list(encoder.cut(ids(5, 6, 7, 8, 9, 1), 3)) == [ids(5, 6), ids(7, 8), ids(9)]


def test_workers_need_neither_transformers_nor_torch():
    script = """
import pickle, sys
for encoder in pickle.loads(sys.stdin.buffer.read()):
    item = b"\\5\\0\\0\\0" if type(encoder).__name__ == "TokenEncoder" else "text"
    assert encoder.usable([item])[0] and list(encoder.cut(item, 4))
    print(encoder.encode([item])[0].tolist())
assert not {"torch", "transformers"} & set(sys.modules)
"""
    encoders = [make_encoder(TRAINED, "text"), make_encoder(BYTE, "text")]
    encoders.append(make_encoder(TRAINED, "tokens"))
    printed = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(encoders),
        capture_output=True,
        check=True,
    )
    expected = [TRAINED("text")["input_ids"], BYTE("text")["input_ids"], [5, 1]]
    assert printed.stdout.decode().split("\n")[:3] == [str(row) for row in expected]


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load the tokenizer") as error:
        load_tokenizer(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=TRAINED.backend_tokenizer, pad_token="<pad>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pad or no end token"):
        load_tokenizer(tmp_path)
