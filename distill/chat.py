"""`python -m distill.chat RUN`: talk to the student before, the student after and the teacher, side by side.

`python -m distill.chat MODEL` talks to one model: `RUN/final`, or any other model reference. Each model continues its
own conversation. What models write is shown as text, never as markup or as commands to the terminal.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distill.config import Config, ConfigError, load_config
from distill.models import ModelError, load_model, load_tokenizer, named_ids
from distill.prompts import PromptError, tokenise
from distill.teachers import OwnPrompts

COLUMN = 28  # characters that a column needs to be readable; a narrower terminal gets one answer below the other


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.chat",
        description="Talk to a run's student before, after and teacher, or to one model; an empty line ends it.",
    )
    parser.add_argument("model", metavar="RUN|MODEL", help="for example outputs/default, or outputs/default/final")
    parser.add_argument("--max-new-tokens", type=_at_least(int, 1), default=256)
    parser.add_argument("--temperature", type=_at_least(float, 0), default=0.7, help="0: always the likeliest token")
    options = parser.parse_args(argv)
    try:
        run = Path(options.model)
        talk = _three(run, options) if (run / "config.yaml").is_file() else _one(options)
        while line := _read_line():
            talk(line)
    except (ModelError, ConfigError, PromptError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class Speaker:
    """A model and the conversation it has had."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: argparse.Namespace,
        templated: bool = True,
        system: str | None = None,
        template: dict[str, Any] | None = None,
        stops: Sequence[int] = (),
        own: OwnPrompts | None = None,
    ) -> None:
        """`template` are the arguments of its chat template, `stops` the ids that end an answer: absent, its own; `own`
        is what it sees in place of a line.
        """
        self.own = own
        self.model, self.tokenizer, self.options, self.template = model, tokenizer, options, template or {}
        self.ends = {"eos_token_id": list(stops)} if stops else {}
        self.templated = templated and tokenizer.chat_template is not None
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, line: str, streamer: Any = None) -> str:
        """The model's answer to `line`, as text."""
        self.messages.append({"role": "user", "content": line})
        if self.own is not None:
            self.messages = self.own({}, self.messages, line) or self.messages
        ids = tokenise(self.messages, self.tokenizer, self.templated, **self.template)
        prompt = torch.tensor([ids], device=self.model.device)
        sampled = {"do_sample": True, "temperature": self.options.temperature, "top_p": 0.9, "top_k": 0}
        token_ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.options.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer,
            **self.ends,
            **(sampled if self.options.temperature else {"do_sample": False}),
        )
        text = self.tokenizer.decode(token_ids[0, len(ids) :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return text


def _three(run: Path, options: argparse.Namespace) -> Any:
    """What answers a line with all three models of a run."""
    if not (run / "final").is_dir():
        raise ConfigError(
            f"{run}: a run's folder without final/, which is written at the run's end: finish it first with the "
            f"command that began it"
        )
    config = load_config(run / "config.yaml")
    console = Console()
    speakers = _speakers(run, config, options, console)

    def talk(line: str) -> None:
        answers = {}
        for name, speaker in speakers.items():
            with console.status(f"{name} ..."):
                answers[name] = Text(_printable(speaker.answer(line)))
        if console.width < COLUMN * len(answers):
            for name, answer in answers.items():
                console.print(Panel(answer, title=name, title_align="left"))
            return
        table = Table(*answers, expand=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(*answers.values())
        console.print(table)

    return talk


def _speakers(run: Path, config: Config, options: argparse.Namespace, console: Console) -> dict[str, Speaker]:
    """The student before and after, and every teacher that is not on a server, each seeing what it saw in the run."""
    student, prompts = config.student, config.prompts
    own = load_tokenizer(str(run / "final"), trust_remote_code=student.trust_remote_code)
    common = {"templated": prompts.chat_template != "never", "stops": named_ids(config.rollout.stop_ids, own)}
    seen = {"system": prompts.system_prompt, "template": student.chat_template_kwargs}
    dropped = student.drop_layers
    if (run / "layers.json").exists():  # chosen by the run
        dropped = tuple(json.loads((run / "layers.json").read_text(encoding="utf-8"))["dropped"])
    models: dict[tuple, Any] = {}

    def speaker(
        reference: str, trusted: bool, tokenizer: Any, drop_layers: Sequence[int] = (), **of_this: Any
    ) -> Speaker:
        key = reference, tuple(drop_layers)
        if key not in models:
            models[key] = load_model(reference, drop_layers=drop_layers, trust_remote_code=trusted, **_placed())
        return Speaker(models[key], tokenizer, options, **common, **of_this)

    found = {
        "student before": speaker(student.model, student.trust_remote_code, own, dropped, **seen),
        "student after": speaker(str(run / "final"), student.trust_remote_code, own, **seen),
    }
    for name, section in config.teacher.resolved(student).items():
        if section.server:  # it may be too large for this machine
            continue
        who = f"teacher {name}" if name else "teacher"
        reference, trusted, tokenizer = section.model, section.trust_remote_code, own
        # As in the run: a teacher sees what the student sees, unless it has a prompt of its own.
        rewritten = OwnPrompts(section, who) if section.prompt_template else None
        if columns := [column for column in (rewritten.columns if rewritten else ()) if column != "prompt"]:
            console.print(f"{who}: sees what you write, without the records' {', '.join(columns)}", markup=False)
            rewritten = None
        if section.system_prompt or section.chat_template_kwargs or rewritten:
            tokenizer = load_tokenizer(reference, trust_remote_code=trusted)
            if prompts.chat_template not in ("auto", "never"):
                tokenizer.chat_template = own.chat_template
        template = {**seen["template"], **section.chat_template_kwargs}
        system = section.system_prompt or seen["system"]
        found[who] = speaker(reference, trusted, tokenizer, system=system, template=template, own=rewritten)
    return found


def _one(options: argparse.Namespace) -> Any:
    """What answers a line with one model, while it is being made."""
    tokenizer = load_tokenizer(options.model)
    speaker = Speaker(load_model(options.model, **_placed()), tokenizer, options)
    return lambda line: speaker.answer(line, _Printer(tokenizer))


class _Printer:
    """Prints a completion while `generate` makes it; only whole words, so that no character is cut in two."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.token_ids, self.printed, self.prompt_seen = tokenizer, [], 0, False

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def put(self, token_ids: torch.Tensor) -> None:
        if not self.prompt_seen:  # the first call brings the prompt
            self.prompt_seen = True
            return
        self.token_ids += token_ids.flatten().tolist()
        self._print(self.text.rfind(" ") + 1)

    def end(self) -> None:
        self._print(len(self.text))
        print()

    def _print(self, end: int) -> None:
        print(_printable(self.text[self.printed : end]), end="", flush=True)
        self.printed = max(self.printed, end)


def _printable(text: str) -> str:
    """Without the control characters by which text could command a terminal."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)


def _placed() -> dict[str, Any]:
    return {"device": "cuda", "dtype": torch.bfloat16} if torch.cuda.is_available() else {}


def _at_least(kind: type, least: float) -> Any:
    def parse(word: str) -> Any:
        value = kind(word)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected {least} or more, found {word}")
        return value

    return parse


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
