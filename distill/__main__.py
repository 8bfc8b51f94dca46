"""`distill COMMAND ...`, also `python -m distill COMMAND ...`: the commands of this package by their names."""

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("distill.train", "train a student: --config FILE [--section.key VALUE ...]"),
    "chat": ("distill.chat", "talk to the student before, the student after and the teacher of a run"),
    "evaluate": ("distill.evaluate", "compare any two models of one vocabulary"),
    "report": ("distill.report.__main__", "write a run's report anew, or compare runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the words after the first on to the command that it names; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: distill COMMAND ...; `distill COMMAND --help` says more\n")
        print("\n".join(f"  {name:9} {about}" for name, (_, about) in COMMANDS.items()))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"distill: there is no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
