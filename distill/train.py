"""`python -m distill.train --config FILE [--section.key VALUE ...]`: the command, and `fit`, the same from Python.

`torchrun` starts it over several ranks.

Exit status: 0 done; 1 too many steps in a row had no finite loss or gradient, or another rank is gone; 2 a
configuration, an input, a machine (disk, memory) or a server that cannot be used, with one message; 130 or 143 after
SIGINT or SIGTERM. After 1, 130 and 143 a checkpoint is saved, unless a rank is gone. A second SIGINT stops at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from distill.config import Config, ConfigError, parse_command_line

if TYPE_CHECKING:
    from distill.run import Summary

LOADING = "loading (the first run also fetches and converts the models)"


class Interrupted(KeyboardInterrupt):
    """A run was ended early, with a checkpoint saved: the same call continues from there."""


class SignalWatch:
    """Remembers the first SIGINT or SIGTERM, from construction to `restore`; a second SIGINT is for `second`.

    Outside the main thread, which alone can have handlers, it hears of nothing.
    """

    def __init__(self, second: Any = signal.SIG_DFL) -> None:
        self.received: signal.Signals | None = None
        self._second, self._before = second, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _remember(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, self._second)
        # Straight to the descriptor: the interrupted code may be in the middle of a print.
        os.write(2, f"\n{self.received.name}: finishing this step, then saving; Ctrl-C stops at once\n".encode())


def fit(config: Config, *, should_stop: Callable[[], bool] = lambda: False) -> "Summary":
    """The run that `config` describes: what the command does, with its files and its progress, from Python.

    Returns what `summary.json` holds. Where the command would exit, it raises: `ConfigError`, `FunctionError`,
    `PromptError`, `ModelError`, `CheckpointError`, `OutputError`, `HubError`, `ServerError`, `MemoryLimitError`,
    `StoppedError`, `RankError`, or `NotImplementedError` for a model that the native rollout engine refuses.
    SIGINT (interrupting the cell of a notebook), SIGTERM, or `should_stop`, which is asked after each step, end it with
    a checkpoint saved and `Interrupted`, a KeyboardInterrupt; the same call continues from there. Handlers are then
    what they were before, and SIGTERM reaches the one that was. Outside the main thread none are set.
    """
    watch = SignalWatch(second=signal.getsignal(signal.SIGINT))
    try:
        console = Console(quiet=os.environ.get("RANK", "0") != "0")
        console.print(LOADING, highlight=False)
        from distill.run import Run, Summary
        from distill.training import Ranks

        def received() -> signal.Signals | None:
            asked = should_stop()
            return watch.received or (signal.SIGINT if asked else None)

        training = config.training
        ranks = Ranks.join(training.device, training.rank_timeout_s, training.parallel)
        run = Run(config, console, received, ranks)
        run.execute()
        summary = None if run.stopped else Summary(**ranks.of_first(run.summary and run.summary.record()))
        ranks.leave()
    finally:
        watch.restore()
        if watch.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
    if summary is not None:
        return summary
    raise Interrupted(f"saved after step {run.progress.step} in {config.training.output_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; a rank of several ends there."""
    status = _status(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _end_now(status)
    return status


def _status(argv: Sequence[str] | None) -> int:
    try:
        config = parse_command_line(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine: the others would say the same
    signals, console = SignalWatch(), Console(quiet=os.environ.get("RANK", "0") != "0")
    console.print(LOADING, highlight=False)
    # Only now what takes seconds to import: help and a wrong key are answered at once.
    from distill.grading import FunctionError
    from distill.models import ModelError
    from distill.prompts import PromptError
    from distill.run import CheckpointError, HubError, OutputError, Run, StoppedError
    from distill.runtime import MemoryLimitError, RankError, is_out_of_memory
    from distill.servers import ServerError
    from distill.training import Ranks

    ranks = Ranks()
    try:
        training = config.training
        ranks = Ranks.join(training.device, training.rank_timeout_s, training.parallel)
        run = Run(config, console, lambda: signals.received, ranks)
        status = run.execute()
        ranks.leave()
        return status
    except StoppedError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except RankError as error:
        return _given_up(error)
    # NotImplementedError: a model that the native rollout engine refuses, with the way out.
    except (
        ConfigError,
        FunctionError,
        PromptError,
        ModelError,
        CheckpointError,
        OutputError,
        HubError,
        ServerError,
        NotImplementedError,
    ) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            known = isinstance(error, MemoryLimitError)
            what = error if known else f"memory ran out: {error}. Take a smaller model"
            if first or ranks.sharded or not known:  # else all ranks say it
                print(f"error: {what}", file=sys.stderr)
            return 2
        try:
            ranks.roll_call()
        except RankError as lost:
            return _given_up(lost)
        raise


def _given_up(error: RuntimeError) -> NoReturn:
    """Ends this process now: what it exchanges with a rank that is gone could not be waited for."""
    print(f"error: {error}", file=sys.stderr)
    _end_now(1)


def _end_now(status: int) -> NoReturn:
    """Without the interpreter's own end, during which a thread of the exchange that lets go of a tensor aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
