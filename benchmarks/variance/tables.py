"""Tables, CSV and plots of the study, all from the records that its parts give."""

import csv
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.variance.figures import Interval, interval
from distill.config import ConfigError

Record = dict[str, Any]

# The recipe's own claims, of one sampled run each: standard deviation of the step's KL at one rollout, KL before and
# after 20 epochs of 10 prompts, and how much less it fluctuates with more rollouts.
RECIPE = {1: "sd 0.0865, KL 0.3588 → 0.0489 (−86.4 %)", 4: "−50 to −60 %", 8: "−60 to −70 %", 32: "−70 to −80 %"}


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """One row a record; columns are those of the first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(records)


def fill_page(page: Path, part: str, output: Path, plots: dict[str, str]) -> None:
    """Puts a part's tables and plots (file names without suffix, with what they show) between its markers of a page.

    The plots are copied into a folder beside the page. Raises ConfigError where the markers are missing.
    """
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in text or end not in text:
        raise ConfigError(f"{page}: has no section between {begin.strip()!r} and {end!r}")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    content = [(output / f"{part}.md").read_text(encoding="utf-8")]
    for name, shown in plots.items():
        shutil.copyfile(output / f"{name}.png", folder / f"{name}.png")
        content.append(f"![{shown}]({folder.name}/{name}.png)\n")
    before, rest = text.split(begin)
    page.write_text(before + begin + "\n" + "\n".join(content) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def training_tables(records: Sequence[Record], targets: Sequence[float]) -> str:
    """The recipe's table beside the measured one, what each setting ends at, and the compute to reach a held-out KL."""
    seeds = sorted({record["seed"] for record in records})
    beside = ["estimator", "N", "recipe", *("raw sd", "change"), *("de-trended", "change"), *("second half", "change")]
    beside += ["exact KL, de-trended", "change"]
    outcome = ["estimator", "N", "runs", "training KL, first → last epoch", "change", "held-out KL", "tokens"]
    compute = ["held-out KL", "estimator", "N", "reached", "steps", "tokens", "seconds"]
    reached = sorted((_compute(t, *cell) for cell in _cells(records) for t in targets), key=lambda r: -float(r[0]))
    return "\n".join(
        [
            f"Means over {len(seeds)} seeds with 95 % t-intervals; KL in nats per token.\n",
            markdown(beside, (_beside(records, *cell) for cell in _cells(records))),
            markdown([*outcome, "seconds"], (_outcome(*cell) for cell in _cells(records))),
            markdown(compute, reached),
        ]
    )


def _beside(records: Sequence[Record], estimator: str, n: int, cell: list[Record]) -> list[str]:
    """A row of the recipe's table; changes are against one rollout with the same seed."""
    one = {r["seed"]: r for r in records if (r["estimator"], r["num_rollouts"]) == (estimator, 1)}
    row = [estimator, str(n), RECIPE.get(n, "") if estimator == "sampled_reverse_kl" else ""]
    for key in (
        "reverse_kl_sd",
        "reverse_kl_fluctuation",
        "reverse_kl_fluctuation_late",
        "reverse_kl_exact_fluctuation",
    ):
        changes = [record[key] / one[record["seed"]][key] - 1 for record in cell if record["seed"] in one]
        row += [_over(cell, key).text(), _percent(interval(changes)) if n > 1 else "0"]
    return row


def _outcome(estimator: str, n: int, cell: list[Record]) -> list[str]:
    reduction = interval([-record["reverse_kl_exact_reduction"] for record in cell])
    start, end = _over(cell, "reverse_kl_exact_start"), _over(cell, "reverse_kl_exact_end")
    figures = [f"{start.mean:.3f} → {end.text()}", _percent(reduction), _over(cell, "eval_after").text()]
    costs = [_over(cell, key).text("{:,.0f}") for key in ("tokens", "seconds")]
    return [estimator, str(n), str(len(cell)), *figures, *costs]


def _compute(target: float, estimator: str, n: int, cell: list[Record]) -> list[str]:
    hits = sum(math.isfinite(record[f"steps_to_{target:g}"]) for record in cell)
    costs = [_over(cell, f"{name}_to_{target:g}").text("{:,.0f}") for name in ("steps", "tokens", "seconds")]
    return [f"{target:g}", estimator, str(n), f"{hits}/{len(cell)}", *costs]


def _over(cell: Sequence[Record], key: str) -> Interval:
    return interval([record[key] for record in cell])


