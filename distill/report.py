"""`report.html`: one self-contained page about a run, made from the files that the run wrote.

Everything that a model or a prompt wrote is escaped.
"""

import argparse
import html
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from distill.metrics import read_json_lines

NOISE = ("gradient_noise_within", "gradient_noise_between", "gradient_signal")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #8886; padding: .3rem .8rem; text-align: left; vertical-align: top }
svg { width: 100%; height: auto; background: #fff; border-radius: 6px }
.number { text-align: right }
"""


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run's folder, from its `metrics.jsonl` and, once there, its `summary.json`."""
    metrics = read_json_lines(run / "metrics.jsonl")
    summary_file = run / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else {}
    evaluations_file = run / "evaluations.jsonl"
    evaluations = read_json_lines(evaluations_file) if evaluations_file.exists() else []
    page = "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>{html.escape(run.name)}: on-policy distillation</title><style>{STYLE}</style>",
            f"<h1>On-policy distillation: {html.escape(run.name)}</h1>",
            _table([(key, value) for key, value in summary.items() if not isinstance(value, list | dict)]),
            "<h2>Reverse KL</h2>",
            _chart(metrics, [("reverse_kl_exact", "training rollouts, exact")], "nats per token", evaluations),
            "<h2>Gradient norm</h2>",
            _chart(metrics, [("grad_norm", "before clipping")], "norm"),
            "<h2>Seconds a step</h2>",
            _chart(metrics, [(f"seconds_{p}", p) for p in ("rollout", "score", "update")], "seconds"),
            "<h2>Entropy</h2>",
            _chart(metrics, [("student_entropy", "student"), ("teacher_entropy", "teacher")], "nats per token"),
            *_diagnostics(metrics),
            "<h2>Held-out completions</h2>",
            _samples(summary.get("samples", [])),
            "</html>",
        ]
    )
    target = run / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def _diagnostics(metrics: list[dict[str, Any]]) -> list[str]:
    """Charts of what a run needs watched; those whose figures the run never had are left out."""
    window = max(1, len(metrics) // 20)
    noise = [
        {"step": record["step"], **{key: _recent(metrics, i, window, key) for key in NOISE}}
        for i, record in enumerate(metrics)
    ]
    for record in noise:
        signal = record["gradient_signal"]
        for key in NOISE[:2]:
            record[key] = record[key] / signal if signal > 0 else math.nan
    kl = [("reverse_kl_q99", "99 % of tokens are below"), ("reverse_kl_end", "at the end of a completion")]
    noise_lines = [(NOISE[0], "within prompts"), (NOISE[1], "between prompts")]
    fractions = [
        ("top_token_agreement", "same likeliest token"),
        ("truncated_fraction", "cut by length"),
        ("reward_clipped_fraction", "reward clipped"),
    ]
    charts = [
        ("Reverse KL of single tokens", _chart(metrics, kl, "nats")),
        ("Reverse KL by position", _positions(metrics)),
        (f"Noise of the gradient (mean of {window} steps)", _chart(noise, noise_lines, "variance / signal")),
        ("Fractions", _chart(metrics, fractions, "fraction")),
    ]
    return [f"<h2>{html.escape(title)}</h2>{chart}" for title, chart in charts if chart]


def _recent(metrics: list[dict[str, Any]], index: int, window: int, key: str) -> float:
    """Mean of a figure over the last steps that have it."""
    values = [r[key] for r in metrics[max(0, index + 1 - window) : index + 1] if r.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def _positions(metrics: list[dict[str, Any]]) -> str:
    """Reverse KL against the position in the completion, over the first and the last tenth of the steps."""
    series = [record["reverse_kl_by_position"] for record in metrics if "reverse_kl_by_position" in record]
    if not series:
        return ""
    share = max(1, len(series) // 10)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for label, part in (("first steps", series[:share]), ("last steps", series[-share:])):
        columns = zip(*(row + [None] * (max(map(len, part)) - len(row)) for row in part), strict=True)
        means = [sum(known) / len(known) for column in columns if (known := [x for x in column if x is not None])]
        axes.plot([2**i for i in range(len(means))], means, marker="o", label=label)
    axes.set(xlabel="token of the completion", ylabel="nats per token", ylim=(0, None))
    axes.set_xscale("log", base=2)
    return _svg(figure)


def _table(rows: list[tuple[str, Any]]) -> str:
    cells = (f"<tr><th>{html.escape(k)}</th><td class='number'>{html.escape(_shown(v))}</td></tr>" for k, v in rows)
    return f"<table>{''.join(cells)}</table>"


def _samples(samples: list[dict[str, str]]) -> str:
    head = "<tr><th>prompt</th><th>student before</th><th>student after</th></tr>"
    rows = (
        "<tr>" + "".join(f"<td>{html.escape(sample[key])}</td>" for key in ("prompt", "before", "after")) + "</tr>"
        for sample in samples
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _chart(
    metrics: list[dict[str, Any]],
    lines: list[tuple[str, str]],
    unit: str,
    evaluations: list[dict[str, Any]] = (),
) -> str:
    """A line chart as inline SVG; lines without a value are left out, and a chart without a line is empty text."""
    lines = [(key, label) for key, label in lines if any(_known(record.get(key)) for record in metrics)]
    if not lines:
        return ""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in metrics]
    for key, label in lines:
        axes.plot(steps, [math.nan if record.get(key) is None else record[key] for record in metrics], label=label)
    if evaluations:
        axes.errorbar(
            [e["step"] for e in evaluations],
            [e["reverse_kl"] for e in evaluations],
            [1.96 * (e["standard_error"] or 0) for e in evaluations],
            fmt="o",
            color="black",
            capsize=3,
            label="held-out, exact, 95 %",
        )
    axes.set(xlabel="optimizer step", ylabel=unit, ylim=(0, None))
    return _svg(figure)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none"}), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue().split("?>")[-1].split('dtd">')[-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description="Writes a run's report.html anew.")
    parser.add_argument("run", type=Path, help="a run's output folder")
    run = parser.parse_args(argv).run
    if not (run / "metrics.jsonl").exists():
        print(f"{run}: no metrics.jsonl there, so it is no run's output folder", file=sys.stderr)
        return 2
    print(write_report(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
