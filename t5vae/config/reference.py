"""Every key of a configuration with its type, default and meaning, from the sections themselves.

python -m t5vae.config.reference docs/training.md    # writes the tables between its two marks
"""

import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from t5vae.common.section import OneOf
from t5vae.config.config import Config
from t5vae.config.loading import keys

BEGIN, END = "<!-- keys -->\n", "<!-- end of keys -->\n"


class Key(NamedTuple):
    """Attributes:
    name: dotted.
    kind: what it may be, as one writes it in YAML.
    default: as one writes it in YAML; "required" where there is none.
    meaning: one or two sentences.
    """

    name: str
    kind: str
    default: str
    meaning: str


def describe_keys() -> list[Key]:
    """Every key, in the order of a whole configuration."""
    return [_describe(name) for name in keys()]


def _describe(name: str) -> Key:
    *path, leaf = name.split(".")
    section: type[BaseModel] = Config
    for part in path:
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type)
        section = inner
    field = section.model_fields[leaf]
    meaning = " ".join((field.description or "").split())
    default = "required" if field.is_required() else json.dumps(field.default)
    tables = [rule.table for rule in field.metadata if isinstance(rule, OneOf)]
    kind = " | ".join(tables[0]) if tables else _kind(field.annotation)
    return Key(name, kind, default, meaning)


def _kind(annotation: Any) -> str:
    """A type, as one would write its values."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_kind, inner))
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is list:
        return f"[{_kind(inner[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(_kind, inner))}]"
    if origin is dict:
        return "{name: value, ...}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return {bool: "true | false", NoneType: "null"}.get(annotation, annotation.__name__)


def tables() -> str:
    """A table in Markdown for each section."""
    sections: dict[str, list[str]] = {}
    for key in describe_keys():
        section, _, leaf = key.name.rpartition(".")
        kind, meaning = (text.replace("|", "\\|") for text in (key.kind, key.meaning))
        row = f"| `{leaf}` | {kind} | `{key.default}` | {meaning} |"
        sections.setdefault(section, []).append(row)
    head = "| key | value | default | meaning |\n|---|---|---|---|"
    return "\n".join(
        f"\n### {section}\n\n{head}\n" + "\n".join(rows) for section, rows in sections.items()
    )


def updated(text: str) -> str:
    """A document with the tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(updated(document.read_text()))
