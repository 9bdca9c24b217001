"""Tokenizers: load one, train one, tell one from another.

A folder's tokenizer may come from a stranger. It is one of transformers' own, made of the files in
the folder alone: no code of the folder runs, no path in it is followed, and its sizes are bounded.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.storage.local import refuse_outside, regular
from shards.storage.store import SMALL, UnreadableError, unreadable
from t5vae.common.errors import StorageError, UserError, first_line
from t5vae.common.storage import patiently

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5
FILES = (".jinja", ".json", ".model", ".txt")  # what a tokenizer is read from
PARSED = ("tokenizer_config.json", "config.json", "tokenizer.json")
OTHERS = frozenset({"trainer_state.json"})  # large files that may lie beside, and are not read
# Keys by which transformers opens no file, though it has written paths there.
NOT_OPENED = frozenset({"name_or_path", "special_tokens_map_file"})
MOST_LABELS = 2**20
PARTS = ("normalizer", "pre_tokenizer", "decoder")
MOST_GROWTH = 1000  # of a text by all replacements of tokenizer.json together


def load_tokenizer(
    name_or_folder: str | Path, inside: Path | None = None
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads and that ends each sequence with its end token.

    Args:
        name_or_folder: "byte" (ByT5's: needs no file), a folder, or a Hugging Face name.
        inside: the folder that links in it may not lead out of; by default itself.

    Raises:
        UserError: nothing loadable there, no pad or end token, or a folder whose tokenizer wants
            code or files of elsewhere.
        StorageError: the folder's storage failed for minutes.
    """
    from transformers import ByT5Tokenizer

    name = str(name_or_folder)
    if name == "byte":
        return ByT5Tokenizer()
    try:
        tokenizer = _load(name, inside or Path(name))
        last = tokenizer("a")["input_ids"][-1:]
    except (StorageError, UnreadableError):
        raise
    except Exception as error:  # transformers raises a dozen kinds for a wrong name or file
        raise UserError(
            f"cannot load the tokenizer {name!r}: give a folder, a Hugging Face name, 'byte' or "
            f"'train:N' ({first_line(error)})"
        ) from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no pad or no end token: T5 needs both")
    if last != [tokenizer.eos_token_id]:
        raise UserError(f"the tokenizer {name!r} does not end a sequence with its end token")
    return tokenizer


def _load(name: str, inside: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    # Of storage that fails, its libraries say what they say of a wrong file, or nothing at all.
    is_folder = _read(name, inside)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception:
        if not is_folder:
            raise
    _read(name, inside)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _read(name: str, inside: Path) -> bool:
    """Read and check the files of a tokenizer's folder; whether there is one."""
    try:
        settings = patiently(partial(_try_read, name, inside), name)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no name of a file
        return False
    except OSError as error:
        raise unreadable(name, error) from None
    if wrong := next(_wrong_with(name, settings), ""):
        raise UnreadableError(f"cannot load the tokenizer {name!r}: {wrong}")
    return True


def _try_read(folder: str, inside: Path) -> dict[str, Any]:
    """What the JSON files that decide on a tokenizer hold, by their names."""
    os.stat(folder)  # transformers does, and takes what fails for a name of the Hub's
    settings = {}
    templates = Path(folder, "additional_chat_templates")
    files = [*_files(folder), *(_files(templates) if templates.is_dir() else ())]
    for path in files:
        try:
            regular(path, inside)
        except OSError as error:
            raise OSError(error.errno, f"{path.name}: {first_line(error)}") from None
        if path.name.endswith(FILES):
            size = path.stat().st_size
            if size > SMALL and path.name not in OTHERS:
                raise OSError(errno.EFBIG, f"{path.name} has {size:,} bytes, more than {SMALL:,}")
            content = path.read_bytes() if size <= SMALL else b""
            if path.name in PARSED:
                settings[path.name] = _parsed(content)
    return settings


def _files(folder: str | Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if not entry.is_dir())


def _parsed(content: bytes) -> Any:
    """JSON, or an empty object: transformers says what is wrong with it."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return {}


def _wrong_with(folder: str, settings: dict[str, Any]) -> Iterator[str]:
    """What in the files of a tokenizer asks for more than those, or for too much."""
    own, model, whole = (settings.get(name, {}) for name in PARSED)
    if not all(isinstance(each, dict) for each in (own, model, whole)):
        yield f"{' or '.join(PARSED)} is no JSON object"
        return
    for kind in (own.get("tokenizer_class"), model.get("tokenizer_class")):
        if kind is not None and not _is_tokenizer(kind):
            yield f"{kind!r:.100} is no class of tokenizers"
    if own.get("init_inputs") or own.get("gguf_file"):
        yield "it is made of other files than a tokenizer's"
    for key, value in own.items():
        if key.endswith(("_file", "_files", "_path", "_dir", "_kwargs")) and key not in NOT_OPENED:
            here = key.endswith("_kwargs")
            for text in _texts(value):
                for path in (Path(folder, text), *([Path(text)] if here or "/" in text else ())):
                    if text and os.path.lexists(path) and _is_outside(path, folder):
                        yield f"its {key} names a file outside of it"
    labels = model.get("num_labels")
    if isinstance(labels, int) and labels > MOST_LABELS:
        yield f"its config.json has {labels:,} labels"
    if prod(map(_growth, _steps(whole))) > MOST_GROWTH:
        yield "its tokenizer.json makes long texts of short ones"


def _is_outside(path: Path, folder: str) -> bool:
    try:
        refuse_outside(path, Path(folder))
    except OSError:
        return True
    return False


def _is_tokenizer(name: Any) -> bool:
    """Whether what transformers would look up is a tokenizer: other classes load other things."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str):
        return False
    found = tokenizer_class_from_name(name) or tokenizer_class_from_name(f"{name}Fast")
    if found is None or hasattr(found, "_backends"):  # none, or one whose package is not installed
        return True
    return isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The normalizers, pre-tokenizers and decoders of a tokenizer.json."""
    if isinstance(part, list):
        for each in part:
            yield from _steps(each)
    elif isinstance(part, dict):
        yield part
        for name in (*PARTS, "normalizers", "pretokenizers", "decoders"):
            yield from _steps(part.get(name))


def _growth(step: dict[str, Any]) -> int:
    """How many characters it makes of one, at most."""
    made = step.get({"Replace": "content", "Prepend": "prepend"}.get(str(step.get("type")), ""))
    return max(1, len(made)) if isinstance(made, str) else 1


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
