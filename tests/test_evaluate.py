"""`python -m distill.evaluate` against plain PyTorch, and what it says of models and files it cannot use."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_tokenizer
from test_train import execute
from transformers import AutoModelForCausalLM

from distill.config import Config
from distill.evaluate import main
from distill.loss import Group
from distill.prompts import left_pad
from distill.rollout import SamplingOptions, local_engine
from distill.run import load_pair
from distill.runtime import MemoryLimits, read_json_lines
from distill.training import compare

PROMPTS = ("Say red.", "Count to three, slowly.", "Name a bird.")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@torch.no_grad()
def plain_figures(folders, group: Group) -> dict[str, list[torch.Tensor]]:
    """Each figure's values by prompt, from whole logits of one row at a time."""
    models = [AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64) for name in folders]
    found: dict[str, list[torch.Tensor]] = {}
    for row, length in enumerate(group.completion_lengths.tolist()):
        prompt = group.prompt_index[row]
        completion = group.completion_ids[row, :length]
        ids = torch.cat([group.prompt_ids[prompt][group.prompt_mask[prompt]], completion])[None]
        p, q = (model(ids).logits[0, -length - 1 : -1, :260].log_softmax(-1) for model in models)
        figures = {
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "top_token_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
            "student_perplexity": -p.gather(1, completion[:, None])[:, 0],
            "teacher_perplexity": -q.gather(1, completion[:, None])[:, 0],
        }
        for name, values in figures.items():
            found.setdefault(name, [torch.empty(0)] * len(group.prompt_ids))
            found[name][prompt] = torch.cat([found[name][prompt], values])
    return found


@pytest.mark.parametrize(
    "device", ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]
)
def test_every_figure_is_that_of_whole_logits(tiny_pair, prompts, device):
    config = Config(
        student={"model": str(tiny_pair["student"])},
        teacher={"model": str(tiny_pair["teacher"])},
        prompts={"train": prompts},
    )
    pair = load_pair(config, torch.device(device), torch.float32)
    engine = local_engine(
        pair.student,
        sampling=SamplingOptions(40),
        eos_token_ids=[2],
        pad_token_id=0,
        precision="float32",
        seed=0,
        vocab_size=pair.vocab_size,
    )
    asked = (x.to(device) for x in left_pad([tiny_tokenizer()(text)["input_ids"] for text in PROMPTS], 0))
    group = Group.of(engine.generate(*asked, num_rollouts=3, prompt_keys=torch.arange(3)))
    found = compare(pair.student_parts, [pair.teachers[0].parts], group, MemoryLimits(60), pair.vocab_size)
    here = group._replace(prompt_ids=group.prompt_ids.cpu(), completion_ids=group.completion_ids.cpu())
    for name, by_prompt in plain_figures(tiny_pair, here).items():
        sums, counts = torch.stack([v.sum() for v in by_prompt]), torch.tensor([float(len(v)) for v in by_prompt])
        mean = sums.sum() / counts.sum()
        error = ((sums - mean * counts).square().sum() * 3 / 2).sqrt() / counts.sum()
        expected = torch.stack([mean, mean - 1.96 * error, mean + 1.96 * error])
        if name.endswith("perplexity"):
            expected = expected.exp()
        torch.testing.assert_close(torch.tensor(found[name]), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["student", "teacher"])
def test_the_command(tiny_pair, prompts, tmp_path, capsys, sampler):
    models = ["--student", str(tiny_pair["student"]), "--teacher", str(tiny_pair["teacher"])]
    options = ["--num-rollouts", "3", "--max-new-tokens", "12", "--sample-from", sampler]
    target = tmp_path / "figures.json"
    assert main([*models, "--prompts", str(prompts), *options, "--json", str(target)]) == 0
    text = capsys.readouterr().out
    assert f"on completions of the {sampler}" in text
    figures = json.loads(target.read_text())
    assert f"{figures['forward_kl']['mean']:.4f}" in text
    # Each model finds its own completions the likelier ones.
    own, other = (f"{name}_perplexity" for name in ("student", "teacher")[:: 1 if sampler == "student" else -1])
    assert figures[own]["mean"] < figures[other]["mean"]


def test_a_teacher_in_host_memory_comes_to_sample(tiny_pair, prompts, monkeypatch):
    """As with `teacher.offload`: it is there whenever it computes."""
    inside, calls = [], []

    @contextmanager
    def present():
        inside.append(True)
        yield
        inside.pop()

    def load(*arguments):
        pair = load_pair(*arguments)
        (teacher,) = pair.teachers
        teacher.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(bool(inside)))
        return pair._replace(teachers=[teacher._replace(parts=teacher.parts._replace(present=present))])

    monkeypatch.setattr("distill.evaluate.load_pair", load)
    models = ["--student", str(tiny_pair["student"]), "--teacher", str(tiny_pair["teacher"])]
    assert main([*models, "--prompts", str(prompts), "--sample-from", "teacher", "--max-new-tokens", "4"]) == 0
    assert calls
    assert all(calls)


