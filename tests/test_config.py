"""The configuration: what is accepted, what is refused and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import ConfigError, load_config, parse_command_line, to_yaml
from distill.config.config import known_keys

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def refused(tmp_path):
    """The message with which a YAML text, and options, are refused."""

    def message(text: str, *options: str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            parse_command_line(["--config", str(path), *options])
        return str(caught.value)

    return message


MINIMAL = "student: {model: a/b}\nteacher: {model: a/c}\nprompts: {train: p.txt}\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_survives_being_written_and_read(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


def test_defaults_of_the_contract(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    training = load_config(path).training
    assert (training.num_rollouts_per_prompt, training.prompts_per_step, training.max_grad_norm) == (1, 1, 1.0)
    assert (training.device, training.precision, training.resume) == ("auto", "auto", "auto")


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "training: {learning_rate: 2e-5}\n")
    assert yaml.safe_load(path.read_text())["training"]["learning_rate"] == "2e-5"
    assert load_config(path).training.learning_rate == 2e-5


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        MINIMAL + "training: {learning_rate: 1.0, seed: 3}\nstudent: {model: x}\n".replace("student", "loss", 0)
    )
    overrides = [
        "--training.learning_rate",
        "1e-5",
        "--student.drop_layers",
        "[1, 2]",
        "--loss.importance_clip",
        "null",
    ]
    path.write_text(MINIMAL + "training: {learning_rate: 1.0, seed: 3}\n")
    config = parse_command_line(["--config", str(path), *overrides])
    assert config.training.learning_rate == 1e-5
    assert config.training.seed == 3
    assert config.student.drop_layers == (1, 2)
    assert config.student.model == "a/b"
    assert config.loss.importance_clip is None


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("training: {lerning_rate: 1}", (), ["bad.yaml", "'training.lerning_rate'", "mean 'training.learning_rate'"]),
        ("training: {temperature: 1}", (), ["bad.yaml", "mean 'rollout.temperature'"]),
        ("trainng: {seed: 1}", (), ["bad.yaml", "'trainng'", "mean 'training'"]),
        ("training: {learning_rate: fast}", (), ["bad.yaml: training.learning_rate", "'fast'", "number"]),
        ("training: {learning_rate: yes}", (), ["training.learning_rate", "True", "not a truth value"]),
        ("training: {seed: 1.5}", (), ["training.seed", "1.5", "integer"]),
        ("rollout: {temperature: 0}", (), ["rollout.temperature", "found 0", "greater than 0"]),
        ("rollout: {top_p: .nan}", (), ["rollout.top_p", "nan"]),
        ("loss: {objective: mse}", (), ["loss.objective", "'mse'", "'reverse_kl'"]),
        ("student: 5", (), ["bad.yaml: student: found 5"]),
        ("teacher: {model: x}", (), ["bad.yaml", "'teacher' stands twice"]),
        ("training: {prompts_per_step: 3}\nrollout: {prompts_per_batch: 4}", (), ["prompts_per_batch is 4", "whole"]),
        ("loss: {temperature: 2}", (), ["loss.importance_clip", "loss.temperature"]),
        ("loss: {baseline: group}", (), ["loss.baseline", "num_rollouts_per_prompt is 1"]),
        ("loss: {baseline: exact, objective: reverse_kl}", (), ["loss.baseline", "'exact'", "objective is reverse_kl"]),
        ("loss: {discount: 0.5, objective: jsd}", (), ["loss.discount is 0.5", "objective is jsd"]),
        ("loss: {reward_clip: 3, objective: forward_kl}", (), ["loss.reward_clip", "objective is forward_kl"]),
        ("loss: {importance_sampling: sampler, objective: jsd}", (), ["loss.importance_sampling", "'sampler'"]),
        ("loss: {importance_sampling: sampler, importance_clip: null}", (), ["sampler", "loss.importance_clip"]),
        ("loss: {discount: 1.5}", (), ["loss.discount", "1.5"]),
        ("training: {eval_every: 5}", (), ["training.eval_every", "prompts.eval"]),
        ("training: {device: tpu}", (), ["training.device: found 'tpu', expected auto, cpu, cuda or cuda:INDEX"]),
        (
            "training: {attention: SDPA}",
            (),
            ["training.attention: found 'SDPA', expected auto, or a name such as sdpa"],
        ),
        ("rollout: {server: 'host:1'}", (), ["rollout.server: found 'host:1', expected the URL of a server"]),
        ("", ("--prompts.chat_template", "x.txt"), ["prompts.chat_template: found 'x.txt', expected auto, never, or"]),
        (
            "",
            ("--student.drop_layers", "auto:0"),
            ["student.drop_layers: found 'auto:0', expected a list of layers, or"],
        ),
        (
            "",
            ("--teacher.update", "ema:1.0"),
            ["teacher.update: found 'ema:1.0', expected frozen, every:STEPS or ema:"],
        ),
        ("", ("--training.lerning_rate", "1"), ["command line", "mean 'training.learning_rate'"]),
        ("", ("--training.seed", "abc"), ["command line: training.seed", "'abc'"]),
        ("", ("--training.seed",), ["command line", "--training.seed"]),
        ("", ("--student.drop_layers", "[1, x]"), ["student.drop_layers", "'x'"]),
        ("", ("--student.drop_layers", "[-1]"), ["student.drop_layers", "-1"]),
    ],
)
def test_refusal_says_where_what_and_what_was_expected(refused, text, options, expected):
    lines = MINIMAL if "student" not in text else MINIMAL.replace("student: {model: a/b}\n", "")
    message = refused(lines + text + "\n", *options)
    for part in expected:
        assert part in message


@pytest.mark.parametrize("value", ["frozen", "every:20", "ema:0.99"])
def test_ways_of_following_the_student_that_are_meant(value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    assert load_config(path, {"teacher": {"update": value, "model": "base"}}).teacher.update == value


@pytest.mark.parametrize("value", ["every:0", "ema:0.0", "ema:.5", "every:20 ", "frozen\n", "ever:20"])
def test_ways_that_are_not(refused, value):
    assert "expected frozen, every:STEPS or ema:DECAY" in refused(MINIMAL, "--teacher.update", value)


def test_no_message_shows_a_regular_expression():
    assert "pattern=" not in "".join(
        (ROOT / "distill/config" / f"{name}.py").read_text() for name in ("sections", "teacher", "values")
    )


def test_a_recipe_by_its_name_finds_all_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_config("recover")
    files = (found.prompts.train, found.prompts.eval, found.prompts.answers, found.evaluation.sets["facts"].prompts)
    assert all(path.is_file() for path in files), files


def test_every_problem_is_reported_at_once(refused):
    message = refused("student: {model: a/b}\nprompts: {train: p}\ntraining: {seed: x, num_epochs: 0}\n")
    assert "'teacher' is missing" in message
    assert "training.seed" in message
    assert "training.num_epochs" in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just words", "", "a: [1\n", "!!python/object/apply:os.system ['true']"]
)
def test_what_is_no_configuration_is_refused(refused, text):
    assert "bad.yaml" in refused(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases (*name) are not used"),
        ("a: &a [*a]\n", "aliases (*name) are not used"),
        ("a: " + "[" * 100_000, "nested more than 20 deep"),
        ("{" * 100_000, "nested more than 20 deep"),
        ("- " * 50_000, "nested more than 20 deep"),
        ("a: " + "x" * 2**20, "more than 1 MiB"),
        ("a: " + "1" * 5000, "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML: month"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!binary '###'", "bad.yaml"),
        ("1: 2", "expected names of sections, found 1"),
        ("? [a]\n: 1", "a key is not a name"),
        ("a: \t- b\n c: d: e", "not valid YAML"),
        ('training: {output_dir: "a\\0b"}', "without NUL characters"),
        ("training: {attention: kernels-community/flash-attn}", "training.attention"),
        ("training: {seed: " + "9" * 4000 + "}", "99999..."),
    ],
)
def test_bombs_and_other_strange_yaml(refused, text, expected):
    assert expected in refused(text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80", b"training: {seed: 1}\x00", b"\x00" * 100])
def test_binary_files_are_refused(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml: (cannot be read|not valid YAML)"):
        load_config(path)


def test_a_folder_and_an_endless_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        load_config("/dev/zero")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(list(known_keys())) | st.text(max_size=6)
YAML_CHARACTERS = st.text(alphabet="{}[]:-&*!<>?|#'\"\\,\n \t0123456789.eax~=%@`", max_size=60)
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def accepted_or_refused(path) -> None:
    """Any file is a configuration that survives being written and read, or is refused with a message that names it."""
    refusal = ""
    try:
        config = load_config(path)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert "fuzz.yaml" in refusal
        return
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@FUZZ
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans())
def test_any_values_of_any_keys(tmp_path, keys, complete):
    content = yaml.safe_load(MINIMAL) if complete else {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if name and isinstance(content.setdefault(section, {}), dict):
            content[section][name] = value
        else:
            content[section] = value
    path = tmp_path / "fuzz.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    accepted_or_refused(path)


@pytest.mark.parametrize("value", ["{a: {0: null}}", "{a: 2020-01-01}", "{a: [.nan]}"])
def test_arguments_of_a_template_are_what_a_checkpoint_can_keep(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"teacher.chat_template_kwargs: found .*, expected text, finite numbers"):
        load_config(path, {"teacher": {"chat_template_kwargs": yaml.safe_load(value)}})


@FUZZ
@given(st.binary(max_size=60) | YAML_CHARACTERS.map(str.encode) | st.text(max_size=30).map(str.encode))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    accepted_or_refused(path)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(list(known_keys())), st.text(max_size=10)), max_size=3))
def test_any_values_on_the_command_line(tmp_path, options):
    path = tmp_path / "fuzz.yaml"
    path.write_text(MINIMAL)
    words = [word for key, value in options for word in (f"--{key}", value)]
    refusal = "command line"
    try:
        parse_command_line(["--config", str(path), *words])
    except ConfigError as error:
        refusal = str(error)
    assert "command line" in refusal or "fuzz.yaml" in refusal


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_environment_variables_are_not_configuration(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    monkeypatch.setenv("TRAINING", '{"seed": 9}')
    assert load_config(path).training.seed == 0


def test_help_lists_every_key_with_meaning_and_default():
    command = [sys.executable, "-m", "distill.train", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for key in known_keys():
        assert f"--{key} " in text
    assert "Adam's step size" in text
    assert "default: 2e-05" in " ".join(text.split())
