import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import UserError, load_tokenizer
from shards.tokenizers import encode, fingerprint, special_tokens, train_tokenizer

LINES = [f"self.assertEqual(value[{i}], {i % 7}):" for i in range(200)]
TRAINED = train_tokenizer(LINES, 400)
BYTE = load_tokenizer("byte")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTE], ids=["train", "byte"])
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_round_trip_is_lossless(tokenizer, text):
    if special_tokens(tokenizer).search(text):
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


def test_encode_is_flat():
    tokens, lengths = encode(TRAINED, ["self.x", "é"])
    ends = np.cumsum(lengths)
    assert tokens[: ends[0]].tolist() == TRAINED("self.x")["input_ids"]
    assert tokens[ends[0] :].tolist() == TRAINED("é")["input_ids"]


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load the tokenizer") as error:
        load_tokenizer(tmp_path / "nothing")
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=TRAINED.backend_tokenizer, pad_token="<pad>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pad or no end token"):
        load_tokenizer(tmp_path)
