"""Where the student still disagrees: both models' probabilities at every token of a few held-out completions.

For looking at: the first MAX_TOKENS of a few completions, a line of `tokens.jsonl` an evaluation. The figures of an
evaluation are made from all its tokens, in evaluation.py.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.loss import Group, HeadPair, ModelParts

MAX_TOKENS = 128  # of a completion that are kept
TOP = 3  # likeliest tokens of each model
CONTEXT = 4  # tokens before one that its text is decoded with
CHUNK = 32  # tokens whose logits exist at a time


@torch.no_grad()
def token_view(
    tokenizer: Any,
    student: ModelParts,
    teachers: Sequence[ModelParts],
    group: Group,
    prompts: Sequence[str],
    vocab_size: int,
) -> list[dict[str, Any]]:
    """The first rollout of each of a group's first prompts, whose texts are `prompts`, as one record each.

    Beside the `prompt` it has lists over the tokens: `text`, `student_logprob`, `teacher_logprob`, `reverse_kl` (nats),
    and `student_top` and `teacher_top`, the likeliest [text, log-probability] at each.
    """
    short = group._replace(completion_lengths=group.completion_lengths.clamp(max=MAX_TOKENS))
    rows = [int((group.prompt_index == index).nonzero()[0, 0]) for index in range(len(prompts))]
    return [
        {"prompt": prompt, **_row(tokenizer, student, teachers, short, row, vocab_size)}
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _row(
    tokenizer: Any, student: ModelParts, teachers: Sequence[ModelParts], group: Group, row: int, vocab_size: int
) -> dict[str, list]:
    rows, count = torch.tensor([row]), int(group.completion_lengths[row])
    index = int(group.weights[row].argmax())  # of a mixture, the one that weighs most
    teacher = teachers[index]
    with teacher.present():
        hidden = student.hidden(*group.inputs(rows)), teacher.hidden(*group.seen_by(index).inputs(rows))
    ids = group.completion_ids[row, :count]
    spelled = ids.tolist()
    names = ("student_logprob", "teacher_logprob", "reverse_kl")
    view: dict[str, list] = {"text": [_text(tokenizer, spelled[:at], token) for at, token in enumerate(spelled)]}
    view |= {name: [] for name in (*names, "student_top", "teacher_top")}
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        states = [of_model[part] for of_model in hidden]
        stats = HeadPair(student, teacher, 1.0, vocab_size).statistics(*states, ids[part])
        for name in names:
            view[name] += [_rounded(value) for value in getattr(stats, name).tolist()]
        for name, model, state in zip(("student_top", "teacher_top"), (student, teacher), states, strict=True):
            known = model.head is not None
            logits = model.head.logits(state)[:, :vocab_size] if known else state
            view[name] += _likeliest(tokenizer, logits, spelled, start) if known else [[] for _ in state]
    return view


def _likeliest(tokenizer: Any, logits: Tensor, spelled: list[int], start: int) -> list[list[tuple[str, float | None]]]:
    """The likeliest tokens at the positions from `start` on, each with its log-probability."""
    logprobs, token_ids = logits.log_softmax(-1).topk(min(TOP, logits.shape[1]))
    return [
        [(_text(tokenizer, spelled[:at], token), _rounded(value)) for token, value in zip(*both, strict=True)]
        for at, both in enumerate(zip(token_ids.tolist(), logprobs.tolist(), strict=True), start)
    ]


def _text(tokenizer: Any, before: list[int], token: int) -> str:
    """What a token adds to the text; decoded alone, it could lose the space that it begins with."""
    context = before[-CONTEXT:]
    known, text = tokenizer.decode(context), tokenizer.decode([*context, token])
    # Half a character decodes to U+FFFD, which the token that completes it replaces.
    return text[len(os.path.commonprefix([known, text])) :]  # noqa: RUF071 - by characters


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None  # JSON has no NaN
