"""The sections of what completions are worth: metrics, held-out sets, rewards, and when a run has had enough."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from distill.config.values import FilePath, Integer, Number, Positive, Reference, Section, as_list, written_as

Metrics = Annotated[tuple[Reference, ...], BeforeValidator(as_list)]
SetName = Annotated[
    str, written_as(r"[A-Za-z0-9][\w.-]{0,39}", "a name of at most 40 letters, digits, dots, dashes and underscores")
]


class EvaluationSet(Section):
    prompts: FilePath
    """Held-out prompts, in any of the forms of `prompts.train`."""
    limit: Positive | None = None
    """Read the first so many records; absent: all."""
    metrics: Metrics | None = None
    """As `evaluation.metrics`, which is what is taken if absent."""
    num_rollouts_per_prompt: Positive | None = None
    """As `evaluation.num_rollouts_per_prompt`, which is what is taken if absent."""
    max_new_tokens: Positive | None = None
    """Longest completion; that of the evaluation if absent."""
    temperature: Number | None = Field(None, gt=0)
    """Sampling temperature; `rollout.temperature` if absent."""
    top_p: Number | None = Field(None, gt=0, le=1)
    """As `rollout.top_p`, which is what is taken if absent."""
    top_k: Integer | None = Field(None, ge=0)
    """As `rollout.top_k`, which is what is taken if absent; 1 takes the likeliest token always."""
    min_p: Number | None = Field(None, ge=0, le=1)
    """As `rollout.min_p`, which is what is taken if absent."""


class EvaluationConfig(Section):
    num_rollouts_per_prompt: Positive = 1
    """Rollouts sampled for each held-out prompt."""
    max_new_tokens: Positive | None = None
    """Longest completion in the evaluation; `rollout.max_new_tokens` if absent."""
    seed: Integer = Field(1234, ge=0, lt=2**31)
    """Seed of the evaluation's rollouts, the same at every evaluation."""
    metrics: Metrics = ()
    """What each completion is judged by: `exact_match`, `contains`, `regex`, `json_valid`, `json_schema`, `math`, with
    the record's column that they read after a colon where it is another than usual, as `exact_match:solution`; or
    `FILE.py:FUNCTION`, a function of a record and a completion that gives a number, 1 or more for a success."""
    timeout_seconds: Number = Field(10, gt=0)
    """Longest that a metric may take for one completion, which counts as no success then."""
    sets: dict[SetName, EvaluationSet] = Field(default_factory=dict)
    """Further held-out sets by name, each a section with `prompts` and, where they are others than the evaluation's,
    `limit`, `metrics`, `num_rollouts_per_prompt`, `max_new_tokens`, `temperature`, `top_p`, `top_k` and `min_p`."""


class RewardConfig(Section):
    function: Reference
    """As an entry of `evaluation.metrics`: a name, or FILE.py:FUNCTION."""
    weight: Number = 1.0
    """What a reward of 1 counts, in nats per token of divergence; 0: it is watched only."""
    timeout_seconds: Number = Field(10, gt=0)
    """Longest that it may take for one completion, which has no reward then."""
    memory_gib: Number = Field(4, gt=0)
    """Memory of the process that it runs in."""


def as_rewards(value: Any) -> Any:
    """One section, or one name, in place of a list; names in place of sections."""
    listed = [value] if isinstance(value, dict | str) else value
    if not isinstance(listed, list | tuple):
        return value
    return [{"function": each} if isinstance(each, str) else each for each in listed]


Rewards = Annotated[tuple[RewardConfig, ...], BeforeValidator(as_rewards)]


class EarlyStopping(Section):
    metric: Annotated[
        str, written_as(r"[^\s/]+(/[^\s/]+){0,2}", "reverse_kl, METRIC, METRIC/pass@K, or one of a set, as SET/METRIC")
    ] = "reverse_kl"
    """What is to get better: `reverse_kl`; a metric (its mean); `METRIC/pass@K`; or one of these of a set, as
    `SET/reverse_kl`."""
    patience: Positive = 3
    """Evaluations in a row that may be no better before the run ends, as a whole one."""
    min_delta: Number = Field(0.0, ge=0)
    """How much better than the best so far counts as better."""
