"""Tokenizers: load one, train one, turn texts into flat arrays of token ids."""

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5


def load_tokenizer(name_or_folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads and that ends each sequence with its end token.

    Args:
        name_or_folder: "byte" (ByT5's: needs no file), a folder, or a Hugging Face name.

    Raises:
        UserError: nothing loadable there, or no pad or end token.
    """
    from transformers import AutoTokenizer, ByT5Tokenizer

    name = str(name_or_folder)
    if name == "byte":
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises a dozen kinds for a wrong name or file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load the tokenizer {name!r}: give a folder, a Hugging Face name, 'byte' or "
            f"'train:N' ({reason})"
        ) from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no pad or no end token: T5 needs both")
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(f"the tokenizer {name!r} does not end a sequence with its end token")
    return tokenizer


def pieces_to_train(tokenizer: str) -> int | None:
    """N of "train:N", None for any other tokenizer.

    Raises:
        UserError: N is no number of at least 259 (256 bytes and 3 special tokens).
    """
    if not tokenizer.startswith("train:"):
        return None
    count = tokenizer.removeprefix("train:")
    if not count.isdecimal() or int(count) < 259:
        raise UserError(f"tokenizer {tokenizer!r}: write train:N with N at least 259")
    return int(count)


def train_tokenizer(texts: Iterable[str], pieces: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer, lossless for every string without special tokens.

    Text is split into words, numbers and runs of punctuation first, as for GPT-2: pieces that
    cross punctuation make shorter sequences, but of syntax that a model learns less well.

    Args:
        texts: the training texts.
        pieces: size of the vocabulary; a small corpus may yield fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """A pattern that finds special tokens spelled out in a text, where they would not survive."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return re.compile("|".join(map(re.escape, sorted(names | {tokenizer.eos_token}))))


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize texts, end tokens included.

    Returns:
        tokens: int32 [sum of lengths], all sequences one after the other.
        lengths: int64 [len(texts)].
    """
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    return tokens, lengths


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A sha256 of what determines the tokenizer's ids: the same before and after saving."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for call_state in ("padding", "truncation"):  # left behind by the last call
            content.pop(call_state, None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
