"""Where a run's figures go beside metrics.jsonl: Weights & Biases, TensorBoard."""

import atexit
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from t5vae.cluster import scheduler
from t5vae.common.environment import changed
from t5vae.common.errors import UserError
from t5vae.common.files import head, parse_json, read_records, reading
from t5vae.common.links import refuse_links
from t5vae.common.records import finite
from t5vae.config import Config, read_run

LONGEST_ID = 128  # characters, wandb's own limit

Tables = Mapping[str, list[dict[str, Any]]]
"""Texts of an evaluation: the rows of each table, all of one table with the same columns."""


class Tracker(Protocol):
    """Takes what a run tells; any method may raise what it likes.

    Attributes:
        name: for people.
    """

    name: str

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""

    def tables(self, step: int, tables: Tables) -> None:
        """What the model made of texts at a step."""

    def close(self) -> None:
        """Nothing will follow."""


class Trackers:
    """The trackers that a configuration asks for; one that fails is told of and left out.

    Args:
        config: the run's.
        say: what to tell people with.

    Attributes:
        facts: what the trackers are told of this start of the run.
    """

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.facts: dict[str, Any] = {}
        self.running: list[Tracker] = []

    def start(self, step: int) -> None:
        """Begin, so many steps being done."""
        log = self.config.log
        wanted: list[tuple[bool, str, Callable[[], Tracker]]] = [
            (log.wandb, WandB.name, lambda: WandB(self.config, self.facts)),
            (log.tensorboard, TensorBoard.name, lambda: TensorBoard(self.config, step)),
        ]
        for on, name, make in wanted:
            if on:
                try:
                    self.running.append(make())
                except Exception as error:  # no tracker stops training
                    self._off(name, error)

    def metrics(self, record: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.metrics(record))

    def tables(self, step: int, tables: Tables) -> None:
        self._tell(lambda tracker: tracker.tables(step, tables))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        """Do something with every tracker that answers.

        wandb's service is another process, which a signal to all of a job ends at once; what it
        then misses is in metrics.jsonl.
        """
        for tracker in list(self.running):
            try:
                action(tracker)
            except Exception as error:  # no tracker stops training
                self.running.remove(tracker)
                self._off(tracker.name, error)
                atexit.register(_silence)  # before wandb's exit handler, which fails for the same

    def _off(self, name: str, error: Exception) -> None:
        self.say(f"{name} is off: {' '.join(str(error).split()) or type(error).__name__}")


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def track(run: Path, say: Callable[[str], None], **to: bool) -> int:
    """Hand a run that was trained already to trackers, from metrics.jsonl and samples/.

    Args:
        run: its folder.
        say: what to tell people with.
        to: `wandb`, `tensorboard`: which trackers.

    Returns:
        Lines of metrics.

    Raises:
        UserError: if it is no run, or has no metrics.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    config = read_run(run)
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise UserError(f"{run} has no metrics yet")
    if not all(isinstance(record.get("step"), int) for record in records):
        raise UserError(f"{run / 'metrics.jsonl'} is damaged: it has lines without a step")
    refuse_links(run)
    trackers = Trackers(config.with_("log", **to), say)
    trackers.start(0)
    for record in records:
        trackers.metrics(record)
        texts = run / "samples" / f"step-{record['step']:08d}.json"
        if texts.is_file():
            trackers.tables(record["step"], _tables(texts))
    trackers.close()
    return len(records)


def _tables(path: Path) -> Tables:
    """The texts of an evaluation, out of their file."""
    with reading(str(path)):
        content = head(path)
    try:
        tables = parse_json(content)
    except ValueError:
        tables = None
    if not isinstance(tables, dict):
        raise UserError(f"{path} is damaged: remove it")
    found = {name: rows for name, rows in tables.items() if name != "step"}
    for name, rows in found.items():
        whole = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
        if not whole or any(row.keys() != rows[0].keys() for row in rows):
            raise UserError(f"{path} is damaged ({name} is no table): remove it")
    return found


class WandB:
    """A run at Weights & Biases: online with a key, offline without, or as WANDB_MODE says.

    Its id lies in the run's folder, so that it survives restarts.
    """

    name = "wandb"

    def __init__(self, config: Config, facts: Mapping[str, Any]):
        import wandb

        folder = config.run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        with open(id_file, errors="replace") as file:
            run_id = file.read(LONGEST_ID + 1)
        if len(run_id) > LONGEST_ID or not re.fullmatch(r"[A-Za-z0-9_][\w-]*", run_id, re.ASCII):
            raise UserError(f"{id_file} holds no run's id: remove it")
        options: dict[str, Any] = {
            "id": run_id,
            "resume": "allow",
            "dir": str(config.run_dir),
            "project": os.environ.get("WANDB_PROJECT", "t5vae"),
            "name": config.run.name,
            "config": config.model_dump(mode="json"),
        }
        self.table = wandb.Table
        with changed({scheduler.TOKEN: None}):  # wandb writes all of the scheduler's variables down
            if "WANDB_MODE" in os.environ:
                self.run = wandb.init(**options)
            else:
                self.run = _online(options) or wandb.init(mode="offline", **options)
        self.run.config.update(dict(facts), allow_val_change=True)

    def metrics(self, record: Mapping[str, Any]) -> None:
        self.run.log(_numbers(record), step=record["step"])

    def tables(self, step: int, tables: Tables) -> None:
        for name, rows in tables.items():
            table = self.table(columns=[*rows[0]], data=[list(row.values()) for row in rows])
            self.run.log({f"eval/{name}": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in the run's `tensorboard/`; on resume, what lies past the checkpoint is hidden.

    Args:
        step: steps done.
    """

    name = "TensorBoard"

    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=step + 1)

    def metrics(self, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], record.get("time"))

    def tables(self, step: int, tables: Tables) -> None:
        for name, rows in tables.items():
            self.writer.add_text(f"eval/{name}", _markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


def _online(options: dict[str, Any]) -> Any:
    """A run whose figures are sent at once; None without a key, or a server that answers."""
    import wandb

    try:
        return wandb.init(mode="online", **options) if wandb.login(prompt=False) else None
    except wandb.errors.Error as error:
        wandb.termwarn(f"going on offline, to be sent later by `wandb sync`: {error}")
        return None


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if finite(value) is not None}


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    lines += [[_code(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    """A cell in which any text is shown as it is."""
    if not isinstance(value, str):
        return str(value)
    text = value.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return f"<code>{text.replace(chr(10), '&#10;')}</code>"
