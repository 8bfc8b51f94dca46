"""What metrics found, read from evaluations' records and said in words: for the lines, tables and charts of a run.

A figure is {"mean", "low", "high"}, the last two of its 95 % interval; null is what is not known.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MAIN_SET = "main"  # what figures call the prompts of `prompts.eval`
Figure = Mapping[str, Any]
Record = Mapping[str, Any]


class Row(NamedTuple):
    """One figure of one metric on one set of prompts, at the first evaluation and at the last."""

    name: str
    """As `METRIC pass@K`; of another than the main set, as `SET/METRIC pass@K`."""
    before: str
    after: str
    change: str
    """Empty where it is unknown."""


def of_set(name: str, what: str) -> str:
    """How a set's figure is called."""
    return what if name == MAIN_SET else f"{name}/{what}"


def sets_of(evaluation: Record) -> dict[str, Record]:
    """An evaluation's records by set, the main one's first."""
    return {MAIN_SET: evaluation, **evaluation.get("sets", {})}


def figures_of(metric: Record) -> dict[str, Figure]:
    """A metric's figures in its record: the mean first, then each pass@k."""
    return {name: figure for name, figure in metric.items() if isinstance(figure, dict)}


def before_and_after(evaluations: Sequence[Record]) -> dict[str, dict[str, dict[str, dict[str, Figure]]]]:
    """By set, metric and figure what the first and the last evaluation say, and the change; empty without metrics."""
    first, last = (sets_of(evaluations[at]) if evaluations else {} for at in (0, -1))
    found: dict[str, dict[str, dict[str, dict[str, Figure]]]] = {}
    for name, record in last.items():
        for metric, of_metric in record.get("metrics", {}).items():
            earlier = first.get(name, {}).get("metrics", {}).get(metric, {})
            found.setdefault(name, {})[metric] = {
                figure: {
                    "before": _plain(earlier.get(figure, {})),
                    "after": _plain(after),
                    "change": _plain(after.get("change", {})),
                }
                for figure, after in figures_of(of_metric).items()
            }
    return found


def _plain(figure: Figure) -> Figure:
    return {key: figure.get(key) for key in ("mean", "low", "high")}


def shown_figures(*records: Record, every: bool = False) -> list[str]:
    """Those of a metric that are worth a line: the mean where it is no share of successes, the first pass@k and the
    last, or `every` one. `records` hold the same figures."""
    mean, first, *others = figures_of(records[0])
    values = [(record[mean]["mean"], record[first]["mean"]) for record in records]
    alike = all(None in pair or math.isclose(*pair, rel_tol=1e-9, abs_tol=1e-12) for pair in values)
    return [*([] if alike else [mean]), first, *(others if every else others[-1:])]


def metric_rows(found: Mapping[str, Any], *, every: bool = True) -> list[Row]:
    """`before_and_after` as the rows of a table: every pass@k, or the first and the last."""
    listed = []
    for name, metrics in found.items():
        for metric, figures in metrics.items():
            sides = [{figure: each[when] for figure, each in figures.items()} for when in ("before", "after")]
            for figure in shown_figures(*sides, every=every):
                before, after, change = (figures[figure][when] for when in ("before", "after", "change"))
                said = figure_in_words(figure, before), figure_in_words(figure, after), change_in_words(figure, change)
                listed.append(Row(f"{of_set(name, metric)} {figure}", *said))
    return listed


def figure_in_words(name: str, figure: Figure) -> str:
    """As `31 % (24 to 39)`; a mean, which need be no share, as `0.31 (0.24 to 0.39)`."""
    return _in_words(figure, "{:.3g}" if _is_mean(name) else "{:.0f}", "" if _is_mean(name) else " %") or "–"


def change_in_words(name: str, change: Figure) -> str:
    """As `+12 points (+3 to +21)`; of a mean as `+0.12 (+0.03 to +0.21)`; empty where it is unknown."""
    return _in_words(change, "{:+.3g}" if _is_mean(name) else "{:+.0f}", "" if _is_mean(name) else " points")


def _is_mean(name: str) -> bool:
    return name.startswith("avg")


def _in_words(figure: Figure, form: str, unit: str) -> str:
    if figure["mean"] is None:
        return ""
    scale = 100 if unit else 1
    mean, low, high = (None if figure[key] is None else form.format(scale * figure[key]) for key in _plain(figure))
    return f"{mean}{unit}" if low is None else f"{mean}{unit} ({low} to {high})"


def names(found: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The sets and metrics of several `before_and_after`, each once."""
    return list(dict.fromkeys((name, metric) for one in found for name, metrics in one.items() for metric in metrics))
