"""What the user sees while a run goes on: a live panel in a terminal, plain lines anywhere else."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PATIENCE = 3.0  # seconds that may pass without a word
Item = TypeVar("Item")


@contextlib.contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[Iterator[Item]], Iterator[Item]]]:
    """Gives what hands items on and, once that takes longer than PATIENCE, shows how many there have been.

    A bar in a terminal, which nothing is left of, and one line anywhere else.
    """
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}"), console=console)
    bar.live.transient = True

    def watched(items: Iterator[Item]) -> Iterator[Item]:
        began, task = time.monotonic(), None
        for count, item in enumerate(items):
            if task is None and time.monotonic() - began > PATIENCE:
                task = bar.add_task(escape(what), total=None)
                if console.is_terminal:
                    bar.start()
                else:
                    console.print(f"{what} ({count:,} so far)", highlight=False, soft_wrap=True, markup=False)
            elif task is not None:
                bar.update(task, completed=count)
            yield item

    try:
        yield watched
    finally:
        bar.stop()


class Display:
    """Shows phase, reverse KL and its trend, tokens per second, time left and a sample completion."""

    def __init__(self, total_steps: int, first_step: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total, self.step = total_steps, first_step
        self._phase, self._metrics, self._sample = "starting", {}, ""
        self._name, self._history = "", deque[float](maxlen=16)  # what a trend is made of
        self._seconds, self._shown = 0.0, 0
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def phase(self, name: str) -> None:
        """Says what is being done now."""
        self._phase = name

    def message(self, text: str) -> None:
        """Prints a lasting line."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def update(self, metrics: dict[str, Any], sample: str) -> None:
        """Shows a finished optimizer step."""
        self.step, self._metrics, self._sample = metrics["step"], metrics, " ".join(sample.split())
        name, self._figure = _main_figure(metrics)
        if name != self._name:
            self._name = name
            self._history.clear()
        if math.isfinite(self._figure):
            self._history.append(self._figure)
        self._seconds += sum(value for key, value in metrics.items() if key.startswith("seconds_"))
        self._shown += 1
        if not self.console.is_terminal:
            self.message(f"step {self.step:>{len(str(self.total))}}/{self.total}  {self._figures()}")

    def _figures(self) -> str:
        norm, speed = (self._metrics[key] for key in ("grad_norm", "tokens_per_second"))
        change = trend(list(self._history))
        shown = "" if change is None else f" (trend {change:+.3f})"
        reward = f"reward {self._metrics['reward']:.2f}  " if "reward" in self._metrics else ""
        return (
            f"{self._name} {self._figure:.3f}{shown}  {reward}gradient {norm:.2f}  "
            f"{speed:.0f} tokens/s  {self._time_left()} left"
        )

    def _time_left(self) -> str:
        seconds = self._seconds / self._shown * (self.total - self.step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _render(self) -> Panel:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            f"step {self.step}/{self.total}", ProgressBar(total=self.total, completed=self.step), f"[cyan]{self._phase}"
        )
        lines = [head]
        if self._metrics:
            lines += [
                Text(self._figures()),
                Text(f"“{self._sample}”", style="italic", overflow="ellipsis", no_wrap=False),
            ]
        return Panel(Group(*lines), title="on-policy distillation", border_style="blue")


def _main_figure(metrics: dict[str, Any]) -> tuple[str, float]:
    """What a step is told by, and what that is."""
    if "cross_entropy" in metrics:  # of answers: what is learned from them, whatever a teacher says
        return "cross entropy", metrics["cross_entropy"]
    # The exact figure where there is one: the sampled one is too noisy for a trend to be seen.
    exact = metrics["reverse_kl_exact"]
    return "reverse KL", exact if math.isfinite(exact) else metrics["reverse_kl"]


def closing_table(console: Console, rows: list[tuple[str, ...]], *columns: str) -> None:
    """The table of before and after, or of these columns."""
    table = Table("", *(columns or ("before", "after")), title="On-policy distillation", title_justify="left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def trend(values: list[float], window: int = 8) -> float | None:
    """Mean of the last `window` values less the mean of the `window` before them; None until there are as many."""
    if len(values) < 2 * window:
        return None
    return (sum(values[-window:]) - sum(values[-2 * window : -window])) / window
