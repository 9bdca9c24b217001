"""What a process of a run is at: for profiles, and for the line that says where one failed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

_step = 0
_entered: list[str] = []


def begin_step(step: int) -> None:
    """Be in this step from now on."""
    global _step
    _step = step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Be at something meanwhile; what leaves it by an exception is known to have failed there."""
    _entered.append(name)
    try:
        with record_function(name):
            yield
    except BaseException as error:
        if not hasattr(error, "phase"):
            error.phase = present()  # type: ignore[attr-defined]
        raise
    finally:
        _entered.pop()


def present() -> str:
    """Where this process is, for people, as "step 12, forward"."""
    step = [f"step {_step:,}"] if _step else []
    return ", ".join(step + _entered[-1:]) or "start"


def failed_in(error: BaseException) -> str:
    """Where an exception came from."""
    return getattr(error, "phase", None) or present()
