"""`t5vae eval RUN`: a run's space measured on its own held-out sequences, into RUN/eval.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from shards import UserError
from shards.records import write_whole
from t5vae.config import load_config
from t5vae.evaluation.evaluate import evaluate
from t5vae.latent import LatentSpace

REPORT = "eval.json"


def evaluate_run(run: str | Path, **overrides: Any) -> tuple[dict[str, Any], bool]:
    """Evaluate a run's export on the split valid of its shards and write RUN/eval.json.

    Args:
        run: a run folder with an export.
        overrides: `sequences`, `samples`, `interpolations`, `check`: where not None, they replace
            the run's own settings.

    Returns:
        The report (see `evaluate`), and whether it was already there, made from this export with
        these settings.

    Raises:
        UserError: no run, export or shards; another tokenizer than the shards were made with.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = load_config(folder / "config.yaml")
    settings = config.eval.model_dump(exclude={"every", "decoded"})
    settings |= {name: value for name, value in overrides.items() if value is not None}
    weights = folder / "export" / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} holds no exported model; write one with `t5vae export {folder}`")
    with open(weights, "rb") as file:
        made_from = {
            "model_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "shards_sha256": config.data.open().sha256,
            "settings": settings,
        }
    done = _read(folder / REPORT)
    if done is not None and done.get("made_from") == made_from:
        return done, True

    dataset = config.data.open()
    held_out = dataset.first("valid", settings["sequences"])
    everything = np.arange(dataset.sequences("train"))
    report = evaluate(
        LatentSpace.load(folder),
        valid_ids=_sequences(*dataset.read("valid", held_out)),
        train_ids=_sequences(*dataset.read("train", everything)),
        train_texts=dataset.texts("train", everything),
        check=settings["check"],
        samples=settings["samples"],
        interpolations=settings["interpolations"],
    )
    report["made_from"] = made_from
    write_whole(folder / REPORT, json.dumps(report, indent=1))
    return report, False


def _sequences(ids_NT: np.ndarray, lengths_N: np.ndarray) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(ids_NT, lengths_N, strict=True)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
