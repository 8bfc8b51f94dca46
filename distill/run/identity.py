"""What tells the prompts of a run from others, kept in each checkpoint, and what differs from a checkpoint's.

A column that is used and has changed is named. Columns that nothing uses may change.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Identity(NamedTuple):
    """The prompts of a run, as far as its numbers depend on them."""

    prompts: str
    """SHA-256 of the token ids that the student sees, with the teachers that records name."""
    columns: dict[str, str]
    """SHA-256 of what each column holds that is used, by its name."""
    further: tuple[str, ...]
    """Those of them that `prompts` does not cover."""
    own: tuple[str, ...]
    """Those of them that the student's prompts are from."""
    teacher_prompts: str
    """SHA-256 of the token ids that the teachers see; empty where these are the student's."""

    @property
    def label(self) -> str:
        """The same in one word, as far as the records and what the student sees of them go."""
        further = {name: self.columns[name] for name in self.further}
        told = json.dumps([self.prompts, further], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest() if further else self.prompts

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"prompts": self.prompts, "columns": self.columns, "teacher_prompts": self.teacher_prompts}

    def differences(self, saved: Mapping[str, Any], path: Path) -> list[str]:
        """What is not as in a checkpoint's state, whose prompts were read from `path` too; a line each."""
        others = f"prompts.train: the prompts in {path} are others than before"
        if "columns" not in saved:  # of an older version, which used no further columns
            found = [others] if saved["prompts"] != self.prompts else []
            return found + [
                f"prompts.train: the column {name!r} of {path} is used, and the checkpoint, of an older version, does "
                f"not say what it held"
                for name in self.further
            ]
        before = saved["columns"]
        found = [
            f"prompts.train: the column {name!r} of {path} {self._change(name, before)}"
            for name in sorted({*before, *self.columns})
            if before.get(name) != self.columns.get(name)
        ]
        if not found and saved["prompts"] != self.prompts:
            found = [others]
        if not found and saved.get("teacher_prompts", self.teacher_prompts) != self.teacher_prompts:
            found = [
                f"prompts.train: the prompts in {path} are the same, and what the teachers see of them is something "
                f"else than before: has a tokenizer or a chat template of theirs changed?"
            ]
        return found

    def _change(self, name: str, before: Mapping[str, str]) -> str:
        if name not in self.columns:
            return "was used, and is not any more"
        if name not in before:
            return "is used, and was not before"
        unlike = "holds something else than before"
        return f"{unlike}, or gives other token ids (tokenizer, chat template)" if name in self.own else unlike
