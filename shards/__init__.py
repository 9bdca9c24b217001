"""shards: from text to shuffled, packed WebDataset shards, and from shards to batches.

>>> index = shards.build("lines.txt", "data/lines", tokenizer="train:4096", max_length=20)
>>> for batch in shards.ShardStream("data/lines", seed=0, global_batch_size=128):
...     batch.ids  # int64 [128, T]

Names are loaded when first used, so that `from shards import UserError` costs nothing. No module
may bear the name of a function here (hence `builder`): importing it would hide the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.builder import build
    from shards.cache import Cache
    from shards.dataset import Dataset, open_dataset
    from shards.dealer import Batch
    from shards.errors import DamageError, UserError
    from shards.index import Index, open_index
    from shards.stream import ShardStream
    from shards.tokenizers import load_tokenizer
    from shards.verifier import Report, verify

_HOME = {
    "Batch": "dealer",
    "Cache": "cache",
    "DamageError": "errors",
    "Dataset": "dataset",
    "Index": "index",
    "Report": "verifier",
    "ShardStream": "stream",
    "UserError": "errors",
    "build": "builder",
    "load_tokenizer": "tokenizers",
    "open_dataset": "dataset",
    "open_index": "index",
    "verify": "verifier",
}

__all__ = [
    "Batch",
    "Cache",
    "DamageError",
    "Dataset",
    "Index",
    "Report",
    "ShardStream",
    "UserError",
    "build",
    "load_tokenizer",
    "open_dataset",
    "open_index",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    value = getattr(import_module(f"shards.{_HOME[name]}"), name)
    globals()[name] = value
    return value
