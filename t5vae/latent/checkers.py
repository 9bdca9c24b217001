"""Checkers say whether a decoded string is valid: Python, JSON, a molecule, what you define."""

import ast
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable

from shards.errors import UserError

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
        return _smiles()
    if name in CHECKERS:
        return CHECKERS[name]
    if name.startswith("regex:"):
        return _regex(name.removeprefix("regex:"))
    if "." in name or ":" in name:
        return _imported(name)
    raise UserError(
        f"unknown checker {name!r}; choose python, json, smiles, regex:PATTERN or "
        "package.module:function"
    )


def _python(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, deep nesting
        return False


def _json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's json accepts NaN and Infinity


CHECKERS: dict[str, Checker] = {"python": _python, "json": _json}


def _smiles() -> Checker:
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise UserError(
            "the checker 'smiles' needs rdkit; install it with `pip install rdkit`"
        ) from None

    def is_molecule(text: str) -> bool:
        with rdBase.BlockLogs():
            molecule = Chem.MolFromSmiles(text)
        return molecule is not None and molecule.GetNumAtoms() > 0

    return is_molecule


def _regex(pattern: str) -> Checker:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"the checker's pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    return lambda text: compiled.fullmatch(text) is not None


def _imported(path: str) -> Checker:
    module_name, _, function_name = path.replace(":", ".").rpartition(".")
    sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the checker {path!r} cannot be imported ({error}); give package.module:function, "
            "importable from the working folder or the environment"
        ) from None
    finally:
        sys.path.pop()
    if not callable(function):
        raise UserError(f"the checker {path!r} is not a function; give one that takes a string")
    return lambda text: bool(function(text))
