"""A configuration's YAML, read by what its keys hold: at a key that holds text, text stays text."""

import csv
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

from t5vae.common.errors import UserError
from t5vae.config.config import Config

BOOL, FLOAT, INT, MERGE, NULL, STR, TIMESTAMP, VALUE = (
    f"tag:yaml.org,2002:{name}"
    for name in ("bool", "float", "int", "merge", "null", "str", "timestamp", "value")
)
GUESSED = {BOOL, FLOAT, INT, MERGE, TIMESTAMP, VALUE}
"""What YAML may take plain text for; what it says is null is null."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for its traps: 24:00:00 is a time, 0100 a hundred, 2026-11-29 text."""

    def construct_yaml_int(self, node: ScalarNode) -> Any:
        if ":" in node.value:
            return node.value
        if re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            return int(node.value.replace("_", ""))
        return super().construct_yaml_int(node)


_Loader.add_constructor(INT, _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [each for each in those if each[0] != TIMESTAMP]
    for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(text: str, annotation: Any = Config, name: str = "") -> Any:
    """A YAML document.

    Args:
        text: the document.
        annotation: what it holds.
        name: dotted, of the key that it is the value of.

    Raises:
        UserError: a key is given twice in one mapping.
        ValueError, RecursionError, yaml.YAMLError: it is no YAML.
    """
    node = yaml.compose(text, _Loader)
    if node is None:
        return None
    _settle(node, annotation, name, {})
    return _Loader("").construct_document(node)


def read_value(text: str, key: str) -> Any:
    """What is typed as the value of a key.

    At a key that holds text it is that text, but for "null" and "", which are None. One that may
    be a list or a mapping too is that where it begins with a bracket. Elsewhere it is YAML, or else
    text.

    Raises:
        UserError: a key is given twice in one mapping.
    """
    held = _held(key)
    kinds = alternatives(held)
    try:
        if (str in kinds or Any in kinds) and not _is_whole(text, kinds):
            return text
        return read(text, held, key)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def read_values(text: str, key: str) -> list[Any]:
    """Values of a key, typed with commas between them; text with a comma in it is quoted as in CSV.

    Raises:
        UserError: a key is given twice in one mapping.
        ValueError, yaml.YAMLError: they are no list.
    """
    held = _held(key)
    kinds = alternatives(held)
    if str not in kinds or (any(map(_is_collection, kinds)) and re.search(r"[\[{]", text)):
        return read(f"[{text}]", list[held], key)  # type: ignore[valid-type]
    items = next(csv.reader([text], skipinitialspace=True), [])
    if "" in items:
        raise ValueError("an empty value")
    return [read_value(item, key) for item in items]


def alternatives(annotation: Any) -> list[Any]:
    """The types that a key may hold, a literal's among them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return alternatives(inner[0])
    if origin in (Union, UnionType):
        return [each for part in inner for each in alternatives(part)]
    return [type(value) for value in inner] if origin is Literal else [annotation]


def within(annotation: Any, part: str | int) -> Any:
    """What is held under a key of a section or mapping, or by an item; Any where nobody says."""
    for each in alternatives(annotation):
        origin, inner = get_origin(each), get_args(each)
        if isinstance(part, int) and origin in (list, tuple):
            return inner[min(part, len(inner) - 1)]
        if isinstance(part, str) and origin is dict:
            return inner[1]
        if isinstance(part, str) and _is_section(each) and part in each.model_fields:
            return each.model_fields[part].rebuild_annotation()
    return Any


def _held(key: str) -> Any:
    held: Any = Config
    for part in key.split("."):
        held = within(held, part)
    return held


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_collection(kind: Any) -> bool:
    return kind is Any or get_origin(kind) in (list, dict)


def _is_whole(text: str, kinds: list[Any]) -> bool:
    """Whether YAML says all that was typed where text may be."""
    node = yaml.compose(text, _Loader)
    if isinstance(node, CollectionNode):
        return text.startswith(("[", "{")) and any(map(_is_collection, kinds))
    if node is None or node.tag == NULL:
        return text in ("", "null")
    return isinstance(node, ScalarNode) and node.style is None and node.value == text


def _settle(node: Node, held: Any, name: str, done: dict[tuple[int, str], bool]) -> None:
    """Make text of what YAML takes for something else where text is held; refuse a key twice."""
    this = (id(node), repr(held))
    if this in done:  # an alias
        if not done[this]:
            raise UserError(f"{name or 'it'} holds itself, by an alias: leave it out")
        return
    done[this] = False
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            _settle(item, within(held, index), f"{name}.{index}", done)
    elif isinstance(node, ScalarNode) and _is_text(node, alternatives(held)):
        node.tag = STR
    elif isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for each in value.value if isinstance(value, SequenceNode) else [value]:
                    _settle(each, held, name, done)
            elif isinstance(key, ScalarNode):
                key.tag = STR
                inner = within(held, key.value)
                whole = " ".join(f"{name}.{key.value}".removeprefix(".").split())
                line = key.start_mark.line + 1
                if key.value in lines:
                    what = "section" if any(map(_is_section, alternatives(inner))) else "key"
                    first = lines[key.value]
                    where = f"lines {first} and {line}" if first != line else f"line {line}"
                    raise UserError(f"the {what} {whole} is given twice, in {where}: keep one")
                lines[key.value] = line
                _settle(value, inner, whole, done)
    done[this] = True


def _is_text(node: ScalarNode, kinds: list[Any]) -> bool:
    if node.style is not None or node.tag not in GUESSED or Any in kinds:
        return False
    if node.tag == BOOL:
        return bool not in kinds
    if node.tag == INT and int in kinds and str in kinds:
        return not re.fullmatch(r"-?(0|[1-9]\d*)", node.value, re.ASCII)
    return str in kinds or any(map(_is_section, kinds))
