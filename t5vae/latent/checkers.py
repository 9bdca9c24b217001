"""Checkers say whether a decoded string is valid: Python, JSON, a molecule, what you define."""

import json
import re
from collections.abc import Callable

from t5vae.common.errors import UserError
from t5vae.latent.functions import imported, molecule_parser, python_tree

Checker = Callable[[str], bool]


def checker(name: str | Checker) -> Checker:
    """The function behind a checker's name.

    Args:
        name: "python": parses and holds at least one statement, so that an empty string or a bare
            comment does not count. "json": one strict JSON document. "smiles": a molecule of at
            least one atom by rdkit. "regex:PATTERN": the whole string matches. A dotted path,
            "package.module:function" or "package.module.function", looked for in the working
            folder too: a function of one string, whose answer is taken as true or false. A
            function is returned as it is.

    Returns:
        A function from a string to a bool.

    Raises:
        UserError: for an unknown name, a bad pattern, a function that cannot be imported, or
            "smiles" without rdkit.
    """
    if callable(name):
        return name
    if name == "smiles":
        molecule = molecule_parser("the checker 'smiles'")
        return lambda text: molecule(text) is not None
    if name in CHECKERS:
        return CHECKERS[name]
    if name.startswith("regex:"):
        return _regex(name.removeprefix("regex:"))
    if "." in name or ":" in name:
        function = imported(name, "checker")
        return lambda text: bool(function(text))
    raise UserError(
        f"unknown checker {name!r}; choose python, json, smiles, regex:PATTERN or "
        "package.module:function"
    )


def _python(text: str) -> bool:
    tree = python_tree(text)
    return tree is not None and bool(tree.body)


def _json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's json accepts NaN and Infinity


CHECKERS: dict[str, Checker] = {"python": _python, "json": _json}


def _regex(pattern: str) -> Checker:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"the checker's pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    return lambda text: compiled.fullmatch(text) is not None
