"""The model card of an export, README.md: what the run knows, fit to be published.

Of a path or URL only the last part is named, of the configuration only numbers and choices.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from shards import Dataset
from t5vae.checkpoint.files import ABSENT
from t5vae.checkpoint.manifest import read_manifest
from t5vae.checkpoint.retention import step_of
from t5vae.common.errors import UserError
from t5vae.common.files import parse_json, read_records, write_whole
from t5vae.common.kinds import TERMS
from t5vae.common.records import finite
from t5vae.config import Config, read_run
from t5vae.evaluation.report import REPORT, read_file
from t5vae.evaluation.tables import ROWS, table, value_at
from t5vae.latent.workspace import Workspace
from t5vae.metrics.reading import METRICS
from t5vae.model import T5VAE, T5VAEConfig, parameter_counts
from t5vae.model.files import known, read_settings

TAGS = ["t5-vae", "t5vae", "latent-space", "variational-autoencoder"]
SETTINGS: Any = {"run": {"seed"}, "data": {"global_batch_size"}}
SETTINGS |= {"objective": True, "optim": True, "train": True}
CARD = """# {name}

{name} is a T5-VAE: it encodes a sequence of up to {length} tokens, end token included, as one code
of {size} numbers, and decodes a code to a sequence. `objective` below says towards which prior
its codes were pulled.

## How to load it

With the Python package `t5vae` installed, in this folder:

```python
import t5vae  # makes T5VAE known to transformers
from transformers import AutoModel, AutoTokenizer

folder = "."  # or where this folder is
model = AutoModel.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

texts = ["a", "b"]  # or yours
ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
z = model(ids, mode="encode")  # [2, {size}]
halfway = model.generate(latent=(z[:1] + z[1:]) / 2)
print(tokenizer.batch_decode(halfway, skip_special_tokens=True))

from t5vae.latent import LatentSpace  # the same and more, on texts

space = LatentSpace.load(folder)
print(space.reconstruct(texts))
print(space.interpolate(*texts, steps=5))
print(space.sample(3).texts)  # decoded draws from N(0, I)
```

## Data

{data}

## Model and training

{training}

## Evaluation

{evaluation}

## Limits

- `LatentSpace` refuses texts of more than {length} tokens.
- It knows what it was trained on: other texts may come back as something else, unannounced.
- It is no checker: what it decodes may be invalid, wrong, or a text of the training data.
- Nothing was measured but the figures above, and nothing here says what the data's licence allows.
"""


def write_card(run: Path, export: Path) -> None:
    """Write `export/README.md`, a Hugging Face model card, atomically.

    The shards, metrics.jsonl and the checkpoint may be gone: what only they know is left out.
    eval.json is used if it was measured on this very model.

    Args:
        run: the run's folder, with its config.yaml.
        export: the exported model, with its tokenizer and SOURCE, "step-NNNNNNNN ...".
    """
    config, model = read_run(run), known(read_settings(export))
    source = _source(export)
    report = _report(run, export)
    body = CARD.format(
        name=_escape(config.run.name),
        length=model.sequence_length,
        size=model.latent_size,
        data=_data(config, export, _trained_on(config, run / "checkpoints" / source)),
        training=_training(config, model, run, step_of(Path(source))),
        evaluation=_evaluation(report),
    )
    text = f"---\n{_metadata(config, report).to_yaml()}\n---\n\n{body}"
    write_whole(export / "README.md", text)


def _source(export: Path) -> str:
    """The name of the checkpoint that a model was exported from."""
    said = (export / "SOURCE").read_bytes().partition(b" ")[0].decode(errors="replace")
    if not re.fullmatch("step-[0-9]{1,18}", said):
        raise UserError(
            f"{export}/SOURCE is damaged: it names no checkpoint; remove it, then `t5vae export "
            f"{export.parent}`"
        )
    return said


def dataset_name(location: str) -> str:
    """The last part of a folder or URL; a URL's user, password, query and fragment stay out."""
    _, is_url, path = location.rpartition("://")
    if re.search("[?#].*@", path) and is_url:  # a password with a "?", or a query with an "@"
        return "shards"
    if is_url:
        path = re.split("[?#]", path)[0].rpartition("@")[2]
    return Path(path).name or "shards"


def hub_name(base: str | None) -> str | None:
    """`base`, if it is the name of a model on the Hub and not a folder."""
    if base is None or Path(base).exists():
        return None
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base


def _report(run: Path, export: Path) -> dict[str, Any] | None:
    """eval.json, if its figures are those of the exported model."""
    try:
        report = read_file(run / REPORT)
    except (UserError, ValueError):  # the card stands without it
        return None
    return report if report["made_from"]["model_sha256"] == Workspace(export).model_sha256 else None


