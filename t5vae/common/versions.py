"""Versions of what is installed, without importing it."""

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "deepspeed", "webdataset", "submitit", "pydantic")


def versions() -> dict[str, str]:
    """Of t5vae, Python, and the libraries that matter most to it."""
    theirs = {name: installed(name) or "missing" for name in LIBRARIES}
    return {"t5vae": installed("t5vae") or "missing", "python": platform.python_version()} | theirs


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
