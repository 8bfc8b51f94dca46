"""The charts of what metrics found at the evaluations: a chart a metric, each curve with the band of its interval."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.report.drawing import COLOURS, MARKERS, STEPS, Chart, finished, hover, line_style, new_figure, source_of
from distill.report.figures import MAIN_SET, figures_of, of_set, sets_of, shown_figures

Evaluations = Sequence[Mapping[str, Any]]
SHARE = "share, or mean"


class _Curve(NamedTuple):
    label: str
    steps: list[int]
    figures: list[Mapping[str, float | None]]


def metric_charts(evaluations: Evaluations) -> list[Chart]:
    """A run's charts: one for each metric, with a curve for each set and figure, and the sets' reverse KL."""
    found: dict[str, list[_Curve]] = {}
    for name, records in _by_set(evaluations).items():
        for metric, of_metric in _metrics(records).items():
            for figure in shown_figures(*of_metric.values()):
                curve = _Curve(of_set(name, figure), list(of_metric), [each[figure] for each in of_metric.values()])
                found.setdefault(metric, []).append(curve)
    charts = [_chart(metric, SHARE, curves) for metric, curves in found.items()]
    return [chart for chart in (*charts, _reverse_kl_by_set(evaluations)) if chart is not None]


def metric_comparison(runs: Mapping[str, Evaluations]) -> list[Chart]:
    """A chart for each metric on each set, with a curve for each run that has it: of what is shown of it first."""
    found: dict[str, list[_Curve]] = {}
    for label, evaluations in runs.items():
        for name, records in _by_set(evaluations).items():
            for metric, of_metric in _metrics(records).items():
                figure = shown_figures(*of_metric.values())[0]
                curve = _Curve(label, list(of_metric), [each[figure] for each in of_metric.values()])
                found.setdefault(f"{of_set(name, metric)} {figure}", []).append(curve)
    charts = [_chart(title, SHARE, curves) for title, curves in found.items()]
    return [chart for chart in charts if chart is not None]


def _by_set(evaluations: Evaluations) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Each set's records by step."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for evaluation in evaluations:
        for name, record in sets_of(evaluation).items():
            found.setdefault(name, {})[evaluation["step"]] = record
    return found


def _metrics(records: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Each metric's figures by step."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for step, record in records.items():
        for metric, of_metric in record.get("metrics", {}).items():
            found.setdefault(metric, {})[step] = figures_of(of_metric)
    return found


def _reverse_kl_by_set(evaluations: Evaluations) -> Chart | None:
    sets = _by_set(evaluations)
    if len(sets) < 2:
        return None
    curves = []
    for name, records in sets.items():
        figures = []
        for record in records.values():
            mean, error = record.get("reverse_kl"), record.get("standard_error")
            known = mean is not None and error is not None
            low, high = (mean - 1.96 * error, mean + 1.96 * error) if known else (None, None)
            figures.append({"mean": mean, "low": low, "high": high})
        curves.append(_Curve("prompts.eval" if name == MAIN_SET else name, list(records), figures))
    return _chart("Reverse KL by set", "nats per token", curves)


def _chart(title: str, unit: str, curves: Sequence[_Curve]) -> Chart | None:
    chart = new_figure(unit, STEPS)
    for index, curve in enumerate(curves):
        values = {
            key: np.array([np.nan if each[key] is None else each[key] for each in curve.figures], dtype=float)
            for key in ("mean", "low", "high")
        }
        if not np.isfinite(values["mean"]).any():
            continue
        source = source_of(step=curve.steps, run=[curve.label] * len(curve.steps), **values)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        chart.varea("step", "low", "high", source=source, color=colour, fill_alpha=0.15, legend_label=curve.label)
        chart.line("step", "mean", source=source, legend_label=curve.label, **line_style(index))
        marks = chart.scatter("step", "mean", source=source, size=8, marker=marker, color=colour)
        shown = [("", "@run"), ("step", "@step"), ("", "@mean{0.000}"), ("95 %", "@low{0.000} to @high{0.000}")]
        chart.add_tools(hover(shown, marks, "mouse"))
    caption = "At each evaluation, with the band of its 95 % interval over prompts."
    return Chart(title, caption, finished(chart)) if chart.renderers else None
