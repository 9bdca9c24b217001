"""What is said to a user who is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from t5vae.common.errors import UserError


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message == message.strip()
    return message
