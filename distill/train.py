"""`python -m distill.train --config FILE [--section.key VALUE ...]`: the command.

`torchrun` starts it over several ranks.

Exit status: 0 done; 1 too many steps in a row had no finite loss or gradient, or another rank is gone; 2 a
configuration, an input, a machine (disk, memory) or a server that cannot be used, with one message; 130 or 143 after
SIGINT or SIGTERM. After 1, 130 and 143 a checkpoint is saved, unless a rank is gone. A second SIGINT stops at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

from distill.config import ConfigError, parse_command_line


class SignalWatch:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Straight to the descriptor: the interrupted code may be in the middle of a print.
        os.write(2, f"\n{self.received.name}: finishing this step, then saving; Ctrl-C stops at once\n".encode())


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config = parse_command_line(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine: the others would say the same
    signals, console = SignalWatch(), Console(quiet=os.environ.get("RANK", "0") != "0")
    console.print("loading (the first run also fetches and converts the models)", highlight=False)
    # Only now what takes seconds to import: help and a wrong key are answered at once.
    from distill.models import ModelError
    from distill.prompts import PromptError
    from distill.run import CheckpointError, OutputError, Run, StoppedError
    from distill.runtime import MemoryLimitError, RankError, is_out_of_memory
    from distill.servers import ServerError
    from distill.training import Ranks

    ranks = Ranks()
    try:
        training = config.training
        ranks = Ranks.join(training.device, training.rank_timeout_s, training.parallel)
        run = Run(config, console, lambda: signals.received, ranks)
        if ranks.size > 1:
            console.print(ranks.describe(run.parts.student), highlight=False, soft_wrap=True)
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
        PromptError,
        ModelError,
        CheckpointError,
        OutputError,
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
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
