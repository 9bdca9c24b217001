"""The training set as a split of blocks: the same answers as of all texts in memory, in less."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Tokenizer

import shards
from shards.format.blocks import BLOCK
from shards.format.tokenizers import load_tokenizer, train_tokenizer
from t5vae.evaluation import training as module
from t5vae.evaluation.rows import Rows
from t5vae.evaluation.spelling import views
from t5vae.evaluation.training import GivenTraining, Training
from tests.shards.sources import write_tar
from tests.shards.test_splits import CASED, normalising

LINES = [f"naïve_{i} = 'ü漢字 {i % 7}'  # été" for i in range(300)]
ROWS = 64


def of_words(folder):
    """A tokenizer whose decoder puts spaces between words, and joins what begins with ##."""
    words = ["<pad>", "</s>", "<unk>", "the", "##m", "first", "##s", ".", "m", "漢"]
    vocab = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def of_pieces(_):
    tokenizer = train_tokenizer(LINES, 300)
    tokenizer.add_tokens([AddedToken("<ü x>", normalized=False), "Ġhello"])
    return tokenizer


def of_letters(_):
    """T5's kind, which knows few letters."""
    vocab = [(piece, -2.0) for piece in ("<pad>", "</s>", "<unk>", "▁", "▁a", *"ab ü漢", "▁▁b")]
    return T5Tokenizer(vocab=vocab, extra_ids=3)


KINDS = {
    "bytes": lambda _: load_tokenizer("byte"),
    "pieces": of_pieces,
    "normalising": lambda folder: load_tokenizer(normalising(folder)),
    "letters": of_letters,
    "words": of_words,
}


class Made:
    """A dataset whose blocks are made as they are read.

    Args:
        tokenizer: its tokenizer.
        block: makes lengths and tokens of a block, by number.
        count: blocks, of ROWS sequences each.
    """

    def __init__(self, tokenizer, block, count, tokens=0):
        self.tokenizer, self.block, self.count = lambda: tokenizer, block, count
        self.tokens, self.read = tokens, []

    def sequences(self, split):
        assert split == "train"
        return self.count * ROWS

    def block_table(self, split):
        table = np.zeros(self.count, BLOCK)
        table["sequences"], table["tokens"] = ROWS, self.tokens
        return table

    def blocks(self, split, numbers=None):
        for number in range(self.count) if numbers is None else numbers:
            self.read.append(number)
            yield self.block(number)


def random_block(vocabulary, most):
    """Makes blocks of any tokens of a vocabulary, special ones amid them too."""

    def block(number):
        rng = np.random.default_rng(number)
        lengths = rng.integers(1, most, ROWS).astype(np.uint16)
        tokens = rng.choice(vocabulary, lengths.sum()).astype(np.uint16)
        tokens[lengths.cumsum(dtype=np.int64) - 1] = 1
        return lengths, tokens

    return block


def decoded(tokenizer, rows):
    return tokenizer.batch_decode(
        list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [False, True])
def test_it_finds_what_is_there_whatever_the_tokens_make_up(kind, few, tmp_path):
    """Few tokens, some of them halves of a character: many sequences that have the same text."""
    tokenizer = KINDS[kind](tmp_path / "tokenizer")
    vocabulary = np.arange(len(tokenizer))
    if few:
        alone = decoded(tokenizer, [[token] for token in vocabulary])
        broken = [token for token in vocabulary if alone[token] in ("", "\ufffd")]
        vocabulary = np.array([*broken[:12], *broken[-12:], *vocabulary[3:6], *vocabulary[-3:]])
    dataset = Made(tokenizer, random_block(vocabulary, 6), 12)
    rows, others = (
        Rows.joined(map(random_block(vocabulary, 6), numbers))
        for numbers in (range(12), range(10, 22))
    )
    texts = decoded(tokenizer, rows)
    asked = [*decoded(tokenizer, others), *(f"{text} " for text in texts[:50]), "", " ", "\ufffd"]
    given = GivenTraining(rows, texts).find(asked, others)
    found = Training(dataset).find(asked, others)
    assert found.texts == given.texts
    assert found.ids == given.ids
    assert len(asked) / 10 < len([text for text in asked if text in given.texts]) < len(asked)
    assert Training(dataset).known(asked) == given.texts
    assert dataset.read == list(range(12)) * 2
    assert (views(tokenizer) is None) == (kind == "words")


