"""Curves as pictures that a page holds in itself."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one line. Curves with an empty label are not in the legend. `style` is
    matplotlib's format, `colour` is matplotlib's next one by default."""

    label: str
    points: list[tuple[float, float]]
    style: str = "-"
    colour: str | None = None


def picture(
    title: str, curves: list[Curve], logarithmic: bool = False, across: str = "step"
) -> dict[str, str]:
    """Draw curves into one plot and return {title, data}, data a base64-encoded SVG. `across` names
    the horizontal axis. The same curves give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE | {"svg.hashsalt": title})  # type: ignore[arg-type]
    figure, axes = pyplot.subplots(figsize=(5.4, 2.9))
    for curve in curves:
        if curve.points:
            more: dict[str, Any] = {} if curve.colour is None else {"color": curve.colour}
            axes.plot(
                *zip(*curve.points, strict=True),
                curve.style,
                label=curve.label or None,
                linewidth=1.2,
                markersize=3,
                **more,
            )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(across)
    if logarithmic and axes.has_data() and axes.dataLim.y1 > 0:
        axes.set_yscale("log")
    if any(curve.label for curve in curves) and axes.has_data():
        axes.legend(frameon=False)
    file = io.BytesIO()
    # bbox_inches="tight" would draw the picture twice to find its size.
    figure.subplots_adjust(left=0.14, right=0.98, top=0.9, bottom=0.17)
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return {"title": title, "data": base64.b64encode(file.getvalue()).decode()}
