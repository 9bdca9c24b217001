"""A researcher's own kinds, in one file: a class each, and at the end a line each."""

import pickle
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from launcher.backend import ENDED
from launcher.backends import BACKENDS
from shards.write.formats import FORMATS
from shards.write.formats.format import Format
from t5vae.common.kinds import BOTTLENECKS, OPTIMISERS, PRIORS
from t5vae.config import Config, add_term
from t5vae.latent.priors.prior import Prior
from t5vae.model.bottleneck import Bottleneck
from t5vae.objective import Cost, Term
from t5vae.training.optimisers import Optimiser


def read_pairs(stream, name, column):
    """The second of two fields."""
    yield [line.decode().rstrip("\n").partition("|")[2] for line in stream]


class Mean(Bottleneck):
    """The code is a map of the mean state; the memory is one token."""

    def __init__(self, config):
        super().__init__(config)
        self.to_latent = nn.Linear(config.t5_config.d_model, config.encoded_size)
        self.from_latent = nn.Linear(config.latent_size, config.t5_config.d_model)

    def compress(self, states_BTC, mask_BT):
        mask_BT1 = mask_BT[..., None]
        return self.to_latent((states_BTC * mask_BT1).sum(1) / mask_BT1.sum(1))

    def expand(self, z_BD):
        return self.from_latent(z_BD)[:, None]

    @staticmethod
    def flops(config, tokens):
        return 1, 2 * config.t5_config.d_model * (config.encoded_size + config.latent_size)


class Spread(Term):
    """The mean square of a code, of each sequence."""

    per_sequence = True

    @property
    def logs(self):
        return ("spread",)

    def values(self, codes):
        return ((codes.z_BD.float().square().mean(1) * codes.weights_B).sum(),)

    def cost(self, rows, every, latent_size, *, accelerated):
        return Cost(2 * rows * latent_size, 4 * rows * latent_size, 0)


class Plain(Optimiser):
    """Gradient descent, on all weights."""

    def build(self, groups, place):
        return torch.optim.SGD(groups, momentum=0.9)


class Cube(Prior):
    """Uniform on a cube."""

    fewest = 0

    def __init__(self, latent_size):
        self.latent_size = latent_size

    @classmethod
    def fit(cls, codes_ND, seed=0):
        return cls(codes_ND.shape[1])

    def draw(self, n, generator):
        return 2 * torch.rand(n, self.latent_size, generator=generator) - 1

    def log_density(self, z_ND):
        return torch.zeros(len(z_ND), dtype=torch.float64)

    def tensors(self):
        return {"latent_size": torch.tensor(self.latent_size)}

    @classmethod
    def from_tensors(cls, tensors):
        return cls(int(tensors["latent_size"]))


class Here:
    """Runs each job at once, in a process of its own."""

    def require(self):
        pass

    def queue(self, tasks, folder, after):
        folder.mkdir(parents=True, exist_ok=True)
        for number, task in enumerate(tasks):
            (folder / f"here-{number}.pkl").write_bytes(pickle.dumps(task))
            code = "import toy_kinds, pickle, sys; pickle.load(open(sys.argv[1], 'rb'))()"
            command = [sys.executable, "-c", code, folder / f"here-{number}.pkl"]
            subprocess.run(command, check=True)
        return [f"here-{number}" for number in range(len(tasks))]

    def script(self, configs, folder):
        return ""

    def enter(self):
        pass

    def states(self, ids):
        return dict.fromkeys(ids, ENDED)

    def home(self, job):
        return None

    def cancel(self, ids):
        pass

    def log(self, folder, job, rank):
        return Path(folder) / f"{job}.out"


FORMATS["pairs"] = Format(read_pairs, (".pair",))
BOTTLENECKS["mean"] = Mean
add_term("spread", Spread)
OPTIMISERS["plain"] = Plain
PRIORS["cube"] = Cube
BACKENDS["here"] = Here()


def main():
    import shards
    from launcher.submission import submit
    from t5vae.checkpoint.export import export
    from t5vae.latent import LatentSpace

    shards.build(
        "pairs.pair", "data", format="pairs", tokenizer="byte", max_length=24, valid_fraction=0
    )
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = Config(
        run={"name": "toy"},
        data={"shards": "data", "global_batch_size": 8},
        model={"t5": t5, "latent_size": 8, "bottleneck": "mean"},
        objective={"spread": {"weight": 1.0}},
        optim={"name": "plain", "lr": 0.01},
        train={"steps": 3, "precision": "fp32"},
        log={"every": 1},
    )
    submit([config], "here", config.run_dir / "jobs")
    export(config.run_dir)
    drawn = LatentSpace.load(str(config.run_dir)).sample(3, "cube")
    print(f"{len(drawn.texts)} texts")
