"""The kinds that a name can choose, in a configuration or a command: a line each.

A value is what the name stands for, or where that is found, "module:attribute", so that a table
loads nothing heavy. Formats of corpora, storage schemes and the launcher's backends have tables of
their own, in `shards` and `launcher`.
"""

from pkgutil import resolve_name
from typing import Any

Table = dict[str, Any]

BOTTLENECKS: Table = {
    "flatten": "t5vae.model.bottlenecks.flatten:Flatten",
    "attention": "t5vae.model.bottlenecks.attention:Attention",
}
OPTIMISERS: Table = {
    "adamw": "t5vae.training.optimisers.adamw:AdamW",
    "lion": "t5vae.training.optimisers.lion:Lion",
    "muon": "t5vae.training.optimisers.muon:Muon",
}
PRIORS: Table = {
    "normal": "t5vae.latent.priors.normal:Normal",
    "gaussian": "t5vae.latent.priors.gaussian:Gaussian",
    "gmm": "t5vae.latent.priors.mixture:Mixture",
    "flow": "t5vae.latent.priors.flow:Flow",
}
TERMS: Table = {
    "mmd": "t5vae.objective.terms.mmd:MMD",
    "epps_pulley": "t5vae.objective.terms.epps_pulley:EppsPulley",
    "kl": "t5vae.objective.terms.kl:KL",
}


def find(table: Table, name: str) -> Any:
    """What a name of a table stands for.

    Raises:
        KeyError: it is not in the table.
    """
    found = table[name]
    return resolve_name(found) if isinstance(found, str) else found