def _trained_on(config: Config, trained: Path) -> Dataset | None:
    """The shards, if they are there and, as far as is known, those of the checkpoint."""
    try:
        dataset = config.data.open()
    except UserError:
        return None
    try:
        trained_on = read_manifest(trained)["shards"]
    except (*ABSENT, ValueError):  # only the newest checkpoints are kept
        return dataset
    return dataset if dataset.sha256 == trained_on else None


def _names(config: Config) -> list[str]:
    shards = config.data.shards
    paths = [shards] if isinstance(shards, str) else [source.path for source in shards]
    return [dataset_name(path) for path in paths]


def _metadata(config: Config, report: dict[str, Any] | None) -> ModelCardData:
    base = hub_name(config.model.base)
    data = ModelCardData(library_name="transformers", tags=TAGS, base_model=base)
    if report is None:
        return data
    values = {row.name: value_at(report, row.name) for row in ROWS}
    data.model_name = config.run.name
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="t5vae-shards",
            dataset_name=" + ".join(_names(config)),
            dataset_split="valid",
            dataset_revision=report["made_from"]["shards_sha256"],
            metric_type=name.replace(".", "_"),
            metric_value=value,
        )
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    return data


def _data(config: Config, export: Path, dataset: Dataset | None) -> str:
    kind = _tokenizer_class(export)
    names = [_escape(name) for name in _names(config)]
    if dataset is None:
        return _facts({"shards": " + ".join(names), "tokenizer": kind})
    made = str(dataset.indexes[0].recipe.get("tokenizer"))
    if re.fullmatch("train:[0-9]+", made):
        kind = f"byte-level BPE, trained on the split train of {names[0]} (`{made}`)"
    rows = [
        [name, str(quota), split, f"{n.sequences:,}", f"{n.tokens:,}", f"`{index.sha256}`"]
        for name, index, quota in zip(names, dataset.indexes, dataset.quotas, strict=True)
        for split, n in index.splits.items()
    ]
    header = ["shards", "weight", "split", "sequences", "tokens", "sha256 of the index"]
    facts = {
        "longest sequence": f"{dataset.max_length} tokens, end token included",
        "tokenizer": f"{kind}, {dataset.vocab_size:,} pieces",
        "sha256 of the tokenizer": f"`{dataset.tokenizer_fingerprint}`",
    }
    return f"{_table(header, rows)}\n\n{_facts(facts)}"


def _tokenizer_class(export: Path) -> str:
    """In words of Python; "unknown" where its file names none."""
    try:
        said = parse_json((export / "tokenizer_config.json").read_bytes())["tokenizer_class"]
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown"
    return said if isinstance(said, str) and said.isidentifier() else "unknown"


def _training(config: Config, model: T5VAEConfig, run: Path, step: int) -> str:
    with torch.device("meta"):
        parameters = parameter_counts(T5VAE(model))["total"]
    t5, base = model.t5_config, config.model.base
    facts = {
        "parameters": f"{parameters:,}",
        "T5 inside": f"{t5.model_type}: {t5.num_layers} + {t5.num_decoder_layers} layers, width "
        f"{t5.d_model}, {t5.num_heads} heads, {t5.vocab_size:,} pieces; more in config.json",
        "bottleneck": f"{model.bottleneck}, to {model.latent_size} numbers",
        "started from": "random weights" if base is None else hub_name(base) or "a pretrained T5",
        "steps": f"{step:,} of {config.train.steps:,}",
        "sequences seen": f"{step * config.data.global_batch_size:,}",
    }
    records = read_records(run / METRICS)
    # Training may have gone on since the checkpoint.
    last: dict[str, Any] = next((r for r in reversed(records) if _at(r) <= step), {})
    for name in ("loss", "reconstruction", "nats_per_token", *TERMS, "latent_square"):
        if (value := finite(last.get(name))) is not None:
            facts[f"{name.replace('_', ' ')} at step {last['step']:,}"] = f"{value:.4g}"
    settings = config.model_dump(mode="json", include=SETTINGS)
    return f"{_facts(facts)}\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"


def _at(record: dict[str, Any]) -> float:
    """A line's step; after all others where it has none."""
    step = finite(record.get("step"))
    return math.inf if step is None else step


def _evaluation(report: dict[str, Any] | None) -> str:
    if report is None:
        return "Not evaluated yet: `t5vae eval RUN`."
    grid = table(report)
    header = [str(column.header) for column in grid.columns]
    cells = zip(*(column.cells for column in grid.columns), strict=True)
    rows = [[_escape(str(cell)) for cell in row] for row in cells]
    return (
        f"{_escape(str(grid.title))}. The split `valid` of the shards with the index "
        f"`{report['made_from']['shards_sha256']}`; controls: `trigram`, a token trigram model of "
        "the training split; `shuffled`, each held-out sequence given another one's code; "
        "`endpoints`, paths that repeat their ends; `prior`, draws from N(0, I).\n\n"
        f"{_table(header, rows)}"
    )


def _facts(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """A text as Markdown that shows it, in one line."""
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(text.split()))
