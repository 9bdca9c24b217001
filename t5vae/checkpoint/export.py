"""From a checkpoint to a plain transformers folder, without an accelerator or a process group."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from t5vae.checkpoint import retention
from t5vae.checkpoint.card import write_card
from t5vae.checkpoint.fragments import WEIGHT, fill_model
from t5vae.checkpoint.manifest import digest, fragments_of, read_manifest
from t5vae.common.errors import UserError, first_line
from t5vae.common.links import refuse_links
from t5vae.common.quiet import quiet_start
from t5vae.config import read_run
from t5vae.model import T5VAE
from t5vae.model.files import check, known

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    run: str | Path, *, step: int | None = None, dtype: str = "fp32", finished: bool = False
) -> tuple[Path, str, bool]:
    """Write RUN/export from a valid checkpoint: weights, tokenizer, model card.

    Args:
        step: of the checkpoint; None for the newest.
        dtype: of the weights: fp32, bf16 or fp16.
        finished: refuse a run whose steps are not all done.

    Returns:
        The exported folder, the checkpoint's name, and whether it had been exported before.

    Raises:
        UserError: if `run` is no run folder, holds no such checkpoint that is valid, is to be
            finished and is not, or its shards now have another tokenizer.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    newest = retention.newest_valid(folder / "checkpoints", print, step=step)
    if newest is None:
        if step is None:
            raise UserError(f"{folder} holds no valid checkpoint yet; train it further first")
        there = map(retention.step_of, retention.list_checkpoints(folder / "checkpoints"))
        raise UserError(
            f"{folder} has no valid checkpoint of step {step}; there are: "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    config = read_run(folder)
    done = retention.step_of(newest)
    if finished and done < config.train.steps:
        raise UserError(
            f"{folder} is at step {done:,} of {config.train.steps:,}: the command that trained it "
            f"goes on from there; `t5vae export {folder}` takes it as it is"
        )
    target = folder / "export"
    source = f"{newest.name} {dtype} {digest(newest)}"
    if (target / "SOURCE").is_file() and (target / "SOURCE").read_bytes() == source.encode():
        return target, newest.name, True

    manifest = read_manifest(newest)
    dataset = config.data.open()
    if manifest["tokenizer"] != dataset.tokenizer_fingerprint:
        raise UserError(
            f"{dataset.path} has another tokenizer than the one {folder} was trained with; "
            "restore those shards before you export"
        )
    refuse_links(folder)
    log_file = folder / "logs" / "export.log"
    log_file.parent.mkdir(exist_ok=True)
    with quiet_start(log_file):
        model = _model(newest, manifest)
    model.to(DTYPES[dtype])

    for left in folder.glob("export.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    tmp = folder / f"export.{os.getpid()}.tmp"
    model.save_pretrained(tmp)
    dataset.tokenizer().save_pretrained(tmp)
    (tmp / "SOURCE").write_text(source)
    write_card(folder, tmp)
    old = folder / f"export.{os.getpid()}.old.tmp"
    if target.exists():
        target.rename(old)
    tmp.rename(target)
    shutil.rmtree(old, ignore_errors=True)  # who has a file of it open may keep some of it there
    return target, newest.name, False


def _model(checkpoint: Path, manifest: dict[str, Any]) -> T5VAE:
    with fragments_of(checkpoint, manifest) as saved:
        held = {
            name: (saved.length(kind, name),) for kind, name in saved.contents() if kind == WEIGHT
        }
        try:
            settings = known(manifest["model"])
            check(settings, held)
            model = T5VAE(settings)
            fill_model(model, saved)
        except (KeyError, TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
            raise UserError(
                f"{checkpoint} does not hold the model that its manifest describes "
                f"({first_line(error)})"
            ) from None
    model.tie_weights()
    return model
