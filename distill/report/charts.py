"""The report's charts: a Bokeh figure for each of a run's curves, and overlaid ones for several runs.

A curve without a known value is left out, and so is a chart without a curve.
"""

from typing import Any

import numpy as np
from bokeh.models import FixedTicker, Whisker
from bokeh.plotting import figure

from distill.report.drawing import COLOURS, MARKERS, STEPS, Chart, finished, hover, line_style, new_figure, source_of

Records = list[dict[str, Any]]
GIB = 2**30
# Title, unit, a sentence about it, and the metrics with their labels.
PER_STEP = (
    (
        "Reverse KL of single tokens",
        "nats",
        "",
        {"reverse_kl_q99": "99 % are below", "reverse_kl_end": "end of sequence"},
    ),
    (
        "Entropy",
        "nats per token",
        "Of the next token, at the sampled positions. ",
        {"student_entropy": "student", "teacher_entropy": "teacher"},
    ),
    ("Completion length", "tokens", "", {"completion_length": "mean of the step"}),
    (
        "Fractions",
        "fraction",
        "",
        {
            "truncated_fraction": "cut by length",
            "top_token_agreement": "same likeliest token",
            "reward_clipped_fraction": "reward clipped",
        },
    ),
    ("Gradient norm", "norm", "", {"grad_norm": "before clipping"}),
)
WARM_START = "warm_start"  # `phase` of a step before the first rollout
OF_ANSWERS = (
    "Written answers",
    "nats per token",
    {
        "cross_entropy": "cross entropy, warm start",
        "off_policy_cross_entropy": "cross entropy, beside rollouts",
        "off_policy_reverse_kl_exact": "reverse KL, beside rollouts",
    },
)


def run_charts(metrics: Records, evaluations: Records) -> list[Chart]:
    """Every chart that a run has figures for."""
    if not metrics:
        return []
    window = rolling_window(len(metrics))
    mean = f"Thin: each step; thick: mean of {window} steps."
    # Of answers, divergences, lengths and ends are not the student's doing.
    on_policy = [{"step": line["step"], "phase": WARM_START} if _warm(line) else line for line in metrics]
    found = [_reverse_kl(on_policy, evaluations, window), _lines(metrics, *OF_ANSWERS, mean, window)]
    found += [_fluctuation(on_policy, window), _positions(on_policy)]
    for title, unit, about, labels in PER_STEP:
        lines = metrics if title in ("Entropy", "Gradient norm") else on_policy
        found.append(_lines(lines, title, unit, labels, f"{about}{mean}", window, log=title == "Gradient norm"))
    rewards = {key: key.removeprefix("reward/") for r in metrics for key in r if key.startswith("reward/")}
    rewards |= {"reward": "all, weighted"} if rewards else {}
    phases = {key: key.removeprefix("seconds_") for r in metrics for key in r if key.startswith("seconds_")}
    memory = [{"step": r["step"], "gib": r["peak_memory_bytes"] / GIB} for r in metrics if r.get("peak_memory_bytes")]
    found += [
        _lines(metrics, "Reward", "mean of the step", rewards, mean, window),
        _noise(metrics, window),
        _lines(metrics, "Time by phase", "seconds a step", phases, mean, window),
        _lines(memory, "Memory", "GiB", {"gib": "most used so far"}, "Of the process, or of the GPU.", 1),
    ]
    return [chart for chart in found if chart is not None]


def comparison_charts(runs: dict[str, tuple[Records, Records]]) -> list[Chart]:
    """Overlaid curves of several runs, by their labels: means over a window, so that they can be told apart."""
    curves = {
        "Reverse KL": ("reverse_kl_exact", "nats per token"),
        "Gradient norm": ("grad_norm", "norm"),
        "Student's entropy": ("student_entropy", "nats per token"),
        "Completion length": ("completion_length", "tokens"),
        "Speed": ("tokens_per_second", "tokens per second"),
    }
    found = []
    for title, (key, unit) in curves.items():
        chart = new_figure(unit, STEPS)
        for index, (label, (metrics, evaluations)) in enumerate(runs.items()):
            values = _divergence(metrics) if key == "reverse_kl_exact" else column(metrics, key)
            if np.isfinite(values).any():
                mean = _means(metrics, values, rolling_window(len(values)))
                source = source_of(step=column(metrics, "step"), value=mean, run=[label] * len(mean))
                line = chart.line("step", "value", source=source, legend_label=label, **line_style(index))
                chart.add_tools(hover([("run", "@run"), ("step", "@step"), (title, "@value{0.000}")], line))
                if key == "reverse_kl_exact":
                    _held_out(chart, evaluations, index, None)
        if chart.renderers:
            marks = " Marks: held-out prompts, with 95 % error bars." if key == "reverse_kl_exact" else ""
            found.append(Chart(title, f"Mean over a twentieth of each run's steps.{marks}", finished(chart)))
    return found


