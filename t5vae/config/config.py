"""The whole configuration of a run, and what goes with what."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, model_validator
from pydantic.fields import FieldInfo

from t5vae.common.files import write_whole
from t5vae.common.kinds import OPTIMISERS, TERMS, find
from t5vae.common.section import Section
from t5vae.config.launching import Launcher
from t5vae.config.learning import Model, Objective, Optim
from t5vae.config.running import Checkpoint, Data, DeepSpeed, Eval, Log, Run, Train
from t5vae.objective import Term

STARTED_IN = "started_in"
"""Beside the keys of `run` in a run's own config.yaml: the working folder it was written from."""


class Config(Section):
    """One run."""

    run: Run = Run()
    data: Data
    model: Model = Model()
    objective: Objective = Field(default_factory=Objective)
    optim: Optim = Optim()
    train: Train = Train()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()
    launcher: Launcher = Launcher()

    _of_run: dict[str, Any] = PrivateAttr({})

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        micro, batch = self.data.micro_batch_size, self.data.global_batch_size
        if micro and batch % micro:
            raise ValueError(
                f"data.global_batch_size {batch} is not a multiple of data.micro_batch_size {micro}"
            )
        optimiser, clipping = self.optim.name, self.optim.gradient_clipping
        if clipping and not find(OPTIMISERS, optimiser).knows_gradient_norm:
            raise ValueError(
                f"optim.gradient_clipping goes with optim.name adamw: {optimiser}'s updates have a "
                "fixed norm, which DeepSpeed would clip in place of the gradient's; leave it out"
            )
        stage = self.deepspeed.zero_stage
        if self.train.precision == "fp16" and stage == 0:
            raise ValueError(
                "train.precision fp16 needs deepspeed.zero_stage 1, 2 or 3: without ZeRO, "
                "DeepSpeed divides gradients by a loss scale that it has not applied"
            )
        if self.deepspeed.offload_optimizer and stage == 0:
            raise ValueError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3")
        if self.deepspeed.offload_parameters and stage != 3:
            raise ValueError("deepspeed.offload_parameters needs deepspeed.zero_stage 3")
        if self.checkpoint.source and self.checkpoint.resume != "weights":
            raise ValueError("checkpoint.source needs checkpoint.resume weights")
        if self.model.posterior and (self.model.normalize or self.model.squash):
            raise ValueError(
                "model.posterior goes with neither model.normalize nor model.squash, which would "
                "change what is drawn: set model.normalize to false and model.squash to null"
            )
        for name, term in self.objective.terms.items():
            if not term.weight:
                continue
            if "posterior" in term.needs and not self.model.posterior:
                raise ValueError(f"objective.{name} needs model.posterior gaussian")
            term.check(bound=self.model.squash_scale if self.model.squash else None)
        first, last = self.train.profile or (1, 1)
        if not 1 <= first <= last:
            raise ValueError(
                f"train.profile is [{first}, {last}]: give the first and the last step, from 1"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.run.output_dir or Path("runs") / self.run.name)

    def with_(self, section: str, **changes: Any) -> "Config":
        """The same with other values in one section."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=changes)})

    def dump(self) -> str:
        """The whole configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def write(self) -> None:
        """Save the whole configuration as config.yaml in the run's folder, atomically."""
        tree = self.model_dump(mode="json")
        tree["run"][STARTED_IN] = os.getcwd()
        write_whole(self.run_dir / "config.yaml", yaml.safe_dump(tree, sort_keys=False))


def add_term(name: str, kind: type[Term]) -> None:
    """Make known a term that is not this package's: a section of `objective` under its name."""
    TERMS[name] = kind
    Objective.__pydantic_fields__[name] = FieldInfo(annotation=kind, default=kind())
    for section in (Objective, Config):
        section.model_rebuild(force=True)
