"""What all sections of a configuration have in common."""

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

from t5vae.common.errors import UserError, printable
from t5vae.common.kinds import Table
from t5vae.common.paths import expanded

Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Of a pickle, which may be older than some of the keys."""
        super().__setstate__(state)
        if self.__pydantic_private__ is None:
            self.model_post_init(None)  # gives private attributes their defaults
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(
                name, field.get_default(call_default_factory=True, validated_data={})
            )


@dataclass(frozen=True)
class IsPath:
    """Annotates a key that holds a path or a URL, with `~` and variables in it."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._expand, handler(source))

    def _expand(self, path: str) -> str:
        try:
            return expanded(path)
        except UserError as error:
            raise ValueError(str(error)) from None


Place = Annotated[str, IsPath()]


def _one_line(text: str) -> str:
    if printable(text) != text:
        raise ValueError("it has a line break or another control character: leave it out")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""Text that is printed in a line of its own, or put into one of a script."""


def is_path(annotation: Any) -> bool:
    """Whether a key of this type holds a path, or may."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(map(is_path, inner))
    if origin is not Annotated:
        return False
    return any(isinstance(rule, IsPath) for rule in inner[1:]) or is_path(inner[0])


@dataclass(frozen=True)
class OneOf:
    """Annotates a key whose value is a name in a table of kinds."""

    table: Table

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.table)}

    def _check(self, name: str) -> str:
        if name not in self.table:
            raise ValueError(f"choose one of {', '.join(self.table)}")
        return name
