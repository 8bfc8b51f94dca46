"""The typed configuration: one YAML file, every key overridable on the command line, nothing unknown accepted.

The sections are in sections.py. Checks that need more than one field stand in the section or in `Config`; what needs
the models or the machine is checked where those are loaded.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill.config.grading import EvaluationConfig, EvaluationSet, RewardConfig, Rewards
from distill.config.recipes import read_recipe
from distill.config.sections import (
    TAGS,
    LossConfig,
    PromptsConfig,
    RolloutConfig,
    StudentConfig,
    TrainingConfig,
)
from distill.config.teacher import KINDS, TeacherConfig
from distill.config.values import Section
from distill.config.yaml_file import ConfigError

OF_SAMPLED_TOKENS = ("sampled_reverse_kl", "rewards")  # objectives that ask a teacher about sampled tokens only


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
    rewards: Rewards = ()
    """What completions are rewarded for, beside the teacher: functions as in `evaluation.metrics`, and what each
    counts."""

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, **_):
        # Only what is passed in: an environment variable named TRAINING is not configuration.
        return (init_settings,)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "Config":
        """Reads a YAML file, or a recipe by its name, with overrides such as `{"training.max_steps": 3}`.

        Raises `ConfigError`, which names each key that cannot be used.
        """
        overrides, nested = overrides or {}, {}
        for key, value in overrides.items():
            if any(key.startswith(f"{other}.") for other in overrides):
                raise ConfigError(f"overrides: {key!r} and one of its sections are both given: leave one out")
            *sections, last = key.split(".")
            place: dict[str, Any] = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return load_config(path, nested, source="overrides")

    @property
    def prompts_per_batch(self) -> int:
        return self.rollout.prompts_per_batch or self.training.prompts_per_step

    @property
    def asked_of_servers(self) -> Literal["auto", "sampled", "top_k", "hidden"]:
        """What a teacher's server is asked for; `auto`: hidden states, or its likeliest tokens if it has none."""
        if self.teacher.server_gives != "auto":
            return self.teacher.server_gives
        if self._needs_whole_distribution():
            return "hidden"
        return "auto" if self._compares_distributions() else "sampled"

    @property
    def rewarded(self) -> bool:
        """Whether a reward is trained on, not only watched."""
        return any(reward.weight for reward in self.rewards)

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        step, batch = self.training.prompts_per_step, self.prompts_per_batch
        if batch % step:
            raise ValueError(
                f"rollout.prompts_per_batch is {batch} and training.prompts_per_step {step}: a batch must hold a whole "
                "number of steps"
            )
        self._check_loss()
        self._check_answers()
        self._check_served_teacher()
        self._check_following_teacher()
        if self.training.parallel == "shard" and (
            any(each.offload or each.precision in ("int8", "int4") for each in self.teacher.all().values())
            or self.teacher.served()
        ):
            raise ValueError(
                "training.parallel shard gives each rank a part of the teacher as it is loaded: leave teacher.offload, "
                "teacher.precision int8 or int4 and servers of teachers out, or set training.parallel to replicate"
            )
        self._check_evaluations()
        if isinstance(self.student.drop_layers, str) and self.prompts.eval is None:
            raise ValueError(
                f"student.drop_layers {self.student.drop_layers} measures on held-out prompts, but prompts.eval names "
                "no file: set it, or list the layers"
            )
        return self

    def _check_evaluations(self) -> None:
        wants = {
            "training.eval_every": self.training.eval_every,
            "training.early_stopping": self.training.early_stopping,
            "evaluation.metrics": self.evaluation.metrics,
            "evaluation.sets": self.evaluation.sets,
        }
        found = [key for key, value in wants.items() if value]
        if found and self.prompts.eval is None:
            raise ValueError(f"{found[0]} is set, but prompts.eval names no file")

    def _check_answers(self) -> None:
        training, M = self.training, self.training.off_policy_sequences
        unused = {
            "prompts.answers": self.prompts.answers,
            "prompts.answer_column": self.prompts.answer_column,
        }
        trained_on = training.warm_start or training.off_policy_fraction
        if found := [key for key, value in unused.items() if value and not trained_on]:
            raise ValueError(
                f"{found[0]} is for training.warm_start and training.off_policy_fraction, and neither is set"
            )
        if training.max_steps == 0 and not training.warm_start:
            raise ValueError(
                "training.max_steps is 0, which leaves a warm start alone, and training.warm_start is absent"
            )
        if not training.off_policy_fraction:
            if training.off_policy_objective:
                raise ValueError("training.off_policy_objective is set, and training.off_policy_fraction is 0")
            return
        sequences = training.prompts_per_step * training.num_rollouts_per_prompt
        if M in (0, sequences):
            raise ValueError(
                f"training.off_policy_fraction {training.off_policy_fraction} of a step's {sequences} sequences "
                f"(training.prompts_per_step times num_rollouts_per_prompt) is rounded to {M}, which leaves "
                f"{'no answer' if M == 0 else 'no rollout'}: set another fraction, or take more sequences"
            )
        if self.loss.objective == "rewards" and not training.off_policy_objective:
            raise ValueError(
                "training.off_policy_fraction is set, and loss.objective rewards says nothing of written answers: set "
                "training.off_policy_objective"
            )

    def _check_rewards(self) -> None:
        loss = self.loss
        if self.rewarded and self.training.num_rollouts_per_prompt == 1:
            raise ValueError(
                "a reward counts by how much it is above that of the prompt's other rollouts, and "
                "training.num_rollouts_per_prompt is 1: sample more of them, or set the weights of rewards to 0, which "
                "only watches"
            )
        for key, value in (("objective", loss.objective == "rewards"), ("scale_rewards", loss.scale_rewards)):
            if value and not self.rewarded:
                raise ValueError(f"loss.{key} is {getattr(loss, key)!r}, and rewards lists none with a weight")

    def _check_loss(self) -> None:
        loss = self.loss
        self._check_rewards()
        if loss.objective != "sampled_reverse_kl":
            meant = {"baseline": ("none",), "discount": (0,), "reward_clip": (None,)}
            if not self.rewarded:
                meant["importance_sampling"] = ("stale", "none")
            for key, harmless in meant.items():
                if getattr(loss, key) not in harmless:
                    raise ValueError(
                        f"loss.{key} is {getattr(loss, key)!r}, which changes sampled_reverse_kl only, and "
                        f"loss.objective is {loss.objective}: leave loss.{key} out or set the objective"
                    )
            if not self.rewarded:
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

    def _check_following_teacher(self) -> None:
        teacher, student, key = self.teacher, self.student, f"teacher.update is {self.teacher.update!r}"
        if teacher.update == "frozen":
            return
        if teacher.model not in ("base", student.model):
            raise ValueError(
                f"{key}, and teacher.model {teacher.model!r} is another model than the student's {student.model!r}, "
                f"whose weights it cannot take over: set teacher.model to base, or teacher.update to frozen"
            )
        if student.drop_layers:
            raise ValueError(
                f"{key}, and the student has other layers than its teacher (student.drop_layers): leave one of them out"
            )
        for name, needed in (("server", None), ("offload", False)):
            if getattr(teacher, name) != needed:
                raise ValueError(f"{key}, which needs its weights here, beside the student's: leave teacher.{name} out")
        if teacher.precision in ("int8", "int4"):
            raise ValueError(f"{key}, and weights of {teacher.precision} cannot follow: leave teacher.precision out")

    def _check_served_teacher(self) -> None:
        served = self.teacher.served()
        if not served:
            return
        gives, objective = self.teacher.server_gives, self._compares_distributions()
        for key, section in served.items():
            if section.offload or section.precision in ("int8", "int4"):
                what = "offload" if section.offload else f"precision {section.precision}"
                raise ValueError(f"{key}.{what} is of weights here, and {key}.server has them elsewhere: leave one out")
        if gives == "sampled" and objective:
            raise ValueError(
                f"{objective} compares distributions, and teacher.server_gives is sampled: set that to hidden or "
                f"top_k, or the objective to sampled_reverse_kl (on written answers, to cross_entropy)"
            )
        if gives == "top_k" and not objective:
            raise ValueError(
                f"teacher.server_gives is top_k, and {self.loss.objective} asks of the sampled tokens only: leave "
                f"teacher.server_gives out, or set another loss.objective"
            )
        if gives in ("sampled", "top_k") and (needs := self._needs_whole_distribution()):
            raise ValueError(
                f"{needs} needs the teacher's whole distribution, of which its server says too little with "
                f"teacher.server_gives {gives}: set that to hidden"
            )

    def _compares_distributions(self) -> str:
        """Which objective asks a teacher about more than the tokens that were sampled; empty where none does."""
        training, of_answers = self.training, self.training.off_policy_objective
        warm = training.warm_start and training.warm_start.objective
        found = {
            f"loss.objective {self.loss.objective}": self.loss.objective not in OF_SAMPLED_TOKENS,
            f"training.warm_start.objective {warm}": warm == "forward_kl",
            f"training.off_policy_objective {of_answers or 'reverse_kl'}": training.off_policy_fraction
            and of_answers != "cross_entropy",
        }
        return next((what for what, does in found.items() if does), "")

    def _needs_whole_distribution(self) -> str:
        """What needs more of a teacher than its likeliest tokens, whatever the objective; empty where nothing does."""
        found = {
            f"loss.temperature {self.loss.temperature}": self.loss.temperature != 1,
            "loss.baseline exact": self.loss.baseline == "exact",
            f"student.drop_layers {self.student.drop_layers}": isinstance(self.student.drop_layers, str),
        }
        return next((what for what, needs in found.items() if needs), "")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None, *, source: str = "command line") -> Config:
    """Reads a YAML file, or a recipe by its name, and lays the nested `overrides` of `source` over it.

    Raises `ConfigError`.
    """
    written = read_recipe(path)
    overrides = overrides or {}
    try:
        return Config(**_merged(written, overrides))
    except ValidationError as error:
        problems = [_explain(problem, str(path), overrides, source) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _merged(written: dict[str, Any], overrides: dict[str, Any], section: type[BaseModel] = Config) -> dict[str, Any]:
    """`overrides` over what is written, section by section; what should be a section and is none stays as it is."""
    result = {**overrides, **written}
    for name, value in overrides.items():
        known, below = section.model_fields.get(name), written.get(name)
        inner = known and inner_section(known.annotation)
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
        if not isinstance(field.annotation, type):  # a list of sections, which is given as one
            yield section
            continue
        for key, of_key in field.annotation.model_fields.items():
            inner = inner_section(of_key.annotation)
            yield from (f"{section}.{key}.{name}" for name in inner.model_fields) if inner else (f"{section}.{key}",)


def inner_section(annotation: Any) -> type[Section] | None:
    """The section that a key may hold in place of a value."""
    alone = isinstance(annotation, type) or get_origin(annotation) in (Union, UnionType)
    found = [each for each in (annotation, *get_args(annotation)) if isinstance(each, type)]
    return next((each for each in found if alone and issubclass(each, Section)), None)


def _explain(problem: dict[str, Any], path: str, overrides: dict[str, Any], source: str) -> str:
    """One line for one problem: where, which key, what was found, what was expected."""
    location = problem["loc"]
    path_of_key = [part for part in location if isinstance(part, str) and part not in (*TAGS, *KINDS, "[key]")]
    entries = [part for part in location if isinstance(part, int)]
    key = ".".join(path_of_key)
    given = overrides
    for part in path_of_key:
        given = given.get(part, {}) if isinstance(given, dict) else given  # a list is given as a whole
    where = source if given != {} else path
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{nearest_key(key)}"
    if problem["type"] == "missing":
        return f"{path}: the key {key!r} is missing"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not location:
        return f"{path}: {expected}"
    position = f", entry {entries[0]}" if entries else ""
    found = repr(problem["input"])
    found = found if len(found) <= 100 else f"{found[:100]}..."
    return f"{where}: {key}{position}: found {found}, expected {expected}"


def _of_a_set(key: str) -> bool:
    return key.startswith("evaluation.sets.") and key.count(".") == 3


def nearest_key(key: str) -> str:
    keys = [*known_keys(), *(f"rewards.{name}" for name in RewardConfig.model_fields)]
    keys += [f"evaluation.sets.{key.split('.')[2]}.{name}" for name in EvaluationSet.model_fields if _of_a_set(key)]
    if key in keys:  # in one word where sections are nested
        *sections, name = key.split(".")
        return f"; write it in its section: {': {'.join(sections)}: {{{name}: ...}}{'}' * (len(sections) - 1)}"
    # By the last part first: `training.temperature` was meant to be `rollout.temperature`.
    same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, [*keys, *Config.model_fields], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; the sections are {', '.join(Config.model_fields)}"
