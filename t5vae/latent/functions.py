"""What checkers and measures share: Python, molecules, functions by dotted path."""

import ast
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from t5vae.common.errors import UserError, first_line


def python_tree(text: str) -> ast.Module | None:
    """The syntax tree of Python source, without warnings; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, deep nesting
        return None


def molecule_parser(needed_by: str) -> Callable[[str], Any]:
    """A function from SMILES to rdkit's molecule, to None for what is none or has no atoms.

    Raises:
        UserError: without rdkit.
    """
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        raise UserError(f"{needed_by} needs rdkit; install it with `pip install rdkit`") from None

    def molecule(text: str) -> Any:
        with rdBase.BlockLogs():
            found = Chem.MolFromSmiles(text)
        return found if found is not None and found.GetNumAtoms() else None

    return molecule


def imported(path: str, what: str) -> Callable[[str], Any]:
    """The function at "package.module:function" or "package.module.function".

    Looked for in the working folder too. What it raises becomes a UserError.

    Args:
        path: where the function is.
        what: what it is to be, for errors.

    Raises:
        UserError: it cannot be imported, or is not a function.
    """
    module_name, _, function_name = path.replace(":", ".").rpartition(".")
    sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the module does
        raise UserError(
            f"the {what} {path!r} cannot be imported ({first_line(error)}); give "
            "package.module:function, importable from the working folder or the environment"
        ) from None
    finally:
        sys.path.pop()
    if not callable(function):
        raise UserError(f"the {what} {path!r} is not a function; give one that takes a string")

    def guarded(text: str) -> Any:
        try:
            return function(text)
        except Exception as error:
            kind = type(error).__name__
            raise UserError(
                f"the {what} {path!r} fails on {text!r} ({kind}: {first_line(error)}); mend it"
            ) from error

    return guarded