# ---- Figures from records ------------------------------------------------------------------------------------------


def _divergence(metrics: Records) -> np.ndarray:
    """The exact reverse KL, or the sampled one of a teacher on a server."""
    exact = column(metrics, "reverse_kl_exact")
    exact[[_warm(line) for line in metrics]] = np.nan
    return exact if np.isfinite(exact).any() else column(metrics, "reverse_kl")


def _warm(record: dict[str, Any]) -> bool:
    return record.get("phase") == WARM_START


def warm_steps(metrics: Records) -> int:
    """Steps of the warm start, which are the first."""
    return sum(map(_warm, metrics))


def _means(records: Records, values: np.ndarray, window: int) -> np.ndarray:
    """Rolling means that do not reach over the end of the warm start."""
    parts = np.split(values, [warm_steps(records)])
    return np.concatenate([rolling(part, window)[0] for part in parts if len(part)])


def column(records: Records, key: str) -> np.ndarray:
    """A key's values, NaN where a record has none."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], dtype=float)


def rolling_window(steps: int) -> int:
    """Steps that a rolling figure is made over: a twentieth of the run, at least five."""
    return max(5, steps // 20)


def rolling(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the last `window` values; what is not finite is left out."""
    parts = _windows(values, window)
    known = np.isfinite(parts)
    count = np.maximum(known.sum(1), 1)
    mean = np.where(known, parts, 0).sum(1) / count
    squares = (np.where(known, parts - mean[:, None], 0) ** 2).sum(1)
    return np.where(known.any(1), mean, np.nan), np.sqrt(squares / np.maximum(count - 1, 1))


def fluctuation(values: np.ndarray, window: int) -> np.ndarray:
    """Standard deviation over the last `window` values about their own straight line; NaN until there are as many."""
    parts = _windows(values, window)
    time = np.arange(window) - (window - 1) / 2
    centred = parts - parts.mean(1, keepdims=True)
    slope = centred @ time / (time @ time)
    return np.sqrt(((centred - slope[:, None] * time) ** 2).sum(1) / (window - 2))


def _windows(values: np.ndarray, window: int) -> np.ndarray:
    """[n, window]: each value with those before it, NaN before the first."""
    padded = np.concatenate([np.full(window - 1, np.nan), values])
    return np.lib.stride_tricks.sliding_window_view(padded, window)


# ---- The charts ----------------------------------------------------------------------------------------------------


def _reverse_kl(metrics: Records, evaluations: Records, window: int) -> Chart | None:
    values = _divergence(metrics)
    if not np.isfinite(values).any() and not (warm_steps(metrics) and evaluations):
        return None
    chart = new_figure("nats per token", STEPS)
    mean, deviation = rolling(values, window)
    source = source_of(
        step=column(metrics, "step"),
        value=values,
        mean=mean,
        low=np.maximum(mean - deviation, 0),
        high=mean + deviation,
    )
    band = f"mean ± sd of {window} steps"
    chart.varea("step", "low", "high", source=source, color=COLOURS[0], fill_alpha=0.2, legend_label=band)
    chart.line("step", "value", source=source, color=COLOURS[0], line_alpha=0.35)
    line = chart.line("step", "mean", source=source, legend_label=band, **line_style(0))
    shown = [
        ("step", "@step"),
        ("exact", "@value{0.000}"),
        ("mean", "@mean{0.000}"),
        ("band", "@low{0.00}–@high{0.00}"),
    ]
    chart.add_tools(hover(shown, line))
    _held_out(chart, evaluations, 1, "held-out, 95 %")
    caption = "Exact, at the training rollouts' tokens. Marks: held-out prompts, with 95 % error bars."
    return Chart("Reverse KL", caption, finished(chart))


