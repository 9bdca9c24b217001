"""What all sections of a configuration have in common."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from t5vae.common.kinds import Table

Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Of a pickle, which may be older than some of the keys."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            self.__dict__.setdefault(
                name, field.get_default(call_default_factory=True, validated_data={})
            )


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
