"""How the report's figures look: colours, axes, legends and what hovering shows.

Colours go together with dashes and markers, so that no line is told by its colour alone. Bokeh, because its script of
1.3 MB draws a page in less than half the time of Plotly's 4.8 MB.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool, Span
from bokeh.plotting import figure

# After Okabe and Ito, told apart by most who see no red or no green, each with a dash and a marker of its own.
COLOURS = ("#1f83c4", "#e07b00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8f98")
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot", [8, 2, 2, 2], [1, 4])
MARKERS = ("circle", "diamond", "square", "triangle", "inverted_triangle", "star", "hex")
MAX_POINTS = 1000  # of a curve that are drawn


class Chart(NamedTuple):
    """A figure with the words around it."""

    title: str
    caption: str
    figure: figure

    def item(self, target: str) -> dict[str, Any]:
        """What `Bokeh.embed.embed_item` takes, for the page's element of that id."""
        return json_item(self.figure, target)


def source_of(**columns: Sequence | np.ndarray) -> ColumnDataSource:
    """The columns, thinned."""
    count = len(next(iter(columns.values())))
    kept = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(int))
    return ColumnDataSource({name: np.asarray(values)[kept] for name, values in columns.items()})


def new_figure(unit: str, of: str, x_axis: str = "linear", y_axis: str = "linear") -> figure:
    chart = figure(
        height=260, sizing_mode="stretch_width", x_axis_type=x_axis, y_axis_type=y_axis, tools="xbox_zoom,reset,save"
    )
    chart.xaxis.axis_label, chart.yaxis.axis_label = of, unit
    chart.toolbar.autohide, chart.toolbar.logo = True, None
    chart.toolbar.active_drag = None  # a finger that scrolls the page is no zoom
    chart.background_fill_alpha = chart.border_fill_alpha = 0
    chart.outline_line_alpha, chart.grid.grid_line_alpha = 0, 0.5
    return chart


def finished(chart: figure, *, from_zero: bool = True) -> figure:
    """The legend above the curves, where there is more than one; the axis from zero, where nothing is below."""
    (legend,) = chart.legend
    labels = [item.label.value for item in legend.items]
    chart.add_layout(legend, "above")
    legend.visible, legend.ncols = len(labels) > 1, 2 if max(map(len, labels)) < 24 else 1
    legend.background_fill_alpha, legend.border_line_alpha, legend.click_policy = 0, 0, "hide"
    legend.padding, legend.margin, legend.spacing, legend.label_text_font_size = 2, 0, 12, "12px"
    if from_zero and isinstance(chart.y_range, DataRange1d):
        lows = [np.nanmin(r.data_source.data[r.glyph.y], initial=0) for r in chart.renderers if hasattr(r.glyph, "y")]
        if min(lows, default=0) >= 0:
            chart.y_range.start = 0
    return chart


STEPS = "optimizer step"  # what most charts are over


def marked(chart: Chart, step: int, caption: str) -> Chart:
    """With a line at a step, and what it is; charts over something else stay as they are."""
    if chart.figure.xaxis.axis_label != STEPS:
        return chart
    line = Span(location=step + 0.5, dimension="height", line_color=COLOURS[-1], line_dash="dotted", line_width=2)
    chart.figure.add_layout(line)
    return chart._replace(caption=f"{chart.caption} {caption}")


def line_style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "line_dash": DASHES[index % len(DASHES)], "line_width": 2.5}


def hover(tooltips: list[tuple[str, str]], renderer: Any, mode: str = "vline") -> HoverTool:
    return HoverTool(tooltips=tooltips, renderers=[renderer], mode=mode)
