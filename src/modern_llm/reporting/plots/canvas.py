"""The canvas of every figure: style, colours, and PNG bytes without screen or global state.

Colours are Okabe and Ito's, told apart by the colour-blind; curves differ in marker or dash too.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

COLOURS = {
    "pretrain": "#0072B2",
    "sft": "#D55E00",
    "dpo": "#009E73",
    "verifier": "#AA4499",
    "baseline": "#777777",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
DPI = 120
PALETTE = 160  # colours of a PNG
NOTE = {"fontsize": 8.5, "color": "#555555"}


def render(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """PNG of a figure of ``width`` x ``height`` inches that ``draw`` fills."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    buffer = io.BytesIO()
    colours = image.convert("RGB").quantize(
        PALETTE, dither=Image.Dither.NONE
    )  # a third of the bytes
    colours.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def series(rows: Sequence[dict[str, Any]], *names: str) -> tuple[list[float], list[float]]:
    """Steps and values of the first of ``names`` that the rows have; non-finite ones left out."""
    for name in names:
        points = [
            (float(row["step"]), float(row[name]))
            for row in rows
            if isinstance(row.get("step"), int)
            and isinstance(row.get(name), int | float)
            and math.isfinite(row[name])
        ]
        if points:
            return [x for x, _ in points], [y for _, y in points]
    return [], []


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to ``window`` values: centred, and at the end over those that there are."""
    half = window // 2
    means = []
    for i in range(len(values)):
        part = values[i - min(half, i) : i + min(half, i) + 1]
        means.append(sum(part) / len(part))
    return means


def as_percent() -> Any:
    """Axis labels of fractions as whole percent."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)  # as many decimals as the ticks need


def panels(figure: Any, count: int) -> list[Any]:
    """``count`` axes in a grid: up to three in a line, four in two lines."""
    columns = min(count, 3) if count != 4 else 2
    lines = math.ceil(count / columns)
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = [axes for line in grid for axes in line]
    for axes in panels[count:]:
        axes.set_visible(False)
    return panels[:count]
