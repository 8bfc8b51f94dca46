"""What a run works with, made from its configuration: device and precision, the two models, the prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import Config, ConfigError
from distill.decode import SamplingOptions
from distill.distributed import Ranks
from distill.lora import add_adapters
from distill.loss import ModelParts
from distill.memory import MemoryLimits
from distill.models import check_pair, eos_ids, load_model, load_tokenizer, split_head, without_layers
from distill.prompts import PromptSet, left_pad, load_prompts
from distill.rollout import RolloutEngine
from distill.server import Server
from distill.teachers import Teacher, TeacherPrompts, context_of, load_teachers, teacher_prompts
from distill.vllm_engine import ServedWeights, VllmEngine
from distill.vllm_ranks import RankedVllmEngine

SERVED = "rollout-model"  # folder of a run through which a server gets the student's weights


class Pair(NamedTuple):
    """The student's model as it is stored, and its teachers, found to agree."""

    student: PreTrainedModel
    student_parts: ModelParts
    teachers: list[Teacher]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int | None
    """Tokens of prompt and completion that all models can take; None where neither says."""


def load_pair(config: Config, device: torch.device, dtype: torch.dtype) -> Pair:
    """Loads the models and checks them against each other. Raises `ModelError`."""
    options, attention = config.student, config.training.attention
    tokenizer = load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    # The student's weights stay float32 whatever it is computed in: small updates would round away.
    base = load_model(options.model, trust_remote_code=options.trust_remote_code, device=device, attention=attention)
    # Weights that are trained cannot be a teacher's.
    frozen = base if options.lora else None
    teachers = load_teachers(config.teacher, device, dtype, attention, student=options, base=frozen)
    vocab_sizes = []
    for teacher in teachers:
        with teacher.parts.present():
            vocab_sizes.append(check_pair(base, teacher.model, tokenizer, teacher.tokenizer))
    contexts = [context_of(base), *(teacher.context for teacher in teachers)]
    return Pair(
        base,
        ModelParts(*split_head(base), dtype),
        teachers,
        tokenizer,
        min(vocab_sizes),
        min(filter(None, contexts), default=None),
    )


def make_student(base: PreTrainedModel, config: Config, dropped: Sequence[int]) -> PreTrainedModel:
    """What is trained: `base` without its `dropped` layers, with adapters where they are asked for; its own tensors.

    Raises `ModelError`.
    """
    student = without_layers(base, dropped)
    if config.student.lora:
        add_adapters(student, config.student.lora, config.training.seed)
    return student


def make_engine(
    model: PreTrainedModel,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    precision: str,
    limits: MemoryLimits,
    ranks: Ranks | None = None,
) -> RolloutEngine | VllmEngine | RankedVllmEngine:
    """What samples from `model` as `rollout` says, in a precision that may be decided already."""
    rollout = config.rollout
    common = {
        "sampling": SamplingOptions(
            rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p
        ),
        "eos_token_ids": eos_ids(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "seed": config.training.seed,
        "vocab_size": vocab_size,
    }
    if rollout.engine == "vllm":
        limit = {"timeout_seconds": rollout.timeout_seconds, "retries": rollout.retries}
        server, folder = Server(rollout.server, "rollout.server", **limit), config.training.output_dir / SERVED
        common["corrects_sampler"] = config.loss.importance_sampling == "sampler"

        def make(whole: PreTrainedModel) -> VllmEngine:
            return VllmEngine(model, ServedWeights(whole, server, folder, tokenizer, precision), **common)

        return make(model) if ranks is None or ranks.size == 1 else RankedVllmEngine(ranks, model, make)
    return RolloutEngine(
        model,
        **common,
        precision=precision,
        engine=rollout.engine,
        memory_budget_bytes=None if rollout.memory_gib is None else int(rollout.memory_gib * 2**30),
        limits=limits,
    )


class Prompts(NamedTuple):
    """One prompt set, as the student sees it and as the teachers do where that differs."""

    student: PromptSet
    teacher: TeacherPrompts | None


def load_prompt_sets(config: Config, pair: Pair, tell: Callable[[str], None]) -> tuple[Prompts, Prompts | None]:
    """Training and held-out prompts; `tell` hears of what was left out. Raises `ConfigError` or `PromptError`."""
    settings = config.prompts

    def load(path: Path, limit: int | None, key: str, completion: int) -> Prompts:
        longest = settings.max_tokens
        if pair.context is not None:
            if completion >= pair.context:
                raise ConfigError(
                    f"{key}: found {completion}, expected less than the models' context of {pair.context} tokens"
                )
            longest = min(longest, pair.context - completion)
        prompts = load_prompts(
            path,
            pair.tokenizer,
            column=settings.column,
            limit=limit,
            streaming=settings.streaming,
            chat_template=settings.chat_template,
            control_tokens=settings.control_tokens,
            max_tokens=longest,
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
            config.teacher,
            longest=None if pair.context is None else pair.context - completion,
            pad_token_id=pair.tokenizer.pad_token_id,
            special=settings.control_tokens == "special",
        )
        return Prompts(prompts, seen)

    train = load(settings.train, settings.limit, "rollout.max_new_tokens", config.rollout.max_new_tokens)
    if settings.eval is None:
        return train, None
    section = "rollout" if config.evaluation.max_new_tokens is None else "evaluation"
    longest = getattr(config, section).max_new_tokens
    return train, load(settings.eval, settings.eval_limit, f"{section}.max_new_tokens", longest)


def evaluation_arguments(config: Config, prompts: Prompts, pad_token_id: int) -> dict[str, Any]:
    """On what and how `evaluate` looks at a student, as its keyword arguments."""
    settings, (student, teacher) = config.evaluation, prompts
    return {
        "prompts": left_pad(student.token_ids, pad_token_id),
        "teacher_view": teacher and teacher.view(range(len(student))),
        "num_rollouts": settings.num_rollouts_per_prompt,
        "max_new_tokens": settings.max_new_tokens or config.rollout.max_new_tokens,
        "seed": settings.seed,
    }


def choose_device(requested: str, ranks: Ranks | None = None) -> torch.device:
    """The device of `training.device`, over ranks a GPU each. Raises `ConfigError` when it is not there."""
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(requested)
    if ranks and ranks.size > 1 and device.type == "cuda":
        if device.index is not None:
            raise ConfigError(f"training.device: found {requested!r}, but every rank has its own GPU: set it to cuda")
        requested, device = f"cuda:{ranks.local_rank}", torch.device("cuda", ranks.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"training.device: found {requested!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of `training.precision` on a device."""
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, requested)
