"""What a user writes, checked: the sections with every key's meaning, YAML, the command line.

In: a file and overrides. Out: a frozen `Config`, or a `ConfigError` that names each key.
"""

from distill.config.command_line import parse_command_line
from distill.config.config import Config, load_config, to_yaml
from distill.config.grading import RewardConfig
from distill.config.sections import LoraConfig, RolloutConfig, StudentConfig, TrainingConfig, WarmStartConfig
from distill.config.teacher import MAIN, FrozenModel, TeacherConfig
from distill.config.words import in_words
from distill.config.yaml_file import ConfigError

__all__ = [
    "MAIN",
    "Config",
    "ConfigError",
    "FrozenModel",
    "LoraConfig",
    "RewardConfig",
    "RolloutConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainingConfig",
    "WarmStartConfig",
    "in_words",
    "load_config",
    "parse_command_line",
    "to_yaml",
]