def test_a_model_agrees_with_itself(tiny_pair, prompts, tmp_path):
    model = str(tiny_pair["student"])
    target = tmp_path / "figures.json"
    command = ["--student", model, "--teacher", model, "--prompts", str(prompts), "--json", str(target)]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    figures = json.loads(target.read_text())
    assert abs(figures["reverse_kl"]["mean"]) < 1e-6
    assert abs(figures["forward_kl"]["mean"]) < 1e-6
    assert figures["top_token_agreement"]["mean"] == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--student": "/nowhere"}, "'/nowhere': no such directory"),
        ({"--prompts": "/nowhere.txt"}, "/nowhere.txt: there is no such file"),
        ({"--num-rollouts": "0"}, "num_rollouts_per_prompt: found 0"),
        ({"--max-new-tokens": "4096"}, "found 4096"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_2(tiny_pair, prompts, capsys, changes, expected):
    options = {
        "--student": str(tiny_pair["student"]),
        "--teacher": str(tiny_pair["teacher"]),
        "--prompts": str(prompts),
        **changes,
    }
    assert main([word for pair in options.items() for word in pair]) == 2
    assert expected in capsys.readouterr().err


def test_of_a_single_prompt_the_error_is_over_its_rollouts(write_config, tmp_path):
    (tmp_path / "one.txt").write_text("Count to three.\n")
    changes = {"prompts.eval": str(tmp_path / "one.txt"), "evaluation.num_rollouts_per_prompt": 8}
    run = execute(write_config(changes | {"training.max_steps": 1}))
    (_, after), (_, line) = run.progress.evaluations, read_json_lines(tmp_path / "run" / "evaluations.jsonl")
    assert 0 < after["standard_error"] == line["standard_error"]
    (_, view) = read_json_lines(tmp_path / "run" / "tokens.jsonl")
    assert len(view["samples"]) == 1


@pytest.mark.parametrize("rate", [1e-3, 1e-30])
def test_two_evaluations_are_compared_prompt_by_prompt(write_config, tmp_path, rate):
    """At the same random numbers: narrower than each by itself, and exactly nothing between the same weights."""
    path = write_config({"training.max_steps": 1, "training.learning_rate": rate, "rollout.max_new_tokens": 20})
    (tmp_path / "eval.txt").write_text("".join(f"Name {number} birds.\n" for number in range(12)))
    before, after = execute(path).progress.evaluations
    change, error = after["reverse_kl_change"], after["reverse_kl_change_standard_error"]
    assert change == after["reverse_kl"] - before["reverse_kl"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["eval_reverse_kl_change"], summary["eval_reverse_kl_change_standard_error"]) == (change, error)
    if rate == 1e-30:  # moves no weight of float32
        assert (change, error) == (0, 0)
    else:
        assert 0 < error < 0.8 * math.hypot(before["standard_error"], after["standard_error"])


def test_a_run_is_evaluated_with_the_prompts_that_its_teachers_saw(write_config, tiny_pair, tmp_path, capsys):
    """Its last evaluation again, whose draws are the same: two teachers, a mixture, one that has followed."""
    for kind, words in (("train", ("red", "blue")), ("eval", ("pink", "grey", "black"))):
        mixture = {"main": 0.25, "other": 0.75}
        records = [{"prompt": f"Say {word}.", "teacher_prompt": f"Say {word}!", "teacher": mixture} for word in words]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    changes = {
        "teacher.model": "base",
        "teacher.update": "every:1",
        "teacher.others": {"other": {"model": str(tiny_pair["teacher"]), "system_prompt": "Be brief."}},
        "prompts.train": str(tmp_path / "train.jsonl"),
        "prompts.eval": str(tmp_path / "eval.jsonl"),
        "training.learning_rate": 3e-3,
    }
    run, target = execute(write_config(changes)), tmp_path / "figures.json"
    assert main(["--run", str(tmp_path / "run"), "--json", str(target)]) == 0
    asked = {"num_rollouts": 1, "max_new_tokens": 6, "temperature": 1.0, "seed": 1234}
    assert asked.items() <= json.loads(target.read_text()).items()
    found = json.loads(target.read_text())["reverse_kl"]["mean"]
    assert found == pytest.approx(run.progress.evaluations[-1]["reverse_kl"], rel=1e-4)
    alone = ["--run", str(tmp_path / "run"), "--teacher", str(tiny_pair["teacher"]), "--json", str(target)]
    assert main(alone) == 0
    assert json.loads(target.read_text())["reverse_kl"]["mean"] != pytest.approx(found, rel=0.01)
    assert main([*alone, "--sample-from", "teacher"]) == 2
    assert "several teachers" in capsys.readouterr().err


def test_what_is_to_be_compared_has_to_be_said(tmp_path, capsys):
    assert main(["--student", "somewhere"]) == 2
    assert "--teacher, --prompts: missing" in capsys.readouterr().err
    assert main(["--run", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
