"""The training and the held-out prompts of a run, as the student sees them and as its teachers do."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.config import MAIN, Config, ConfigError
from distill.models import eos_ids, named_ids
from distill.prompts import AnswerOptions, PromptError, PromptSet, left_pad, load_prompts
from distill.run.display import counting
from distill.run.identity import Identity
from distill.run.loading import Pair
from distill.teachers import TeacherPrompts, teacher_prompts

SAMPLER = ("temperature", "top_p", "top_k", "min_p")  # keys of a held-out set that say how completions are drawn


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


def load_prompt_sets(
    config: Config, pair: Pair, console: Console
) -> tuple[Prompts, Prompts | None, dict[str, Prompts]]:
    """Training and held-out prompts, and those of `evaluation.sets` by name; what was left out is said.

    Raises `ConfigError` or `PromptError`.
    """
    settings = config.prompts
    answers = None if settings.answers else _wanted_answers(config, pair)
    train = _load(config, pair, console, settings.train, settings.limit, *_of_rollouts(config), answers=answers)
    if settings.eval is None:
        return train, None, {}
    held_out = _load(config, pair, console, settings.eval, settings.eval_limit, *_longest(config))
    sets = {
        name: _load(config, pair, console, own.prompts, own.limit, *_longest(config, name))
        for name, own in config.evaluation.sets.items()
    }
    return train, held_out, sets


def load_answers(config: Config, pair: Pair, console: Console, train: Prompts) -> Prompts | None:
    """The prompts with written answers, which are among the training prompts or in a file of their own; None where none
    are wanted. Raises `ConfigError` or `PromptError`."""
    wanted, path = _wanted_answers(config, pair), config.prompts.answers
    if wanted is None:
        return None
    limit = config.prompts.answers_limit
    found = train if path is None else _load(config, pair, console, path, limit, *_of_rollouts(config), answers=wanted)
    if not any(found.student.answers):
        where = f"prompts.{'train' if path is None else 'answers'}"
        column = f"the column {wanted.column!r}" if wanted.column else "a column `completion`"
        raise PromptError(
            f"{where}: none of the records in {found.path} has an answer, and training.warm_start and "
            f"training.off_policy_fraction train on those: they are text in {column}"
            f"{'' if wanted.column else ', or the last turn of a conversation'}"
        )
    return found


def _wanted_answers(config: Config, pair: Pair) -> AnswerOptions | None:
    training, tokenizer = config.training, pair.tokenizer
    if not (training.warm_start or training.off_policy_fraction):
        return None
    ends = named_ids(config.rollout.stop_ids, tokenizer) or eos_ids(pair.student, tokenizer)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends)
    return AnswerOptions(config.prompts.answer_column, frozenset(ends), end, config.rollout.max_new_tokens)


def _of_rollouts(config: Config) -> tuple[str, int]:
    """The key that says how long a rollout may be, and what it says."""
    return "rollout.max_new_tokens", config.rollout.max_new_tokens


def _longest(config: Config, name: str | None = None) -> tuple[str, int]:
    """The key that says how long a completion of an evaluation, or of one of its sets, may be, and what it says."""
    sections = {"evaluation": config.evaluation, "rollout": config.rollout}
    if name is not None:
        sections = {f"evaluation.sets.{name}": config.evaluation.sets[name]} | sections
    key, section = next((key, section) for key, section in sections.items() if section.max_new_tokens is not None)
    return f"{key}.max_new_tokens", section.max_new_tokens


def _load(
    config: Config,
    pair: Pair,
    console: Console,
    path: Path,
    limit: int | None,
    key: str,
    completion: int,
    answers: AnswerOptions | None = None,
) -> Prompts:
    """The prompts of a file, with room for completions that are as long as `key` says, and `answers` where these are
    wanted."""
    settings, longest = config.prompts, config.prompts.max_tokens

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

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
            answers=answers,
            watched=watched,
        )
    for line in _remarks(path, prompts, longest):
        tell(line)
    if not pair.teachers:  # nobody scores what is only judged
        return Prompts(prompts, None, path)
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


def _remarks(path: Path, prompts: PromptSet, longest: int) -> Iterator[str]:
    """What is to be said of the prompts of a file."""
    if prompts.empty or prompts.too_long:
        yield (
            f"{path}: {len(prompts)} prompts used; left out: {prompts.empty} empty, "
            f"{prompts.too_long} of more than {longest} tokens"
        )
    if prompts.answered and not prompts.answers:
        yield f"{path}: {prompts.answered} conversations ended in an answer, which was left out"
    found = [answer for answer in prompts.answers if answer]
    if found:
        cut = sum(not answer.finished for answer in found)
        longer = f"; {cut} of them are longer than a completion (rollout.max_new_tokens), and cut" if cut else ""
        yield f"{path}: {len(found)} of {len(prompts)} prompts have an answer{longer}"
    if prompts.answers_apart:
        yield (
            f"{path}: the chat template writes {prompts.answers_apart} answers otherwise than right after the prompt, "
            f"where they are put as they are"
        )


def evaluation_arguments(
    config: Config, prompts: Prompts, pad_token_id: int, name: str | None = None
) -> dict[str, Any]:
    """On what and how `evaluate` looks at a student, as its keyword arguments; `name` is that of a further set."""
    settings, student, teacher = config.evaluation, prompts.student, prompts.teacher
    own = None if name is None else settings.sets[name]
    sampler = {key: getattr(own, key) for key in SAMPLER if getattr(own, key) is not None} if own else {}
    return {
        "prompts": left_pad(student.token_ids, pad_token_id),
        "teacher_view": teacher and teacher.view(range(len(student))),
        "num_rollouts": (own and own.num_rollouts_per_prompt) or settings.num_rollouts_per_prompt,
        "max_new_tokens": _longest(config, name)[1],
        "seed": settings.seed,
        **({"sampler": sampler} if sampler else {}),
    }
