"""A report as one web page that needs nothing else: plots, tables, examples."""

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from t5vae.evaluation.pictures import pictures
from t5vae.evaluation.tables import cells


def page(report: dict[str, Any], name: str, curves: bytes | None = None) -> str:
    """The page's HTML.

    Args:
        report: what `evaluate` returned, or `eval.json` read back.
        name: of the model.
        curves: of its training, as SVG.
    """
    images = {shown: svg.encode() for shown, svg in pictures(report).items()}
    if curves is not None:
        images["curves"] = curves
    environment = Environment(
        loader=PackageLoader("t5vae.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        name=name,
        rows=cells(report),
        images={shown: _data_url(svg) for shown, svg in images.items()},
    )


def _data_url(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
