"""The configuration from a command line: `--config FILE [--section.key VALUE ...]`."""

import argparse
from collections.abc import Sequence

from pydantic_settings import CliSettingsSource, SettingsError

from distill.config.config import Config, known_keys, load_config, nearest_key
from distill.config.yaml_file import ConfigError


def parse_command_line(argv: Sequence[str]) -> Config:
    """Reads `--config FILE [--section.key VALUE ...]`; prints help and exits for `--help`. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.train",
        description="On-policy distillation of a causal language model.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of a recipe: default")
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
        raise ConfigError(f"command line: unknown key {key!r}{nearest_key(key)}")
    try:
        overrides = source(parsed_args=options)()
    except SettingsError as error:
        # Its message may name the section only; the lists are the only values that it reads itself.
        lists = ", ".join(known for known in known_keys() if f"--{known}" in " ".join(argv))
        raise ConfigError(f"command line: {error}; a list is written '[1, 2]' (given: {lists})") from None
    return load_config(options.config, overrides)