def built(tmp_path, name, lines, **options):
    (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return shards.build(tmp_path / f"{name}.txt", tmp_path / name, block_size=16, **options)


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
@pytest.mark.parametrize("tokenizer", ["byte", "train:300", "normalising"])
def test_datasets_answer_as_their_texts_in_memory_do(tokenizer, overflow, tmp_path):
    if tokenizer == "normalising":
        tokenizer = normalising(tmp_path / "tokenizer")
    options = {"tokenizer": tokenizer, "overflow": overflow, "valid_fraction": 0.3}
    first = built(tmp_path, "a", [*CASED, *LINES], max_length=25, **options)
    options["tokenizer"] = tmp_path / "a" / "tokenizer"
    built(tmp_path, "b", [*CASED[:200], *map(str, range(100))], max_length=9, **options)
    dataset = shards.open_dataset([tmp_path / "a", tmp_path / "b"])
    everything = np.arange(dataset.sequences("train"))
    ids_NT, lengths_N = dataset.read("train", everything)
    rows = [row[:n].tolist() for row, n in zip(ids_NT, lengths_N, strict=True)]
    texts = dataset.texts("train", everything)
    own, given = Training(dataset), GivenTraining(rows, texts)
    assert own.count == given.count > first.sequences("train")
    assert list(own.sample()) == rows
    valid = np.arange(dataset.sequences("valid"))
    asked = [*dataset.texts("valid", valid), *texts[::3], *CASED[::2], *LINES, "x"]
    held_out = [*rows[::7], *(row[:-1] for row in rows[:20]), [5, 1]]
    expected = given.find(asked, held_out)
    assert own.find(asked, held_out) == expected
    assert len(expected.texts) > 100


def test_a_token_corpus_answers_as_its_texts_in_memory_do(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(120, 259, rng.integers(1, 4)).tolist() for _ in range(2000)]
    records = []
    for row in rows:
        np.save(content := BytesIO(), np.array(row))
        records.append({"npy": content.getvalue()})
    path = write_tar(tmp_path / "a.tar", records)
    options = {"format": "webdataset", "column": "npy", "max_length": 9, "block_size": 16}
    shards.build(path, tmp_path / "a", tokenizer="byte", **options)
    dataset = shards.open_dataset(tmp_path / "a")
    texts = dataset.texts("train", np.arange(dataset.sequences("train")))
    asked = [*texts[:200], *map(chr, range(1000))]
    assert Training(dataset).known(asked) == set(texts) & set(asked)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_its_memory_is_that_of_blocks(kind, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROWS", 4096)
    tokenizer = KINDS[kind](None)
    made = list(map(random_block(np.arange(3, 120), 12), range(8)))
    dataset = Made(tokenizer, lambda number: made[number % 8], 500, tokens=4096 * 7)
    asked = decoded(tokenizer, Rows.joined(iter(made[3:4])))[:1000]
    held_out = Rows.joined(iter(made[5:6]))[:1000]
    Training(dataset).find(asked, held_out)  # what is loaded once
    tracemalloc.start()
    found = Training(dataset).find(asked, held_out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert Training(dataset).count > 2_000_000
    assert found.texts == set(asked)
    assert found.ids == set(map(tuple, held_out))
    assert peak < 32 * 2**20


def test_what_is_found_is_not_decoded_again(monkeypatch):
    tokenizer = load_tokenizer("byte")
    same = np.full(ROWS, 3, np.uint16), np.tile([70, 71, 1], ROWS).astype(np.uint16)
    dataset = Made(tokenizer, lambda number: same, 50)
    rows, decode = [], tokenizer.batch_decode

    def counted(ids, **options):
        rows.extend(ids)
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "batch_decode", counted)
    assert Training(dataset).known(["CD", "DC"]) == {"CD"}
    assert len(rows) == len(tokenizer) + ROWS


@pytest.mark.parametrize(
    ("most", "most_tokens", "blocks"), [(640, 2**20, 10), (10**6, 30 * ROWS, 3), (1, 1, 1)]
)
def test_a_sample_is_of_few_blocks_across_the_split(most, most_tokens, blocks, monkeypatch):
    monkeypatch.setattr(module, "MOST", most)
    monkeypatch.setattr(module, "MOST_TOKENS", most_tokens)
    dataset = Made(None, random_block(np.arange(3, 20), 12), 1000, tokens=10 * ROWS)
    sample = Training(dataset).sample()
    assert len(dataset.read) == blocks
    assert dataset.read == [1000 * part // blocks for part in range(blocks)]
    assert len(sample) == blocks * ROWS
    lengths, tokens = dataset.block(dataset.read[-1])
    assert sample[len(sample) - 1] == tokens[-int(lengths[-1]) :].tolist()
    assert list(Training(dataset).sample()) == list(sample)


def test_blocks_of_a_mixture_are_read_by_number(tmp_path):
    options = {"tokenizer": "byte", "max_length": 60, "valid_fraction": 0}
    parts = [built(tmp_path, name, LINES[:n], **options) for name, n in (("a", 100), ("b", 50))]
    dataset = shards.open_dataset([tmp_path / "a", tmp_path / "b"])
    every = list(dataset.blocks("train"))
    assert len(every) == len(dataset.block_table("train")) == 7 + 4
    chosen = list(dataset.blocks("train", np.array([0, 6, 7, 10])))
    for number, block in zip((0, 6, 7, 10), chosen, strict=True):
        for mine, its in zip(block, every[number], strict=True):
            assert np.array_equal(mine, its)
    assert [len(lengths) for lengths, _ in chosen] == [16, 4, 16, 2]
    assert sum(part.sequences("train") for part in parts) == sum(len(b[0]) for b in every)
