"""The training and the held-out prompts of a run, as the student sees them and as its teachers do."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.config import MAIN, Config, ConfigError
from distill.prompts import PromptSet, left_pad, load_prompts
from distill.run.display import counting
from distill.run.identity import Identity
from distill.run.loading import Pair
from distill.teachers import TeacherPrompts, teacher_prompts


@dataclass(frozen=True)
class Prompts:
    """One prompt set, as the student sees it and as the teachers do where that differs."""

    student: PromptSet
    teacher: TeacherPrompts | None
    path: Path
    """Where they are from."""

    @property
    def remarks(self) -> list[str]:
        """What is to be said of what the teachers see."""
        return [f"{self.path}: {line}" for line in (self.teacher.remarks if self.teacher else ())]

    @property
    def teachers(self) -> list[str]:
        """Who scores each prompt, in words: a name, or those of a mixture with their shares."""
        each = [{name or MAIN: 1} if not isinstance(name, dict) else name for name in self.student.teachers]
        return [", ".join(f"{who} {share:g}" if len(of) > 1 else who for who, share in of.items()) for of in each]

    @cached_property
    def identity(self) -> Identity:
        """What tells these prompts from others, as far as a run's numbers depend on them."""
        student, teacher = self.student, self.teacher
        own = (*student.columns, *(["tools"] if any(student.tools) else []))
        named = ["teacher"] if any(student.teachers) else []
        further = () if teacher is None else tuple(sorted({*teacher.columns} - {*own, "teacher"}))
        columns = student.column_digests([*own, *named, *further])
        return Identity(student.digest, columns, further, student.columns, "" if teacher is None else teacher.digest)


def load_prompt_sets(config: Config, pair: Pair, console: Console) -> tuple[Prompts, Prompts | None]:
    """Training and held-out prompts; what was left out is said. Raises `ConfigError` or `PromptError`."""
    settings = config.prompts

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    def load(path: Path, limit: int | None, key: str, completion: int) -> Prompts:
        longest = settings.max_tokens
        if pair.context is not None:
            if completion >= pair.context:
                raise ConfigError(
                    f"{key}: found {completion}, expected less than the models' context of {pair.context} tokens"
                )
            longest = min(longest, pair.context - completion)
        with counting(console, f"reading the prompts of {path}") as watched:
            prompts = load_prompts(
                path,
                pair.tokenizer,
                column=settings.column,
                limit=limit,
                streaming=settings.streaming,
                chat_template=settings.chat_template,
                chat_template_kwargs=config.student.chat_template_kwargs,
                system_prompt=settings.system_prompt,
                control_tokens=settings.control_tokens,
                max_tokens=longest,
                watched=watched,
            )
        if prompts.empty or prompts.too_long:
            tell(
                f"{path}: {len(prompts)} prompts used; left out: {prompts.empty} empty, "
                f"{prompts.too_long} of more than {longest} tokens"
            )
        if prompts.answered:
            tell(f"{path}: {prompts.answered} conversations ended in an answer, which was left out")
        seen = teacher_prompts(
            prompts,
            pair.teachers,
            longest=None if pair.context is None else pair.context - completion,
            pad_token_id=pair.tokenizer.pad_token_id,
            special=settings.control_tokens == "special",
            templated=settings.chat_template != "never",
            template_arguments=config.student.chat_template_kwargs,
        )
        return Prompts(prompts, seen, path)

    train = load(settings.train, settings.limit, "rollout.max_new_tokens", config.rollout.max_new_tokens)
    if settings.eval is None:
        return train, None
    section = "rollout" if config.evaluation.max_new_tokens is None else "evaluation"
    longest = getattr(config, section).max_new_tokens
    return train, load(settings.eval, settings.eval_limit, f"{section}.max_new_tokens", longest)


def evaluation_arguments(config: Config, prompts: Prompts, pad_token_id: int) -> dict[str, Any]:
    """On what and how `evaluate` looks at a student, as its keyword arguments."""
    settings, student, teacher = config.evaluation, prompts.student, prompts.teacher
    return {
        "prompts": left_pad(student.token_ids, pad_token_id),
        "teacher_view": teacher and teacher.view(range(len(student))),
        "num_rollouts": settings.num_rollouts_per_prompt,
        "max_new_tokens": settings.max_new_tokens or config.rollout.max_new_tokens,
        "seed": settings.seed,
    }
