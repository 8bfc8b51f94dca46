"""How the cost of a step and of the fused head grows: fitted exponents of time and memory, tables and plots.

One number is raised at a time. A step is rollout, scoring and update of a tiny random Llama (8 layers, hidden 256,
V 8,192), teacher and student alike; the head is loss and gradients of `linear_distill_loss`. The exponent is the slope
of a straight line through the logarithms: 1 is growth in proportion, 0 none. About two minutes on two CPU cores:
`pytest benchmarks/test_growth.py --results FILE` writes the JSON and draws `growth.png` in FILE's folder; with
`--tables`, and FILE in `benchmarks/results/MACHINE/`, the tables of docs/performance.md are renewed too.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Row, Timing, growth, peak_memory
from benchmarks.kernel_candidates import linear_ours, make_head
from benchmarks.test_rollout import model_of
from benchmarks.test_step import our_steps

CPU = torch.device("cpu")
# What is raised, what stays: prompt tokens P, completion tokens T, rollouts N.
STEP = {
    "N": ((1, 4, 16, 64), {"P": 512, "T": 32}),
    "P": ((32, 128, 512, 2048), {"T": 32, "N": 4}),
    "T": ((32, 128, 512), {"P": 128, "N": 4}),
}
HEAD = {"K": ((256, 1024, 4096, 16_384), {"V": 8192, "H": 256}), "V": ((8192, 32_768, 151_936), {"K": 256, "H": 256})}
ASKED = {"N": (0.8, 0.6)}  # time and memory of a step

Curves = dict[str, list[Row]]  # by group, a row a size


@pytest.fixture(scope="module")
def curves(request: pytest.FixtureRequest) -> Iterator[Curves]:
    """Collects what the tests measure, and draws it at the end."""
    collected: Curves = {}
    yield collected
    if path := request.config.getoption("--results"):
        plot(collected, Path(path).parent / "growth.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a measurement of the CPU path")
@pytest.mark.parametrize("letter", STEP)
def test_step(letter: str, record, curves) -> None:
    of_time, of_memory = grow("a step", letter, STEP, step_of, record, curves)
    most_time, most_memory = ASKED.get(letter, (math.inf, math.inf))
    assert of_time < most_time
    assert of_memory < most_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="a measurement of the CPU path")
@pytest.mark.parametrize("letter", HEAD)
def test_head(letter: str, record, curves) -> None:
    grow("the fused head", letter, HEAD, head_of, record, curves)


def step_of(P: int, T: int, N: int) -> Callable[[], object]:
    model = model_of("tiny")
    student, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    token_ids = torch.randint(5, model.config.vocab_size, (P,)).tolist()
    return partial(next, our_steps(student, teacher, token_ids, T, N, torch.float32, generation="float32"))


def head_of(K: int, V: int, H: int) -> Callable[[], object]:
    return linear_ours(make_head(K, V, H, H, CPU, torch.float32), "reverse_kl")


def measure(
    values: Sequence[int], call_of: Callable[[int], Callable[[], object]], rounds: int = 2
) -> list[tuple[int, Timing, int]]:
    """Times all sizes in turn, round by round, after a round that warms up; then their memory, untimed."""
    calls = {value: call_of(value) for value in values}
    samples = {value: [] for value in values}
    for index in range(rounds + 1):
        for value, call in calls.items():
            start = time.perf_counter()
            call()
            if index:
                samples[value].append(time.perf_counter() - start)
    peaks = {value: peak_memory(call) for value, call in calls.items()}
    return [(value, Timing(tuple(samples[value])), peaks[value]) for value in values]


def grow(what: str, letter: str, sizes: Mapping, call_of: Callable, record: Callable, curves: Curves) -> tuple:
    """Measures and records how `what` grows with a letter; returns its exponents of time and memory."""
    values, fixed = sizes[letter]
    group = f"growth of {what} with {letter}, {', '.join(f'{k} = {v}' for k, v in fixed.items())}"
    curves[group] = [
        Row(group, f"{letter} = {value}", timing.median, timing.spread, peak_bytes=peak)
        for value, timing, peak in measure(values, lambda value: call_of(**fixed | {letter: value}))
    ]
    for row in curves[group]:
        record(row)
    exponents = growth(curves[group])
    print("{0}: time ~ {1}^{2:.2f}, memory ~ {1}^{3:.2f}".format(group, letter, *exponents))
    return exponents


def plot(curves: Curves, path: Path) -> None:
    """Seconds above and memory below, a column for each letter, logarithmic, with the fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 6), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (group, rows) in enumerate(curves.items()):
        letter = rows[0].name.split(" = ")[0]
        sizes = [int(row.name.split(" = ")[1]) for row in rows]
        measured = [row.seconds for row in rows], [max(1, row.peak_bytes) / 2**20 for row in rows]
        for panel, values, power, unit in zip(
            axes[:, column], measured, growth(rows), ("seconds", "peak MiB"), strict=True
        ):
            centre = [math.exp(sum(map(math.log, each)) / len(each)) for each in (sizes, values)]
            panel.loglog(sizes, values, "o-")
            panel.loglog(sizes, [centre[1] * (size / centre[0]) ** power for size in sizes], "--", color="grey")
            panel.set(xlabel=letter, ylabel=unit)
            panel.set_xticks(sizes, labels=[str(size) for size in sizes])
            panel.xaxis.minorticks_off()
            panel.set_title(f"~ {letter}^{power:.2f}", fontsize="small")
            panel.grid(alpha=0.3)
        what, _, fixed = group.removeprefix("growth of ").partition(f" with {letter}, ")
        axes[0, column].set_title(f"{what}, {fixed}\n{axes[0, column].get_title()}", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