def plot_training(folder: Path, records: Sequence[Record], curves: Callable[[Record], list[tuple[int, float]]]) -> None:
    """`fluctuation.png` and `held_out.png`."""
    draw_by_n(
        folder / "fluctuation.png",
        records,
        [
            ("reverse_kl_fluctuation", "sampled KL of a step"),
            ("reverse_kl_exact_fluctuation", "exact KL of a step"),
        ],
        "de-trended standard deviation, nats/token",
    )
    estimators = list(dict.fromkeys(record["estimator"] for record in records))
    figure = Figure(figsize=(5.5 * len(estimators), 4), layout="constrained")
    for axes, estimator in zip(_row(figure, len(estimators)), estimators, strict=True):
        for name, n, cell in _cells(records):
            if name != estimator:
                continue
            series = [curves(record) for record in cell]
            tokens = [sum(c[i][0] for c in series) / len(series) for i in range(len(series[0]))]
            levels = [interval([c[i][1] for c in series]) for i in range(len(series[0]))]
            axes.errorbar(
                tokens, [x.mean for x in levels], [x.half_width or 0 for x in levels], label=f"N = {n}", capsize=2
            )
        axes.set(title=estimator, xlabel="sampled tokens", ylabel="held-out reverse KL, nats/token", xscale="symlog")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(folder / "held_out.png", dpi=150)


def fixed_tables(records: Sequence[Record], sketch_error: float, four_to_most: dict[str, float] | None) -> str:
    """Noise at a fixed policy by estimator and N; `four_to_most` compares the variances of `reverse_kl` with 4 rollouts
    and of the sampled estimator with the most."""
    ns = sorted({record["num_rollouts"] for record in records})
    parts = [
        f"{records[0]['prompts']} prompts; 95 % jackknife intervals over prompts. A sketch's squared norm is off by "
        f"{100 * sketch_error:.2f} % (root mean square) from the full gradient's.\n"
    ]
    if four_to_most:
        parts.append(
            f"With `reverse_kl`, N = 4, the gradient's variance is {_ranged(four_to_most, '', '{:.3g}')} times that of "
            f"`sampled_reverse_kl` with N = {ns[-1]}.\n"
        )
    for title, key, pattern in (
        ("gradient's relative variance, E‖g − ḡ‖² / ‖ḡ‖²", "relative_variance", "{:.3g}"),
        ("the same of a shift of the last hidden states, as in `metrics.jsonl`", "shift_relative_variance", "{:.3g}"),
        ("cosine to the large-sample gradient", "cosine", "{:.3f}"),
        ("standard deviation of the group's sampled KL, nats per token", "kl_sd", "{:.3f}"),
        ("standard deviation of the group's exact KL, nats per token", "kl_exact_sd", "{:.3f}"),
    ):
        rows = []
        names = list(dict.fromkeys(record["estimator"] for record in records))
        for name in names[:1] if key.startswith("kl") else names:  # rollouts are the same for every estimator
            by_n = {record["num_rollouts"]: record for record in records if record["estimator"] == name}
            # Against an expected gradient that the pool is too small to tell from 0, there is no figure.
            shown = (_ranged(by_n[n], key, pattern) if n in by_n and by_n[n][key] > 0 else "–" for n in ns)
            rows.append(["all" if key.startswith("kl") else name, *shown])
        parts.append(markdown([title, *(f"N = {n}" for n in ns)], rows))
    return "\n".join(parts)


def split_tables(records: Sequence[Record]) -> str:
    """Within-prompt, between-prompt and total variance by layout, over the squared norm of the expected gradient."""
    rows = [
        [r["estimator"], f"{r['prompts_per_step']} x {r['num_rollouts']}"]
        + [_ranged(r, part, "{:.3g}") for part in ("within", "between", "total")]
        for r in records
    ]
    return markdown(["estimator", "prompts x rollouts", "within prompts", "between prompts", "total"], rows)


def single_tables(records: Sequence[Record]) -> str:
    """One prompt, over seeds: what each number of rollouts and steps ends at, and the KL at equal completions."""
    rows = []
    for (n, steps), cell in _settings(records).items():
        change = interval([record["eval_after"] / record["eval_before"] - 1 for record in cell])
        figures = [f"{_over(cell, 'eval_before').mean:.3f} → {_over(cell, 'eval_after').text()}", _percent(change)]
        costs = [_over(cell, key).text("{:,.0f}") for key in ("tokens", "seconds")]
        spread = _over(cell, "reverse_kl_fluctuation").text()
        rows.append([str(n), str(steps), f"{n * steps:,}", str(len(cell)), *figures, spread, *costs])
    header = ("N", "steps", "completions", "runs", "KL, new completions", "change", "de-trended sd of a step's KL")
    ends = markdown([*header, "tokens", "seconds"], rows)
    # Where more than one setting was evaluated.
    seen = [count for cell in _settings(records).values() for count in cell[0]["curve"]]
    counts = sorted({count for count in seen if count and seen.count(count) > 1})
    rows = [
        [str(n), str(steps)]
        + [interval([r["curve"][c] for r in cell]).text("{:.3f}") if c in cell[0]["curve"] else "–" for c in counts]
        for (n, steps), cell in _settings(records).items()
    ]
    return ends + "\n" + markdown(["N", "steps", *(f"KL after {count:,} completions" for count in counts)], rows)


