"""Numbers from numbers: fluctuation about a trend, and intervals over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the next lower entry, which is wider.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
        12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000}  # fmt: skip


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval (None with one seed)."""

    mean: float
    half_width: float | None

    def text(self, pattern: str = "{:.3f}") -> str:
        if not math.isfinite(self.mean):
            return "–"
        half = "" if self.half_width is None else " ± " + pattern.format(self.half_width)
        return pattern.format(self.mean) + half


def interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval of independent values."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return Interval(math.nan, None)
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = T_95[max(df for df in T_95 if df <= n - 1)]
    return Interval(mean, quantile * deviation / math.sqrt(n))


def standard_deviation(values: Sequence[float]) -> float:
    """Of a sample, with n - 1."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def fluctuation(visits: Sequence[Sequence[float]], *, robust: bool = False) -> float:
    """Standard deviation of the noise about a smooth trend of its own for each prompt.

    `visits` holds a series a prompt: its value at each epoch. With z_e = (y_{e-1} + y_{e+1}) / 2 - y_e, the noise's
    variance is E[z^2] / 1.5, whatever level and slope the prompt has (Gasser, Sroka and Jennen-Steinmetz 1986); a
    curved trend adds a quarter of its squared second difference to z^2. `robust` takes the median of |z| instead of
    the root mean square, scaled for a normal distribution, which forgets the few steps where the trend is steepest.
    """
    residuals = [
        (before + after) / 2 - at
        for series in visits
        for before, at, after in zip(series, series[1:], series[2:], strict=False)
    ]
    if not residuals:
        return math.nan
    if robust:
        ordered = sorted(map(abs, residuals))
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return median / 0.6744897501960817 / math.sqrt(1.5)
    return math.sqrt(math.fsum(z * z for z in residuals) / len(residuals) / 1.5)
