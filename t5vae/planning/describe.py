"""What follows from a configuration: batch, epochs, parameters, operations, memory."""

from typing import Any

import torch

from shards import Dataset
from t5vae.common.errors import UserError
from t5vae.config import Config
from t5vae.model import T5VAE, flops_per_token, parameter_counts
from t5vae.planning.memory import regime_of, sizes_of, state_bytes
from t5vae.training.build import check_base, model_config


def describe(config: Config, dataset: Dataset | None, world_size: int) -> dict[str, Any]:
    """What follows from a configuration.

    Nothing is allocated. Operations are those of training, a token of the longest sequences, the
    model's and those of the objective's terms;
    memory is that of weights, gradients and the optimiser's state, see `t5vae.planning.plan` for
    all of it. Without a dataset, what depends on the data is left out.

    Raises:
        UserError: for a batch that does not divide.
    """
    with torch.device("meta"):
        model = T5VAE(model_config(config.model, config.objective, dataset))
    parts = parameter_counts(model)
    parameters, sizes = parts.pop("total"), sizes_of(model, config.optim.name)
    split = config.data.split(world_size)
    regime, length = regime_of(config, split), model.config.sequence_length
    of_terms = sum(cost.operations for cost in regime.costs(accelerated=True))
    facts = {
        "world_size": world_size,
        "accumulation": split.accumulation,
        "micro_batch_size": split.micro,
        "vocab_size": model.config.t5["vocab_size"],
        "sequence_length": length,
        "parameters": parameters,
        "parameters_by_part": parts,
        "flops_per_token": round(flops_per_token(model.config, length)),
        "objective_flops_per_token": round(of_terms / (split.micro * length)),
        "state_bytes_per_rank": state_bytes(regime, sizes),
    }
    if dataset:
        sequences = dataset.sequences("train")
        facts |= {
            "train_sequences": sequences,
            "steps_per_epoch": round(sequences / split.sequences, 2),
            "epochs": round(config.train.steps * split.sequences / sequences, 2),
        }
    return facts


def open_if_there(config: Config) -> Dataset | None:
    """The configuration's shards, where they exist.

    Raises:
        UserError: where they do not, and the configuration does not say what they would; or they
            have another tokenizer than its base.
    """
    try:
        dataset = config.data.open()
    except UserError:
        if not (config.model.vocab_size and config.model.sequence_length):
            raise
        return None
    check_base(config.model.base, dataset)
    return dataset
