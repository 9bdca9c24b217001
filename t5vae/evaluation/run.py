"""`t5vae eval RUN`: a space measured on held-out sequences, into eval.json and eval.html."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import Dataset, open_dataset
from shards.format.tokenizers import fingerprint
from t5vae.common.errors import UserError
from t5vae.common.files import write_whole
from t5vae.common.links import refuse_links
from t5vae.config import Eval, as_option, read_run, refuse_choices
from t5vae.evaluation.evaluate import evaluate
from t5vae.evaluation.page import page
from t5vae.evaluation.report import REPORT, read_file
from t5vae.evaluation.training import Training
from t5vae.latent import LatentSpace
from t5vae.latent.workspace import Workspace
from t5vae.metrics import panels, picture

PAGE = "eval.html"
SAMPLES, SAMPLES_ON_AN_ACCELERATOR = 2000, 10_000


def evaluate_run(
    run_or_export: str | Path, *, shards: str | None = None, **overrides: Any
) -> tuple[dict[str, Any], Path, bool]:
    """Evaluate an exported model on the split valid of its shards; write eval.json and eval.html.

    Args:
        run_or_export: a run folder with an export, or an exported folder.
        shards: to evaluate on, in place of the run's own; an export that lies alone needs them.
        overrides: `sequences`, `samples`, `interpolations`, `check`, `measure`: where not None,
            they replace the run's own settings.

    Returns:
        The report (see `evaluate`), the folder it lies in (the run's, or the export's), and
        whether it was already there, made from this export with these settings.

    Raises:
        UserError: no export or shards; another tokenizer than the shards were made with; a function
            that the run names to check or measure texts by.
    """
    workspace = Workspace(Path(run_or_export))
    home = workspace.home
    given = {name: value for name, value in overrides.items() if value is not None}
    config = None
    if (home / "config.yaml").is_file():
        config = read_run(home, {f"eval.{name}": value for name, value in given.items()})
        refuse_choices(config, "eval", typed=as_option)
        refuse_links(home)
    dataset = _shards(workspace, shards)
    settings = (config.eval if config else Eval(**given)).model_dump(exclude={"every", "decoded"})
    if settings["samples"] is None:
        fast = torch.accelerator.is_available()
        settings["samples"] = SAMPLES_ON_AN_ACCELERATOR if fast else SAMPLES
    made_from = {
        "model_sha256": workspace.model_sha256,
        "shards_sha256": dataset.sha256,
        "settings": settings,
    }
    report = _known(home / REPORT, made_from)
    known = report is not None
    if report is None:
        space = LatentSpace.load(run_or_export)
        _check_together(space, dataset)
        report = _evaluate(space, dataset, settings)
        report["made_from"] = made_from
        write_whole(home / REPORT, json.dumps(report, ensure_ascii=False, separators=(",", ":")))
    if not known or not (home / PAGE).is_file():
        name = config.run.name if config else home.name
        write_whole(home / PAGE, page(report, name, _curves(home)))
    return report, home, known


def _curves(home: Path) -> bytes | None:
    """Of the training, as SVG; None where nothing is known of it."""
    try:
        return picture.picture(panels.plan([str(home)], None, "step"), "svg")
    except UserError:  # no metrics, or none that can be read: the evaluation stands without
        return None


def _shards(workspace: Workspace, shards: str | None) -> Dataset:
    if shards is not None:
        return open_dataset(shards)
    if not (workspace.home / "config.yaml").is_file():
        raise UserError(
            f"{workspace.home} has no run beside it, so its held-out sequences are unknown: give "
            "--shards"
        )
    return workspace.dataset()


def _check_together(space: LatentSpace, dataset: Dataset) -> None:
    for index in dataset.indexes:
        if "valid" not in index.splits:
            raise UserError(
                f"{index.path} holds out no sequences to evaluate on: build it with a "
                "--valid-fraction above 0, or give other --shards"
            )
    if fingerprint(space.tokenizer) != dataset.tokenizer_fingerprint:
        raise UserError("the shards have another tokenizer than the model: give the model's own")
    longest = space.model.config.sequence_length
    if dataset.max_length > longest:
        raise UserError(
            f"the shards have sequences of up to {dataset.max_length} tokens, the model takes "
            f"{longest} at most"
        )


def _evaluate(space: LatentSpace, dataset: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    numbers = dataset.first("valid", settings["sequences"])
    return evaluate(
        space,
        valid_ids=_sequences(*dataset.read("valid", numbers)),
        training=Training(dataset),
        **{name: value for name, value in settings.items() if name != "sequences"},
    )


def _sequences(ids_NT: np.ndarray, lengths_N: np.ndarray) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(ids_NT, lengths_N, strict=True)]


def _known(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The report that is there, if it was made from just this by a version that tells as much."""
    try:
        report = read_file(path)
    except (UserError, ValueError):  # none, or none that is whole
        return None
    mine = report["made_from"] == made_from and "contamination" in report
    return report if mine else None
