"""Records: what a file of a run says, checked before any of it is used, for anybody may have
written it."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from t5vae.common.errors import UserError
from t5vae.common.files import read_records

LARGEST = sys.float_info.max  # JSON's integers can be larger


class Record(BaseModel):
    """What is known of a record; what it says besides is of another version."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]
"""Of ISO 8601, with a zone."""

Name = Annotated[str, Field(pattern=r"^[^\s\p{C}/*?\[\].-][^\s\p{C}/*?\[\]]*$", max_length=200)]
"""What is a file's name and a word of a command, and can be no path, no pattern and no option."""


def finite(value: Any) -> Any:
    """A number as it is, None for anything else: JSON's null stands for those not finite."""
    return value if isinstance(value, int | float) and abs(value) <= LARGEST else None


Kind = TypeVar("Kind", bound=Record)


def parse(kind: type[Kind], said: Any) -> Kind:
    """What was read, as a record.

    Args:
        kind: of the record.
        said: JSON's objects and lists.

    Raises:
        ValueError: it is another thing; in one line, where and why.
    """
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def check(kind: type[Kind], said: Any, name: str) -> Kind:
    """The same, out of a file of that name.

    Raises:
        UserError: it is another thing.
    """
    try:
        return parse(kind, said)
    except ValueError as error:
        raise UserError(f"{name} is damaged ({error}): remove it") from None


def read(kind: type[Kind], path: Path) -> list[Kind]:
    """The records of a file of lines of JSON; none where there is no file.

    Raises:
        UserError: it cannot be read, or holds anything else.
        StorageError: the storage failed for minutes.
    """
    return [check(kind, record, str(path)) for record in read_records(path)]