def _held_out(chart: figure, evaluations: Records, index: int, label: str | None) -> None:
    if not evaluations:
        return
    kl = column(evaluations, "reverse_kl")
    error = 1.96 * np.nan_to_num(column(evaluations, "standard_error"))
    source = source_of(step=column(evaluations, "step"), value=kl, low=kl - error, high=kl + error)
    colour, options = COLOURS[index % len(COLOURS)], {"legend_label": label} if label else {}
    whisker = Whisker(base="step", lower="low", upper="high", source=source, line_color=colour, line_width=2)
    for head in (whisker.lower_head, whisker.upper_head):
        head.size, head.line_color = 8, colour
    chart.add_layout(whisker)
    marks = chart.scatter(
        "step", "value", source=source, size=10, marker=MARKERS[index % len(MARKERS)], color=colour, **options
    )
    shown = [("held-out", "@value{0.000}"), ("95 %", "@low{0.000} to @high{0.000}"), ("step", "@step")]
    chart.add_tools(hover(shown, marks, "mouse"))


def _fluctuation(metrics: Records, window: int) -> Chart | None:
    spread = fluctuation(_divergence(metrics), window)
    records = [{"step": r["step"], "spread": value} for r, value in zip(metrics, spread, strict=True)]
    caption = f"Standard deviation of {window} steps' reverse KL about their own straight line: noise, not trend."
    labels = {"spread": "reverse KL, without its trend"}
    return _lines(records, "Fluctuation", "nats per token", labels, caption, 1)


def _positions(metrics: Records) -> Chart | None:
    series = [record["reverse_kl_by_position"] for record in metrics if record.get("reverse_kl_by_position")]
    if not series:
        return None
    share, chart = max(1, len(series) // 10), new_figure("nats per token", "token of the completion", "log")
    longest = max(map(len, series))
    for index, (label, part) in enumerate((("first steps", series[:share]), ("last steps", series[-share:]))):
        columns = [[row[i] for row in part if i < len(row) and row[i] is not None] for i in range(longest)]
        source = source_of(position=2.0 ** np.arange(longest), value=[np.mean(c) if c else np.nan for c in columns])
        chart.line("position", "value", source=source, legend_label=label, **line_style(index))
        style = {"marker": MARKERS[index], "color": COLOURS[index], "size": 8}
        marks = chart.scatter("position", "value", source=source, legend_label=label, **style)
        chart.add_tools(hover([("from token", "@position"), (label, "@value{0.000}")], marks, "mouse"))
    chart.xaxis.ticker = FixedTicker(ticks=[2**i for i in range(longest)])
    chart.xaxis.major_label_overrides = {2**i: str(2**i) for i in range(longest)}
    tenth = "step" if share == 1 else f"{share} steps"
    caption = f"Mean over the tokens from each mark to the next; the first and the last {tenth} of the run."
    return Chart("Reverse KL by position", caption, finished(chart))


def _noise(metrics: Records, window: int) -> Chart | None:
    window = max(window, 10)  # a ratio of noisy figures: means first
    signal = rolling(column(metrics, "gradient_signal"), window)[0]
    parts = {"within": "within prompts", "between": "between prompts"}
    records = [{"step": record["step"]} for record in metrics]
    for key in parts:
        noise = rolling(column(metrics, f"gradient_noise_{key}"), window)[0]
        ratio = np.divide(noise, signal, out=np.full_like(noise, np.nan), where=signal > 0)
        for record, value in zip(records, ratio, strict=True):
            record[key] = value
    caption = f"Variance of a step's gradient over its squared mean (means of {window} steps); above 1 is mostly noise."
    return _lines(records, "Gradient noise", "variance / signal", parts, caption, 1)


def _lines(
    records: Records, title: str, unit: str, labels: dict[str, str], caption: str, window: int, *, log: bool = False
) -> Chart | None:
    """Each key's values, thin, and their rolling mean, thick; with `window` 1 the values alone."""
    columns = {key: column(records, key) for key in labels}
    columns = {key: values for key, values in columns.items() if np.isfinite(values).any()}
    if not columns:
        return None
    log = log and all((values[np.isfinite(values)] > 0).all() for values in columns.values())
    chart = new_figure(unit.removesuffix(", log scale") + ", log scale" * log, STEPS, y_axis="log" if log else "linear")
    means = {
        f"mean_{key}": _means(records, values, window) if window > 1 else values for key, values in columns.items()
    }
    source = source_of(step=column(records, "step"), **columns, **means)
    shown = [("step", "@step"), *((labels[key], f"@{key}{{0.000}}") for key in columns)]
    for index, key in enumerate(columns):
        if window > 1:
            chart.line("step", key, source=source, color=COLOURS[index % len(COLOURS)], line_alpha=0.35)
        line = chart.line("step", f"mean_{key}", source=source, legend_label=labels[key], **line_style(index))
        if index == 0:
            chart.add_tools(hover(shown, line))
    return Chart(title, caption, finished(chart, from_zero=not log))
