"""The tokens that a run says end a completion: by name or id, in every engine, in the loss and in the trained model."""

import json

import pytest
import torch
import yaml
from conftest import tiny_model, tiny_tokenizer
from test_train import execute, main

from distill.config import ConfigError, load_config
from distill.config.command_line import parse_command_line
from distill.loss.gradients import token_weights
from distill.models import ModelError, check_pair, eos_ids, load_model, load_tokenizer, named_ids
from distill.models.ends import stops_line
from distill.run.engines import make_engine
from distill.runtime import MemoryLimits
from distill.training import trainer


def test_names_and_ids_are_the_tokenizers():
    tokenizer = tiny_tokenizer()
    assert named_ids(["<|unknown|>", 2, "<|end|>", 70], tokenizer) == [2, 3, 70]
    assert named_ids([], tokenizer) == []


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("<|ende|>", r"no token '<\|ende\|>'; the nearest that it has is '<\|end\|>'"),
        ("im_end", r"no token 'im_end'; the nearest that it has is '<\|end\|>'"),
        (260, "no token of id 260; its ids are 0 to 259"),
        (-1, "no token of id -1"),
    ],
)
def test_what_the_tokenizer_does_not_have_is_refused(token, expected):
    with pytest.raises(ModelError, match=f"rollout.stop_ids: the student's tokenizer has {expected}"):
        named_ids(["<|end|>", token], tiny_tokenizer())


@pytest.mark.parametrize(
    "name", ["<|im_end|>", "it's", "[x]: #", "null", "7", "é ✓", "a\nb", "\u0120", "\U0001f600", "\x85"]
)
def test_the_line_parses_back_to_the_names(name):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([name], special_tokens=True)
    (index,) = named_ids([name], tokenizer)
    line = stops_line([index, 2, 999], tokenizer)
    assert "\n" not in line
    parsed = yaml.safe_load(line)["rollout.stop_ids"]
    assert named_ids(parsed, tokenizer) == sorted([2, index])
    assert stops_line([2, 1], tokenizer) == 'rollout.stop_ids: ["<|start|>", "<|end|>"]'


@pytest.fixture
def unlike(tmp_path):
    """A student that ends on <|end|> and a teacher that ends on `a`, whose id is found often; as changes."""
    model = tiny_model("llama", vocab_size=272, seed=1)
    model.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "a"
    teacher = tiny_model("qwen3", vocab_size=264, seed=2, eos_token_id=tokenizer.eos_token_id)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return {"student.model": str(tmp_path / "student"), "teacher.model": str(tmp_path / "teacher")}


def test_the_refusal_says_the_line_that_makes_the_run_go(write_config, unlike, tmp_path, capsys):
    assert main(["--config", str(write_config(unlike))]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == 'rollout.stop_ids: ["<|end|>", "a"]'
    execute(write_config({**unlike, **yaml.safe_load(line), "training.max_steps": 1}))
    key, _, value = line.partition(": ")
    path = write_config(unlike, "plain.yaml")
    assert parse_command_line(["--config", str(path), f"--{key}", value]).rollout.stop_ids == ("<|end|>", "a")
    path.write_text(path.read_text() + line)
    with pytest.raises(
        ConfigError, match=r"unknown key 'rollout.stop_ids'; write it in its section: rollout: {stop_ids"
    ):
        load_config(path)
    written = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert written["eos_token_id"] == named_ids(["<|end|>", "a"], tiny_tokenizer())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollout.stop_ids", '["<|end|>", 7]'], ("<|end|>", 7)),
        (["--rollout.stop_ids", "7"], (7,)),
        (["--rollout.stop_ids", "<|end|>"], ("<|end|>",)),
    ],
)
def test_on_the_command_line_digits_are_an_id(write_config, words, expected):
    assert parse_command_line(["--config", str(write_config()), *words]).rollout.stop_ids == expected


# So many that completions end on them soon, and not at once.
STOPS = [30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180, 195, 210, 225, 240, 255]


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_completions_end_on_these_and_only_these(write_config, unlike, tmp_path, engine, lora):
    changes = {"rollout.stop_ids": STOPS, "rollout.engine": engine, "rollout.max_new_tokens": 40, "student.lora": lora}
    rollouts = 16 if lora is None else 2
    path = write_config({**unlike, **changes, "training.max_steps": 1, "training.num_rollouts_per_prompt": rollouts})
    run = execute(path)
    written = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert written["eos_token_id"] == STOPS
    assert tuple(run.parts.engine.eos_token_ids) == tuple(STOPS)
    ids = torch.tensor([run.parts.prompts.student.token_ids[0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    made = run.parts.engine.generate(ids, mask, num_rollouts=64, prompt_keys=torch.arange(1))
    assert made.finished.any()
    tokens = made.completion_ids
    for row, length in enumerate(made.completion_lengths.tolist()):
        assert not set(tokens[row, : length - 1].tolist()) & set(STOPS)
        assert (int(tokens[row, length - 1]) in STOPS) == bool(made.finished[row])


def test_the_models_own_ends_end_nothing_where_others_are_named(write_config, unlike):
    config = load_config(write_config({**unlike, "rollout.stop_ids": ["b"]}))
    model, tokenizer = load_model(unlike["student.model"]), load_tokenizer(unlike["student.model"])
    engine = make_engine(model, config, tokenizer, 260, "float32", MemoryLimits("auto"))
    assert tuple(engine.eos_token_ids) == tuple(tokenizer.convert_tokens_to_ids(["b"]))
    assert eos_ids(model, tokenizer) == [2]


def test_the_token_that_ends_a_completion_is_scored_by_both_as_what_it_is(write_config, unlike, monkeypatch):
    """Student and teacher end differently, and neither of them on this token: its log-probability is that of its id."""
    seen, real = [], trainer.accumulate_gradients

    def spy(*args, **options):
        seen.append((args[3], real(*args, **options)))
        return seen[-1][1]

    monkeypatch.setattr(trainer, "accumulate_gradients", spy)
    changes = {"rollout.stop_ids": STOPS, "training.num_rollouts_per_prompt": 8, "rollout.max_new_tokens": 20}
    execute(write_config({**unlike, **changes, "training.max_steps": 1, "prompts.eval": None}))
    ((group, result),) = seen
    weights = token_weights(group.completion_lengths, "sequence")
    models, at, ends = [load_model(unlike[f"{who}.model"]) for who in ("student", "teacher")], -1, 0
    for row, length in enumerate(group.completion_lengths.tolist()):
        prompt, tokens = group.prompt_index[row], group.completion_ids[row, :length]
        ids, at = torch.cat([group.prompt_ids[prompt][group.prompt_mask[prompt]], tokens]), at + length
        if int(tokens[-1]) not in STOPS:
            continue
        ends += 1
        assert weights[at] > 0
        for model, found in zip(models, (result.stats.student_logprob, result.stats.teacher_logprob), strict=True):
            with torch.no_grad():
                own = model(ids[None]).logits[0, -2, :260].log_softmax(-1)[tokens[-1]]
            torch.testing.assert_close(found[at].cpu(), own, rtol=1e-4, atol=1e-4)
    assert ends > 1


def test_ends_that_are_named_are_not_compared():
    student, teacher = tiny_model("llama", vocab_size=272), tiny_model("qwen3", vocab_size=264)
    teacher.generation_config.eos_token_id = [2, 7]
    with pytest.raises(ModelError, match="end a completion differently"):
        check_pair(student, teacher, tiny_tokenizer(), tiny_tokenizer())
    assert check_pair(student, teacher, tiny_tokenizer(), tiny_tokenizer(), stops=[2]) == 260
