"""How the cost of a step and of the fused head grows: fitted exponents of time and memory, and a plot.

One number is raised at a time. A step is rollout, scoring and update of a tiny random Llama (8 layers, hidden 256,
V 8,192), teacher and student alike; the head is loss and gradients of `linear_distill_loss`. The exponent is the slope
of a straight line through the logarithms: 1 is growth in proportion, 0 none. A line for each: `pytest
benchmarks/test_growth.py --results FILE`; with --results, FILE's folder gets `growth.png` too.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Row, Timing, peak_memory
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

Curve = list[tuple[int, Timing, int]]


@pytest.fixture(scope="module")
def curves(request: pytest.FixtureRequest) -> Iterator[dict[str, Curve]]:
    """Collects what the tests measure, and draws it at the end."""
    collected: dict[str, Curve] = {}
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


def measure(values: Sequence[int], call_of: Callable[[int], Callable[[], object]], rounds: int = 3) -> Curve:
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


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log y over log x by least squares."""
    x, y = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*points, strict=True))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def grow(what: str, letter: str, sizes: dict, call_of: Callable, record, curves: dict[str, Curve]) -> tuple:
    """Measures and records how `what` grows with a letter; returns its exponents of time and memory."""
    values, fixed = sizes[letter]
    curve = measure(values, lambda value: call_of(**fixed | {letter: value}))
    group = f"growth of {what} with {letter}, {', '.join(f'{k} = {v}' for k, v in fixed.items())}"
    of_time = exponent([(value, timing.median) for value, timing, _ in curve])
    of_memory = exponent([(value, max(1, peak)) for value, _, peak in curve])
    label = f"{group}: time ~ {letter}^{of_time:.2f}, memory ~ {letter}^{of_memory:.2f}"
    curves[label] = curve
    for value, timing, peak in curve:
        record(Row(group, f"{letter} = {value}", timing.median, timing.spread, peak_bytes=peak))
    print(label)
    return of_time, of_memory


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Seconds over what was raised, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.loglog([value for value, *_ in curve], [timing.median for _, timing, _ in curve], "o-", label=label)
    axes.set(xlabel="size", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
