"""The typed configuration: one YAML file, every key overridable on the command line, nothing unknown accepted.

The sections are in sections.py. Checks that need more than one field stand in the section, those that need more than
one section in combination.py; what needs the models or the machine is checked where those are loaded.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from distill.config.combination import Combination
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
        return self._combination().prompts_per_batch

    @property
    def asked_of_servers(self) -> Literal["auto", "sampled", "top_k", "hidden"]:
        """What a teacher's server is asked for; `auto`: hidden states, or its likeliest tokens if it has none."""
        if self.teacher.server_gives != "auto":
            return self.teacher.server_gives
        asked = self._combination()
        if asked.needs_whole_distribution():
            return "hidden"
        return "auto" if asked.compares_distributions() else "sampled"

    @property
    def rewarded(self) -> bool:
        """Whether a reward is trained on, not only watched."""
        return self._combination().rewarded

    @model_validator(mode="after")
    def _check(self) -> "Config":
        self._combination().check()
        return self

    def _combination(self) -> Combination:
        return Combination(*(getattr(self, name) for name in Combination._fields))


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
