"""Modules that were moved: an old name imports still, with a warning that says the new one.

They warn for one release, 0.2, and then go.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RENAMED = {  # where what a module held is in several now, each is looked up in their order
    "shards.blocks": "shards.format.blocks",
    "shards.builder": "shards.write.builder",
    "shards.cache": "shards.storage.cache",
    "shards.corpora": "shards.write.corpora",
    "shards.dataset": "shards.read.dataset",
    "shards.dealer": "shards.read.dealer",
    "shards.errors": "t5vae.common.errors",
    "shards.files": "shards.write.streams t5vae.common.errors t5vae.common.files",
    "shards.index": "shards.format.index shards.format.blocks",
    "shards.order": "shards.read.order",
    "shards.pack": "shards.write.pack",
    "shards.progress": "t5vae.common.progress",
    "shards.readers": "shards.write.formats.text shards.write.formats.jsonl "
    "shards.write.formats.csv shards.write.formats.parquet shards.write.formats.webdataset "
    "shards.write.formats.values",
    "shards.records": "t5vae.common.files",
    "shards.remote": "shards.storage.remote shards.storage.requests",
    "shards.spool": "shards.write.spool",
    "shards.stages": "shards.write.stages",
    "shards.statements": "shards.write.formats.python",
    "shards.store": "shards.storage.store shards.storage.local shards.storage.kinds",
    "shards.stream": "shards.read.stream",
    "shards.tokenizers": "shards.format.tokenizers",
    "shards.verifier": "shards.read.verifier",
    "shards.windows": "shards.read.windows",
    "shards.workers": "shards.write.workers",
    "shards.workfolder": "t5vae.common.workfolder shards.write.workers shards.write.builder",
    "t5vae.config.section": "t5vae.common.section",
    "t5vae.curves": "t5vae.metrics",
    "t5vae.curves.listing": "t5vae.metrics.listing",
    "t5vae.curves.panels": "t5vae.metrics.panels",
    "t5vae.curves.picture": "t5vae.metrics.picture",
    "t5vae.curves.reading": "t5vae.metrics.reading",
    "t5vae.curves.terminal": "t5vae.metrics.terminal",
    "t5vae.latent.kept": "t5vae.latent.artifacts",
    "t5vae.training.activations": "t5vae.planning.activations",
    "t5vae.training.allocator": "t5vae.cluster.allocator",
    "t5vae.training.attempts": "t5vae.cluster.attempts",
    "t5vae.training.card": "t5vae.checkpoint.card",
    "t5vae.training.checkpoint": "t5vae.checkpoint.manifest t5vae.checkpoint.retention",
    "t5vae.training.distributed": "t5vae.cluster.process_group t5vae.cluster.ranks "
    "t5vae.cluster.agreement t5vae.cluster.scheduler t5vae.common.progress",
    "t5vae.training.errors": "t5vae.cluster.errors",
    "t5vae.training.export": "t5vae.checkpoint.export",
    "t5vae.training.fragments": "t5vae.checkpoint.fragments",
    "t5vae.training.health": "t5vae.cluster.preflight",
    "t5vae.training.losses": "t5vae.training.step",
    "t5vae.training.memory": "t5vae.planning.memory",
    "t5vae.training.plan": "t5vae.planning.plan t5vae.planning.shown",
    "t5vae.training.preemption": "t5vae.cluster.stopping t5vae.cluster.scheduler",
    "t5vae.training.probe": "t5vae.training.midrun",
    "t5vae.training.randomness": "t5vae.checkpoint.randomness",
    "t5vae.training.resuming": "t5vae.checkpoint.resuming",
    "t5vae.training.runlog": "t5vae.metrics.runlog t5vae.metrics.reading t5vae.common.quiet",
    "t5vae.training.saving": "t5vae.checkpoint.saving",
    "t5vae.training.setup": "t5vae.training.job t5vae.planning.describe t5vae.cluster.run_folder",
    "t5vae.training.trackers": "t5vae.metrics.trackers",
    "t5vae.training.watch": "t5vae.training.anomalies",
}


def install() -> None:
    """Let old names be found, once nobody else finds a module."""
    if not any(isinstance(finder, Renamed) for finder in sys.meta_path):
        sys.meta_path.append(Renamed())


class Renamed(MetaPathFinder, Loader):
    """Finds a module by its old name: one whose attributes are the new ones'."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in RENAMED:
            return None
        package = any(other.startswith(f"{name}.") for other in RENAMED)
        return ModuleSpec(name, self, is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        old, homes = module.__name__, RENAMED[module.__name__].split()

        def find(name: str) -> Any:
            if not name.startswith("__"):
                for home in map(import_module, homes):
                    if hasattr(home, name):
                        return getattr(home, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = find
        warnings.warn(
            f"{old} is {' and '.join(homes)} now: this name goes after t5vae 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