def plot_single(path: Path, records: Sequence[Record]) -> None:
    """KL on new completions of the one prompt against completions, a line a setting: the mean over seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    (axes,) = _row(figure, 1)
    for (n, steps), cell in _settings(records).items():
        counts = list(cell[0]["curve"])
        means = [sum(r["curve"][count] for r in cell) / len(cell) for count in counts]
        axes.plot(counts, means, marker="o", label=f"N = {n}, {steps} steps")
    axes.set(xlabel="completions", ylabel="exact reverse KL, nats per token", xscale="symlog")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _settings(records: Sequence[Record]) -> dict[tuple[int, int], list[Record]]:
    """Records by number of rollouts and steps."""
    groups: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["num_rollouts"], record["steps"]), []).append(record)
    return groups


def _ranged(record: Record, key: str, pattern: str) -> str:
    """A figure and its interval."""
    text = pattern.format(record[key])
    if math.isfinite(record[f"{key}_low"]):
        text += f" ({pattern.format(record[f'{key}_low'])} to {pattern.format(record[f'{key}_high'])})"
    return text


def plot_fixed(path: Path, records: Sequence[Record]) -> None:
    """Relative variance and cosine against N."""
    figure = Figure(figsize=(12.5, 4), layout="constrained")
    panels = (("relative_variance", "relative variance of the gradient"), ("cosine", "cosine to the expected gradient"))
    for axes, (key, title) in zip(_row(figure, 2), panels, strict=True):
        for name in dict.fromkeys(record["estimator"] for record in records):
            cells = [r for r in records if r["estimator"] == name]
            errors = [[r[key] - r[f"{key}_low"] for r in cells], [r[f"{key}_high"] - r[key] for r in cells]]
            axes.errorbar(
                [r["num_rollouts"] for r in cells], [r[key] for r in cells], errors, marker="o", capsize=3, label=name
            )
        ns = sorted({record["num_rollouts"] for record in records})
        axes.set(title=title, xlabel="rollouts per prompt (N)", xscale="log")
        axes.set_yscale("log" if key == "relative_variance" else "linear")
        axes.set_xticks(ns, [str(n) for n in ns])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def plot_split(path: Path, records: Sequence[Record]) -> None:
    """Stacked bars: within-prompt and between-prompt variance by layout, a panel an estimator."""
    names = list(dict.fromkeys(record["estimator"] for record in records))
    figure = Figure(figsize=(4 * len(names), 4), layout="constrained")
    for axes, name in zip(_row(figure, len(names)), names, strict=True):
        cells = [r for r in records if r["estimator"] == name]
        labels = [f"{r['prompts_per_step']} x {r['num_rollouts']}" for r in cells]
        within, between = ([max(0.0, r[part]) for r in cells] for part in ("within", "between"))
        axes.bar(labels, within, label="within prompts")
        axes.bar(labels, between, bottom=within, label="between prompts")
        axes.set(title=name, xlabel="prompts x rollouts", ylabel="variance / squared expected gradient")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_by_n(path: Path, records: Sequence[Record], panels: Sequence[tuple[str, str]], label: str) -> None:
    """A panel a key: the key's mean and interval against N, a line an estimator, and the slope of independent draws."""
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (key, title) in zip(_row(figure, len(panels)), panels, strict=True):
        for estimator in dict.fromkeys(record["estimator"] for record in records):
            found = [(n, interval([r[key] for r in cell])) for name, n, cell in _cells(records) if name == estimator]
            found = sorted((n, x) for n, x in found if math.isfinite(x.mean))
            if found:
                ns, levels = zip(*found, strict=True)
                axes.errorbar(
                    ns, [x.mean for x in levels], [x.half_width or 0 for x in levels],
                    marker="o", capsize=3, label=estimator,
                )  # fmt: skip
        _scale_n(axes, sorted({record["num_rollouts"] for record in records}))
        axes.set(title=title, ylabel=label)
    figure.savefig(path, dpi=150)


def _scale_n(axes: Axes, ns: Sequence[int]) -> None:
    top = max((line.get_ydata()[0] for line in axes.lines), default=1.0)
    axes.plot(ns, [top * (ns[0] / n) ** 0.5 for n in ns], color="grey", linestyle=":", label="1/√N")
    axes.set(xlabel="rollouts per prompt (N)", xscale="log", yscale="log")
    axes.set_xticks(ns, [str(n) for n in ns], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _cells(records: Sequence[Record]) -> list[tuple[str, int, list[Record]]]:
    """Records of each estimator and N, estimators in order of appearance, N ascending."""
    order = list(dict.fromkeys(record["estimator"] for record in records))
    keys = sorted({(order.index(r["estimator"]), r["num_rollouts"]) for r in records})
    return [
        (order[e], n, [r for r in records if (r["estimator"], r["num_rollouts"]) == (order[e], n)]) for e, n in keys
    ]


def _percent(value: Interval) -> str:
    scaled = Interval(100 * value.mean, None if value.half_width is None else 100 * value.half_width)
    text = scaled.text("{:+.0f}").replace("± +", "± ").replace("-", "−")
    return text if text == "–" else f"{text} %"
