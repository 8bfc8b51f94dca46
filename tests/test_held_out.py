"""A run with metrics and further held-out sets: what every file, line, table, page and tracker says of them."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from test_report import Page
from test_trackers import scalars
from test_train import execute

from distill import evaluate
from distill.config import Config, ConfigError
from distill.report import report_page
from distill.report.page import comparison_page
from distill.run import Run
from distill.runtime import read_json_lines
from distill.training import pass_figures

# The share of the alphabet's first half that is in it: another number for nearly every completion.
OWN = """
def early(record, completion):
    if record["answer"] == "fails" and "e" not in completion:
        raise ValueError("no e")
    return None if record["answer"] == "skipped" else 2 * sum(c in "abcdefghijklm" for c in completion) / 6
"""
ROLLOUTS = {"main": 4, "greedy": 1, "long": 4}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_pair):
    """Such a run, and what it said."""
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "own.py").write_text(OWN)
    (folder / "train.txt").write_text("Say red.\nSay green.\n")
    answers = ("a", "e", "skipped", "fails", "o")
    lines = [json.dumps({"prompt": f"Say {answer}.", "answer": answer}) for answer in answers]
    (folder / "eval.jsonl").write_text("\n".join(lines))
    config = Config(
        student={"model": str(tiny_pair["student"])},
        teacher={"model": str(tiny_pair["teacher"])},
        prompts={"train": folder / "train.txt", "eval": folder / "eval.jsonl"},
        rollout={"max_new_tokens": 6, "precision": "float32"},
        training={
            "learning_rate": 1e-2,
            "output_dir": folder / "run",
            "device": "cpu",
            "max_steps": 2,
            "report_to": ("tensorboard",),
        },
        loss={"objective": "reverse_kl"},
        evaluation={
            "num_rollouts_per_prompt": 4,
            "metrics": ["contains", f"{folder}/own.py:early"],
            "sets": {
                "greedy": {"prompts": folder / "eval.jsonl", "limit": 3, "top_k": 1, "num_rollouts_per_prompt": 1},
                "long": {"prompts": folder / "eval.jsonl", "max_new_tokens": 9, "metrics": "contains"},
            },
        },
    )
    console = Console(file=io.StringIO(), width=200)
    run = Run(config, console, lambda: None)
    assert run.execute() == 0
    return run, folder / "run", console.file.getvalue()


def records(done) -> list[dict]:
    return read_json_lines(done[1] / "evaluations.jsonl")


def test_each_set_has_the_figures_of_its_own_rollouts(done):
    for evaluation in records(done):
        sets = {"main": evaluation, **evaluation["sets"]}
        assert set(sets) == set(ROLLOUTS)
        for name, record in sets.items():
            assert set(record["metrics"]) == ({"contains"} if name == "long" else {"contains", "early"})
            for figures in record["metrics"].values():
                assert list(figures) == [*pass_figures(ROLLOUTS[name]), "failed"]
                assert ("change" in figures["pass@1"]) == (evaluation["step"] > 0)
        assert len(evaluation["sets"]["greedy"]["clusters"]["tokens"]) == 3
        assert max(evaluation["sets"]["long"]["clusters"]["tokens"]) > 4 * 6
        skipped, fails = (evaluation["clusters"]["metrics"]["early"]["judged"][i] for i in (2, 3))
        assert (skipped, fails) == (0, 4)  # a failure counts, as no success
        assert evaluation["sets"]["greedy"]["reverse_kl"] != evaluation["reverse_kl"]


def test_the_greedy_set_is_judged_by_what_the_likeliest_tokens_say(done):
    """Against `generate` of transformers, and the function called here."""
    run, prompts = done[0], done[0].parts.sets["greedy"].student
    space: dict = {}
    exec(OWN, space)
    kept = records(done)[-1]["sets"]["greedy"]["clusters"]["metrics"]["early"]
    for index, (ids, record) in enumerate(zip(prompts.token_ids, prompts.records, strict=True)):
        said = run.parts.student.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        value = space["early"](record, run.parts.tokenizer.decode(said, skip_special_tokens=True))
        found = kept["sums"][index], kept["judged"][index]
        assert found == ((0, 0) if value is None else (pytest.approx(value), 1))


def test_failures_are_told_once_a_metric_and_evaluation(done):
    events = [event for event in read_json_lines(done[1] / "events.jsonl") if event["event"] == "metric"]
    failed = [(e["step"], e["metrics"]["early"]["failed"]) for e in records(done)]
    assert [(e["step"], int(re.search(r"early failed on (\d+) of 20", e["message"])[1])) for e in events] == failed
    assert all("no e" in event["message"] for event in events)


def test_lines_table_and_summary_say_before_and_after(done):
    _, folder, said = done
    summary = json.loads((folder / "summary.json").read_text())
    first, last = records(done)
    assert set(summary["eval_metrics"]) == set(ROLLOUTS)
    for name, metrics in summary["eval_metrics"].items():
        for metric, figures in metrics.items():
            for figure, found in figures.items():
                for when, evaluation in (("before", first), ("after", last)):
                    record = evaluation if name == "main" else evaluation["sets"][name]
                    kept = record["metrics"][metric][figure]
                    assert found[when] == {key: kept[key] for key in ("mean", "low", "high")}
                assert found["change"] == kept["change"]
    greedy = summary["eval_sets"]["greedy"]
    assert greedy["reverse_kl_before"] == first["sets"]["greedy"]["reverse_kl"]
    assert greedy["reverse_kl_change_standard_error"] == last["sets"]["greedy"]["reverse_kl_change_standard_error"]
    figure = last["metrics"]["contains"]["pass@1"]
    words = f"{100 * figure['mean']:.0f} % ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"
    assert f"\ncontains pass@1 {words}, pass@4 " in said
    assert re.search(rf"contains pass@1 .* {re.escape(words)}, [+-]\d+ points", said)
    assert "long: held-out reverse KL after step 2" in said
    assert "long/contains pass@4" in said
    assert re.search(r"early avg@4 \d", said)


def test_card_report_and_comparison_show_them(done):
    _, folder, _ = done
    card = MarkdownIt("commonmark").enable("table").render((folder / "final" / "README.md").read_text())
    assert card.count("<table>") == 4
    for row in ("contains pass@1", "early avg@4", "greedy/contains pass@1", "long/contains pass@4"):
        assert f"<td>{row}</td>" in card
    page = report_page(folder)
    assert '<th scope="row">long/contains pass@4</th>' in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:4] == ["Reverse KL", "contains", "early", "Reverse KL by set"]
    drawn = json.dumps(json.loads(Page(page).data[-1]))
    assert all(label in drawn for label in ("long/pass@4", "greedy/pass@1", "prompts.eval"))
    both = comparison_page([folder, folder])
    assert "<h2>contains pass@1</h2>" in both
    assert "<h2>greedy/early avg@1</h2>" in both
    assert '<th scope="col">long/contains after</th>' in both


def test_trackers_hear_of_them_under_names_that_all_take(done):
    told = scalars(done[1] / "tensorboard")
    for step, evaluation in enumerate(records(done)):
        greedy = evaluation["sets"]["greedy"]
        expected = {
            "eval/contains/pass_1": evaluation["metrics"]["contains"]["pass@1"]["mean"],
            "eval/early/avg_4": evaluation["metrics"]["early"]["avg@4"]["mean"],
            "eval/early/failed": evaluation["metrics"]["early"]["failed"],
            "eval/greedy/reverse_kl": greedy["reverse_kl"],
            "eval/greedy/early/pass_1": greedy["metrics"]["early"]["pass@1"]["mean"],
        }
        for name, value in expected.items():
            assert told[name][step] == (evaluation["step"], pytest.approx(value, rel=1e-6)), name


@pytest.mark.parametrize("name", [None, "greedy", "long"])
def test_the_command_gives_the_last_evaluation_again(done, name, tmp_path, capsys):
    _, folder, _ = done
    words = ["--run", str(folder), "--json", str(tmp_path / "found.json"), *(["--set", name] if name else [])]
    assert evaluate.main(words) == 0
    last = records(done)[-1]
    wanted = last if name is None else last["sets"][name]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reverse_kl"]["mean"] == pytest.approx(wanted["reverse_kl"], rel=1e-4)
    for metric, figures in wanted["metrics"].items():
        assert found["metrics"][metric] == {
            figure: {key: x[key] for key in ("mean", "low", "high")} if isinstance(x, dict) else x
            for figure, x in figures.items()
        }
    assert "contains pass@1" in capsys.readouterr().out


def test_without_a_teacher_metrics_are_all_that_is_measured(done, tmp_path, capsys):
    _, folder, _ = done
    prompts, target = folder.parent / "eval.jsonl", tmp_path / "found.json"
    words = ["--student", str(folder / "final"), "--prompts", str(prompts), "--max-new-tokens", "6"]
    assert evaluate.main([*words, "--metrics", "contains", "json_valid", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    last = records(done)[-1]["metrics"]["contains"]
    assert found["metrics"]["contains"]["pass@4"]["mean"] == last["pass@4"]["mean"]
    assert set(found["metrics"]) == {"contains", "json_valid"}
    assert "reverse_kl" not in found
    assert "reverse kl" not in capsys.readouterr().out
    for more, said in (
        (["--metrics", "json_vald"], "json_valid is near"),
        (["--metrics", "contains", "--sample-from", "teacher"], "--sample-from teacher: there is none"),
        (["--set", "greedy"], "--set names one of the held-out sets of a run"),
        ([], "--teacher: missing"),
    ):
        assert evaluate.main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert evaluate.main(["--run", str(folder), "--set", "greddy"]) == 2
    assert "are greedy, long" in capsys.readouterr().err


def test_a_completion_that_is_too_long_for_a_set_is_named_by_its_key(write_config, tmp_path):
    (tmp_path / "set.txt").write_text("Say one.\n")
    sets = {"far": {"prompts": str(tmp_path / "set.txt"), "max_new_tokens": 4096}}
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.far\.max_new_tokens: found 4096"):
        execute(write_config({"evaluation.sets": sets}))
    assert not Path(tmp_path / "run").exists()
