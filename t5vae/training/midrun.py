"""Evaluation in mid-run: what a run finds out about its space while it trains, on all ranks."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from shards import Dataset
from t5vae.checkpoint.randomness import undisturbed
from t5vae.cluster.agreement import gather_objects
from t5vae.cluster.phases import phase
from t5vae.common.errors import first_line
from t5vae.config import Eval
from t5vae.evaluation import metrics
from t5vae.evaluation.geometry import geometry
from t5vae.latent import LatentSpace, checker
from t5vae.latent.checkers import Checker
from t5vae.latent.paths import path
from t5vae.metrics.trackers import Tables
from t5vae.model import T5VAE

STEPS = 8  # texts on a path
SHOWN = 32  # rows of a table

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Findings:
    """What an evaluation found.

    Attributes:
        figures: for metrics.jsonl, their names as in `eval.json` after "eval/".
            NaN stands for what cannot be had, as of codes that are not finite.
        tables: reconstructions, samples and interpolations, as texts.
        problem: what is to be told besides.
    """

    figures: dict[str, float]
    tables: Tables
    problem: str | None = None

    @property
    def held_out(self) -> float | None:
        """Teacher-forced cross-entropy of held-out sequences, nats a token; None if not finite."""
        nats = self.figures["eval/nats_per_token"]
        return nats if math.isfinite(nats) else None

    def __str__(self) -> str:
        shown = {
            "nats_per_token": "held-out {:.3f} nats a token",
            "exact_match": "exact {:.3f}",
            "valid": "valid {:.3f}",
            "mmd": "mmd {:.5f}",
            "shuffled_gap": "gap {:.2f}",
        }
        names = [name for name in shown if f"eval/{name}" in self.figures]
        told = [shown[name].format(self.figures[f"eval/{name}"]) for name in names]
        return ", ".join(told + ([self.problem] if self.problem else []))


class GivenUpError(Exception):
    """A rank was told to stop while all of them evaluated."""


class DealtSpace(LatentSpace):
    """The space of a model that all ranks train.

    Each rank works on its share of the rows, and all know all results. All ranks call each method
    together, with the same rows. Before each batch they agree to go on.

    Args:
        told: whether this rank is told to stop, at which all of them raise `GivenUpError`.
    """

    def __init__(
        self,
        model: T5VAE,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sharded: bool,
        told: Callable[[], bool],
    ):
        super().__init__(model, tokenizer)
        self.synced_gpus = sharded and dist.get_world_size() > 1
        self.told = told

    def encode_ids(self, ids: Ids) -> Tensor:
        return self._tensor(super().encode_ids(self._share(ids)), len(ids))

    def decode_ids(
        self, z_ND: Tensor, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        own_BD = z_ND[self._rows(len(z_ND))]
        found: list[list[int]] = []
        # One seed is of one call's draws.
        for part_BD in own_BD.split(self.batch_size if temperature == 0 else len(own_BD)):
            self._go_on()
            found += super().decode_ids(part_BD, n, temperature, seed)
        return self._gathered(found, len(z_ND))

    def check_codes(self, z_ND: Tensor) -> None:
        """Take them all: a rank that refused its share would leave the others alone."""

    def score_ids(self, ids: Ids, z_ND: Tensor) -> Tensor:
        own_BD = z_ND[self._rows(len(z_ND))]
        return self._tensor(super().score_ids(self._share(ids), own_BD), len(ids))

    def _by_length(self, ids: Ids) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super()._by_length(ids):
            self._go_on()
            yield batch

    def _go_on(self) -> None:
        if any(gather_objects(self.told())):
            raise GivenUpError

    def _share(self, ids: Ids) -> Ids:
        return [ids[row] for row in self._rows(len(ids))]

    def _rows(self, count: int) -> list[int]:
        """This rank's; as many on every rank, as sharded weights need, some of them twice."""
        world = dist.get_world_size()
        return [min(row + dist.get_rank(), count - 1) for row in range(0, count, world)]

    def _tensor(self, own: Tensor, count: int) -> Tensor:
        return torch.from_numpy(np.stack(self._gathered(own.numpy(), count)))

    def _gathered(self, own: Any, count: int) -> list[Any]:
        """The rows of all ranks in their order, from an array or list of this rank's."""
        shares = gather_objects(own)
        return [shares[row % len(shares)][row // len(shares)] for row in range(count)]


class Forgiving:
    """A checker by which a text that it fails on is not valid.

    Attributes:
        failed: how often it did.
        problem: the first time.
    """

    def __init__(self, check: Checker):
        self.check, self.failed, self.problem = check, 0, ""

    def __call__(self, text: str) -> bool:
        try:
            return bool(self.check(text))
        except (Exception, SystemExit) as error:  # a user's own code, on any text at all
            self.failed += 1
            self.problem = self.problem or f"{type(error).__name__}: {first_line(error)}"
            return False

    def told(self) -> str | None:
        """What went wrong, for people."""
        return f"eval.check failed on {self.failed:,} ({self.problem})" if self.failed else None


class MidRunEvaluation:
    """Evaluates a model in training, on held-out sequences and on draws from the prior.

    It leaves the training stream, the generators and the weights alone, so that losses are the
    same with and without it.

    Args:
        engine: DeepSpeed's, around the model.
        dataset: whose split valid holds the held-out sequences.
        settings: how many of them, and what makes a text valid; nothing is read where `every` is 0.
        told: whether this rank is told to stop.
    """

    def __init__(
        self,
        engine: Any,
        dataset: Dataset,
        settings: Eval,
        told: Callable[[], bool] = lambda: False,
    ):
        self.engine = engine
        self.decoded = settings.decoded
        if not settings.every:
            return
        self.check = None if settings.check is None else checker(settings.check)
        ids_NT, lengths_N = dataset.read("valid", dataset.first("valid", settings.sequences))
        self.ids = [row[:n].tolist() for row, n in zip(ids_NT, lengths_N, strict=True)]
        sharded = engine.zero_optimization_stage() == 3
        with self._evaluating():
            self.space = DealtSpace(engine.module, dataset.tokenizer(), sharded=sharded, told=told)

    def look(self) -> Findings:
        """Evaluate the model as it is; all ranks call it together, and find the same.

        Raises:
            GivenUpError: on all ranks, between two batches, where one was told to stop.
        """
        began = time.perf_counter()
        with undisturbed(), self._evaluating(), phase("evaluation"):
            is_valid = None if self.check is None else Forgiving(self.check)
            figures, tables = self._measure(is_valid)
        figures["seconds"] = time.perf_counter() - began
        named = {f"eval/{name}": value for name, value in figures.items()}
        return Findings(named, tables, None if is_valid is None else is_valid.told())

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.engine.eval()
        try:
            yield
        finally:
            self.engine.train()

    @torch.no_grad()
    def _measure(self, is_valid: Checker | None) -> tuple[dict[str, float], Tables]:
        space, ids, few = self.space, self.ids, self.ids[: self.decoded]
        rng = np.random.default_rng(0)
        z_ND = space.encode_ids(ids)
        others = metrics.partners(len(ids), rng)
        nats = metrics.nats_per_token(space.score_ids(ids, z_ND), ids)
        shuffled = metrics.nats_per_token(space.score_ids(ids, z_ND[others]), ids)

        texts = space.detokenize(few)
        decoded = space.decode_ids(z_ND[: len(few)])
        again = space.detokenize(decoded)
        drawn_ND = torch.randn(
            self.decoded, space.latent_size, generator=Generator().manual_seed(0)
        )
        samples = space.detokenize(space.decode_ids(drawn_ND))
        ends = others[: max(1, self.decoded // STEPS)]
        z_PSD = path(z_ND[: len(ends)], z_ND[ends], STEPS)
        between = space.detokenize(space.decode_ids(z_PSD.flatten(0, 1)))
        paths = [between[at : at + STEPS] for at in range(0, len(between), STEPS)]

        quality = metrics.quality(samples, frozenset(), is_valid)
        interpolation = metrics.interpolation(paths, is_valid)
        found = {
            "nats_per_token": nats,
            "shuffled_gap": shuffled - nats,
            "exact_match": metrics.exact_match(again, texts),
            "token_accuracy": metrics.token_accuracy(decoded, few),
            "edit_similarity": metrics.edit_similarity(again, texts),
            "valid": quality["valid"],
            "unique": quality["unique"],
            **{f"interpolation_{name}": value for name, value in interpolation.items()},
            **geometry(z_ND),
        }
        tables: dict[str, list[dict[str, Any]]] = {
            "reconstructions": [
                {"text": text, "reconstruction": back}
                for text, back in zip(texts, again, strict=True)
            ],
            "samples": [{"text": text} for text in samples],
            "interpolations": [
                {"path": number, "share": step / (STEPS - 1), "text": text}
                for number, texts in enumerate(paths)
                for step, text in enumerate(texts)
            ],
        }
        shown = {name: rows[:SHOWN] for name, rows in tables.items()}
        if is_valid is None:
            del found["valid"], found["interpolation_validity"]
        return {name: math.nan if of is None else of for name, of in found.items()}, shown
