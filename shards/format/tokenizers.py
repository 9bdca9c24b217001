"""Tokenizers: load one, train one, tell one from another."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from shards.storage.store import UnreadableError, unreadable
from t5vae.common.errors import StorageError, UserError, first_line
from t5vae.common.storage import patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
FILES = (".jinja", ".json", ".model", ".txt")  # what a tokenizer is read from


def load_tokenizer(name_or_folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads and that ends each sequence with its end token.

    Args:
        name_or_folder: "byte" (ByT5's: needs no file), a folder, or a Hugging Face name.

    Raises:
        UserError: nothing loadable there, or no pad or end token.
        StorageError: the folder's storage failed for minutes.
    """
    from transformers import ByT5Tokenizer

    name = str(name_or_folder)
    if name == "byte":
        return ByT5Tokenizer()
    try:
        tokenizer = _load(name)
    except (StorageError, UnreadableError):
        raise
    except Exception as error:  # transformers raises a dozen kinds for a wrong name or file
        raise UserError(
            f"cannot load the tokenizer {name!r}: give a folder, a Hugging Face name, 'byte' or "
            f"'train:N' ({first_line(error)})"
        ) from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no pad or no end token: T5 needs both")
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(f"the tokenizer {name!r} does not end a sequence with its end token")
    return tokenizer


def _load(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    # Of storage that fails, its libraries say what they say of a wrong file, or nothing at all.
    is_folder = _read(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception:
        if not is_folder:
            raise
    _read(name)
    return AutoTokenizer.from_pretrained(name)


def _read(name: str) -> bool:
    """Read the files of a tokenizer's folder; whether there is one."""
    try:
        patiently(partial(_try_read, name), name)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no name of a file
        return False
    except OSError as error:
        raise unreadable(name, error) from None
    return True


def _try_read(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(FILES) and S_ISREG(entry.stat().st_mode):
                Path(entry).read_bytes()


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
