"""The whole configuration of a run, and what goes with what."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from t5vae.common.files import write_whole
from t5vae.config.launching import Launcher
from t5vae.config.learning import Model, Objective, Optim
from t5vae.config.running import Checkpoint, Data, DeepSpeed, Eval, Log, Run, Train
from t5vae.common.section import Section


class Config(Section):
    """One run."""

    run: Run = Run()
    data: Data
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train = Train()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()
    launcher: Launcher = Launcher()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        micro, batch = self.data.micro_batch_size, self.data.global_batch_size
        if micro and batch % micro:
            raise ValueError(
                f"data.global_batch_size {batch} is not a multiple of data.micro_batch_size {micro}"
            )
        if self.optim.name == "muon" and self.optim.gradient_clipping:
            raise ValueError(
                "optim.gradient_clipping goes with optim.name adamw: muon's updates have a fixed "
                "norm, which DeepSpeed would clip in place of the gradient's; leave it out"
            )
        if self.model.compile and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "model.compile does not go with deepspeed.zero_stage 3, whose gathering of weights "
                "splits every layer into single operations: leave one out"
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
        other = self.objective.epps_pulley
        if other.weight and not (other.slices or other.axes):
            raise ValueError("objective.epps_pulley needs directions: set slices, axes or both")
        mmd = self.objective.mmd
        bound = self.model.squash_scale
        fits = bound > mmd.sigma or mmd.prior == "uniform" or mmd.kernel == "legacy"
        if self.model.squash and not fits:
            raise ValueError(
                f"model.squash bounds codes to (-{bound:g}, {bound:g}), which cannot match the "
                f"prior N(0, {mmd.sigma:g}^2 I): use no squash, model.squash_scale 3 or more, or "
                "objective.mmd.prior uniform (only kernel legacy allows both)"
            )
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
        write_whole(self.run_dir / "config.yaml", self.dump())
