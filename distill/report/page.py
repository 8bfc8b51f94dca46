"""`report.html`: one self-contained page about a run, made from the files that the run wrote.

`python -m distill.report RUN [RUN ...]` writes it anew; of several runs, one page that compares them. Everything that a
model or a prompt wrote is escaped, and the page's own policy lets a browser run its scripts alone and fetch nothing.
"""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.config import ConfigError, in_words, load_config
from distill.report.charts import comparison_charts, run_charts, warm_steps
from distill.report.drawing import Chart, marked
from distill.report.figures import before_and_after, figure_in_words, metric_rows, names, of_set, shown_figures
from distill.report.metric_charts import metric_charts, metric_comparison
from distill.runtime import read_json_lines, write_whole

TEMPLATES = Environment(
    loader=PackageLoader("distill.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
TEMPLATES.policies["json.dumps_kwargs"] = {"sort_keys": False}  # a Bokeh model is defined where it is first named
BOKEH = "\n".join(Resources("inline", components=["bokeh"]).js_raw)
LEVELS = (0.1, 0.5, 1.5, 3.0)  # nats of reward from which a token's colour is a shade stronger
FINAL = {
    "eval_reverse_kl_before": "held-out reverse KL before",
    "eval_reverse_kl_after": "after",
    "standard_error": "standard error",
    "eval_reverse_kl_change": "change",
    "eval_reverse_kl_change_standard_error": "its standard error",
    "steps": "steps",
    "completion_tokens": "completion tokens",
    "wall_seconds": "seconds",
    "peak_memory_bytes": "peak memory, bytes",
    "device": "device",
}


def report_page(run: Path) -> str:
    """The report of a run's folder, from its logs and, once there, its `summary.json`."""
    metrics, evaluations, summary = _read(run)
    views = _records(run / "tokens.jsonl")
    first, *others = run_charts(metrics, evaluations) or [None]
    charts = [chart for chart in (first, *metric_charts(evaluations), *others) if chart is not None]
    if warm := warm_steps(metrics):
        charts = [marked(chart, warm, "Dotted: the end of the warm start.") for chart in charts]
    return _page(
        "report.html.jinja",
        charts,
        title=run.absolute().name,
        evaluations=_told(evaluations, warm),
        step=metrics[-1]["step"] if metrics else 0,
        warm=warm,
        metrics=metric_rows(before_and_after(evaluations)),
        between={row.name: row.after for row in metric_rows(before_and_after(_until_warm(evaluations, warm)))},
        models=_models(run),
        summary={key: _shown(value) for key, value in summary.items() if not isinstance(value, list | dict)},
        samples=_samples(views, summary.get("samples", [])),
        events=_records(run / "events.jsonl")[-20:],
        levels=LEVELS,
    )


def _until_warm(evaluations: list[dict], warm_steps: int) -> list[dict]:
    """The first evaluation and the one at the end of a warm start; nothing where there was none before the last."""
    found = [e for e in evaluations[:-1] if 0 < e["step"] == warm_steps]
    return evaluations[:1] + found if found else []


def _told(evaluations: list[dict], warm_steps: int) -> list[dict]:
    """Those that the page begins with: the first, the one at the end of a warm start, and the last, each named."""
    names = {e["step"]: f"after step {e['step']}" for e in (evaluations[:1] + evaluations[-1:])}
    if warm_steps and any(e["step"] == warm_steps for e in evaluations):
        names[warm_steps] = "after the warm start"
    found = [e | {"when": "before" if e["step"] == 0 else names[e["step"]]} for e in evaluations if e["step"] in names]
    return [e for e in found if e.get("reverse_kl") is not None]


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder."""
    write_whole(run / "report.html", report_page(run).encode())
    return run / "report.html"


def comparison_page(runs: list[Path]) -> str:
    """One page about several runs: their curves over each other, and a table of their final figures."""
    names = [run.absolute().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    read = {label: _read(run) for label, run in zip(labels, runs, strict=True)}
    table = {}
    for label, (_, evaluations, summary) in read.items():
        final = {**summary, "standard_error": evaluations[-1].get("standard_error") if evaluations else None}
        table[label] = [_shown(final.get(key)) for key in FINAL]
    head = list(FINAL.values())
    for column, cells in _metric_columns({label: evaluations for label, (_, evaluations, _) in read.items()}).items():
        head.append(column)
        for label, cell in cells.items():
            table[label].append(cell)
    charts = comparison_charts({label: (metrics, evaluations) for label, (metrics, evaluations, _) in read.items()})
    charts += metric_comparison({label: evaluations for label, (_, evaluations, _) in read.items()})
    return _page("comparison.html.jinja", charts, title=f"{len(runs)} runs", head=head, rows=table)


def _metric_columns(runs: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    """Of each metric that one of the runs has, a column for before and one for after, by the runs' labels."""
    found = {label: before_and_after(evaluations) for label, evaluations in runs.items()}
    columns: dict[str, dict[str, str]] = {}
    for name, metric in names(found.values()):
        for when in ("before", "after"):
            cells = columns.setdefault(f"{of_set(name, metric)} {when}", {})
            for label, of_run in found.items():
                figures = of_run.get(name, {}).get(metric, {})
                found_then = {figure: each[when] for figure, each in figures.items()}
                shown = shown_figures(found_then) if found_then else []
                cells[label] = ", ".join(f"{figure} {figure_in_words(figure, found_then[figure])}" for figure in shown)
    return columns


def _read(run: Path) -> tuple[list[dict], list[dict], dict[str, Any]]:
    summary = run / "summary.json"
    return (
        _records(run / "metrics.jsonl"),
        _records(run / "evaluations.jsonl"),
        json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
    )


def _models(run: Path) -> dict[str, str]:
    """What is trained from whom, in words; nothing where the configuration is absent or another version's."""
    try:
        return in_words(load_config(run / "config.yaml"))
    except ConfigError:
        return {}


def _records(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []


def _page(template: str, charts: list[Chart], **content: Any) -> str:
    def source(name: str) -> Markup:
        return Markup(TEMPLATES.loader.get_source(TEMPLATES, name)[0])

    scripts = [Markup(BOKEH), source("report.js")]
    return TEMPLATES.get_template(template).render(
        content,
        charts=charts,
        items=[chart.item(f"chart-{index}") for index, chart in enumerate(charts)],
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        style=source("report.css"),
    )


def _samples(views: list[dict[str, Any]], texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The held-out prompts with the completions of the last and of the first evaluation, token by token.

    A run without `tokens.jsonl` has their text alone.
    """
    if not views:
        return [
            {"prompt": t["prompt"], "sides": [{"title": f"student {w}", "plain": t[w]} for w in ("after", "before")]}
            for t in texts
        ]
    last, first = views[-1], views[0]
    samples = []
    for index, view in enumerate(last["samples"]):
        sides = [_side(last["step"], view)]
        if first is not last:
            sides.append(_side(first["step"], first["samples"][index]))
        samples.append({"prompt": view["prompt"], "sides": sides})
    return samples


def _side(step: int, view: dict[str, Any]) -> dict[str, Any]:
    kl = [value for value in view["reverse_kl"] if value is not None]
    title = f"student after {step} steps" if step else "student before"
    pairs = zip(view["student_logprob"], view["teacher_logprob"], strict=True)
    return {
        "title": f"{title}: {sum(kl) / len(kl):.2f} nats per token" if kl else title,
        "tokens": [
            # A line break is shown, and breaks the line too; what shows nothing at all gets a mark.
            {"text": text.replace("\n", "⏎\n") or "·", "shade": _shade(*pair)}
            for text, pair in zip(view["text"], pairs, strict=True)
        ],
        "data": {key: value for key, value in view.items() if key != "prompt"},
    }


def _shade(student: float | None, teacher: float | None) -> str:
    """The class of a token's colour and underline: `p` where the teacher finds it likelier, `n` where less likely."""
    if student is None or teacher is None:
        return "unknown"
    reward = teacher - student
    level = sum(abs(reward) >= limit for limit in LEVELS)
    return f"{'p' if reward > 0 else 'n'}{level}" if level else "same"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
