"""shards: from text to shuffled, packed WebDataset shards, and from shards to batches.

>>> index = shards.build("lines.txt", "data/lines", tokenizer="train:4096", max_length=20)
>>> for batch in shards.ShardStream("data/lines", seed=0, global_batch_size=128):
...     batch.ids  # int64 [128, T]

Names are loaded when first used, so that `import shards` costs nothing. No module or room may bear
the name of a function here (hence `write`, not `build`): importing it would hide the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from t5vae.common import renamed

if TYPE_CHECKING:
    from shards.format.index import Index, open_index
    from shards.format.tokenizers import load_tokenizer
    from shards.read.dataset import Dataset, open_dataset
    from shards.read.dealer import Batch
    from shards.read.stream import ShardStream
    from shards.read.verifier import Report, verify
    from shards.storage.cache import Cache
    from shards.write.builder import build, join
    from t5vae.common.errors import DamageError, UserError

renamed.install()

_HOME = {
    "Batch": "shards.read.dealer",
    "Cache": "shards.storage.cache",
    "DamageError": "t5vae.common.errors",
    "Dataset": "shards.read.dataset",
    "Index": "shards.format.index",
    "Report": "shards.read.verifier",
    "ShardStream": "shards.read.stream",
    "UserError": "t5vae.common.errors",
    "build": "shards.write.builder",
    "join": "shards.write.builder",
    "load_tokenizer": "shards.format.tokenizers",
    "open_dataset": "shards.read.dataset",
    "open_index": "shards.format.index",
    "verify": "shards.read.verifier",
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
    "join",
    "load_tokenizer",
    "open_dataset",
    "open_index",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
