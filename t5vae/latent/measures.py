"""Measures give a number for a string: its length, its calls, a molecule's solubility."""

import ast
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from t5vae.common.errors import UserError
from t5vae.latent.functions import imported, molecule_parser, python_tree

Measure = Callable[[str], float]

NAMES = ("length", "calls", "names", "logp", "qed")


def measure(name: str | Callable[[str], Any]) -> Measure:
    """The function behind a measure's name.

    Args:
        name: "length", in characters. "calls" and "names", of Python: how many calls, how many
            different identifiers. "logp" and "qed", of a molecule, by rdkit: the logarithm of its
            solubility in octanol against water (Wildman & Crippen, 1999), and its likeness to
            drugs, from 0 to 1 (Bickerton et al., 2012). A dotted path,
            "package.module:function" or "package.module.function", looked for in the working
            folder too, or a function: of one string, whose answer is a number, or None for none.

    Returns:
        A function from a string to a float, nan where the string has no such number: it does not
        parse, is no molecule. It raises UserError if a function of yours gives anything else than
        a number or None.

    Raises:
        UserError: for an unknown name, a function that cannot be imported, or "logp" and "qed"
            without rdkit.
    """
    if callable(name):
        return _number(name, getattr(name, "__name__", repr(name)))
    if name in MEASURES:
        return MEASURES[name]
    if name in ("logp", "qed"):
        return _molecular(name)
    if "." in name or ":" in name:
        return _number(imported(name, "measure"), name)
    raise UserError(
        f"unknown measure {name!r}; choose length, calls, names, logp, qed or "
        "package.module:function"
    )


def _length(text: str) -> float:
    return float(len(text))


def _calls(text: str) -> float:
    tree = python_tree(text)
    if tree is None:
        return math.nan
    return float(sum(isinstance(node, ast.Call) for node in ast.walk(tree)))


def _names(text: str) -> float:
    tree = python_tree(text)
    if tree is None:
        return math.nan
    return float(len({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}))


MEASURES: dict[str, Measure] = {"length": _length, "calls": _calls, "names": _names}


def _molecular(name: str) -> Measure:
    molecule = molecule_parser(f"the measure {name!r}")
    from rdkit.Chem import QED
    from rdkit.Chem.rdMolDescriptors import CalcCrippenDescriptors

    of_molecule = QED.qed if name == "qed" else lambda found: CalcCrippenDescriptors(found)[0]

    def value(text: str) -> float:
        found = molecule(text)
        return math.nan if found is None else of_molecule(found)

    return value


def _number(function: Callable[[str], Any], name: str) -> Measure:
    def value(text: str) -> float:
        answer = function(text)
        if answer is None:
            return math.nan
        if not isinstance(answer, Real):
            raise UserError(
                f"the measure {name!r} answers {answer!r} for {text!r}, which is no number; "
                "return a float, or None where there is none"
            )
        return float(answer)

    return value
