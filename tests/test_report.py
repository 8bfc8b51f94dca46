"""The report and the display: what they show, and that nothing a model wrote is taken for markup."""

import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from test_train import execute

from distill.report import report_page
from distill.report.__main__ import main
from distill.report.charts import fluctuation, rolling, run_charts
from distill.report.page import LEVELS, _shade, write_report
from distill.run.display import Display, closing_table
from distill.run.live_report import LiveReport
from distill.run.output import OutputFolder
from distill.runtime import read_json_lines

NASTY = "<script>alert('x')</script> [bold]&amp;"


def metrics(step: int) -> dict:
    names = ("rollout", "score", "update")
    values = {"reverse_kl_exact": 2.0 / step, "grad_norm": 1.5, "student_entropy": 1.0, "teacher_entropy": 0.9}
    diagnostics = {
        "reverse_kl_q99": 9.0,
        "reverse_kl_end": None if step % 2 else 0.5,
        "reverse_kl_by_position": [1.0, None, 2.0][: 2 + step % 2],
        "top_token_agreement": 0.5,
        "truncated_fraction": 0.0,
        "reward_clipped_fraction": None,
        "gradient_noise_within": 2.0,
        "gradient_noise_between": None,
        "gradient_signal": 1.0 if step % 2 else -0.5,
    }
    seconds = {f"seconds_{name}": 0.5 for name in names}
    return {"step": step, "tokens_per_second": 70.0, **values, **seconds, **diagnostics}


def token_record(step: int, text: str) -> dict:
    """A line of `tokens.jsonl` in which models and prompts wrote `text`."""
    top = [[[text, -0.5], ["b", -1.0], ["c", -2.0]]] * 3
    figures = {"student_logprob": [-1.0, None, -2.0], "teacher_logprob": [-3.0, -1.0, -1.9], "reverse_kl": [0.5] * 3}
    return {
        "step": step,
        "samples": [{"prompt": text, "text": [text, "b", ""], **figures, "student_top": top, "teacher_top": top}],
    }


def make_run(folder, steps=20):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics(step)) + "\n" for step in range(1, steps + 1)))
    evaluation = {"step": 0, "reverse_kl": 2.0, "standard_error": None}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    (folder / "tokens.jsonl").write_text(
        json.dumps(token_record(0, NASTY)) + "\n" + json.dumps(token_record(steps, NASTY))
    )
    summary = {"steps": steps, "device": NASTY, "samples": [{"prompt": NASTY, "before": NASTY, "after": NASTY}]}
    (folder / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """Tags, and what stands in the scripts that are data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.data, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = ("type", "application/json") in attributes
        self.data += [""] * self._inside

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data[-1] += data

    def classes(self, tag: str) -> list[str]:
        return [attributes.get("class", "") for name, attributes in self.tags if name == tag]


def titles(metrics: list[dict]) -> list[str]:
    return [chart.title for chart in run_charts(metrics, [])]


def test_report_is_one_file_with_charts_and_everything_escaped(tmp_path):
    make_run(tmp_path)
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert page.classes("div").count("chart") == 9
    labels = json.dumps(json.loads(page.data[-1]))
    assert "within prompts" in labels
    assert "between prompts" not in labels  # never known
    assert "reward clipped" not in labels
    assert "alert(" not in "".join(re.findall(r"<script>.*?</script>", text, re.DOTALL))  # only in text and data
    assert page.tags.count(("script", {})) == 2
    assert [name for name, _ in page.tags].count("script") == 2 + 1 + 2  # ours, the charts' data, two completions'
    assert text.count("&lt;script&gt;alert") == 2 + 1 + 1  # two first tokens, the prompt, the device
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]  # nothing fetched
    policy = next(a["content"] for name, a in page.tags if name == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    assert "held-out" in labels


def test_tokens_are_shaded_by_their_reward_and_carry_both_models_words(tmp_path):
    make_run(tmp_path)
    page = Page(report_page(tmp_path))
    tokens = [a for name, a in page.tags if name == "span" and "tabindex" in a]
    assert [token["class"] for token in tokens] == ["n3", "unknown", "p1"] * 2
    assert [token["tabindex"] for token in tokens] == ["0", "-1", "-1"] * 2
    after, before = map(json.loads, page.data[:-1])
    assert after == before
    assert after["text"][0] == after["student_top"][0][0][0] == NASTY


@pytest.mark.parametrize(
    ("reward", "shade"),
    [(0.0, "same"), (0.09, "same"), (0.1, "p1"), (-0.1, "n1"), (1.0, "p2"), (-2.9, "n3"), (50.0, "p4")],
)
def test_shades_grow_with_the_reward(reward, shade):
    assert _shade(0.0, reward) == shade
    assert list(LEVELS) == sorted(LEVELS)


def test_report_of_an_unfinished_run(tmp_path):
    make_run(tmp_path, steps=1)
    for name in ("summary.json", "evaluations.jsonl", "tokens.jsonl"):
        (tmp_path / name).unlink()
    assert Page(write_report(tmp_path).read_text()).classes("div").count("chart") == 8  # too short for fluctuation


def test_report_of_a_run_before_its_first_step(tmp_path):
    make_run(tmp_path, steps=0)
    assert Page(write_report(tmp_path).read_text()).classes("div").count("chart") == 0


def test_report_of_a_run_without_diagnostics_or_tokens(tmp_path):
    make_run(tmp_path)
    (tmp_path / "tokens.jsonl").unlink()
    known = ("step", "reverse_kl_exact", "grad_norm", "student_entropy", "teacher_entropy")
    lines = [{k: v for k, v in metrics(s).items() if k in known or k.startswith("seconds_")} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path).read_text())
    assert page.classes("div").count("chart") == 5
    assert page.classes("p").count("plain") == 2  # the completions' text, from the summary
    assert titles(lines) == ["Reverse KL", "Fluctuation", "Entropy", "Gradient norm", "Time by phase"]


@pytest.mark.parametrize("error", [0.1, None, "older"])
def test_the_change_is_shown_with_its_own_interval(tmp_path, error):
    make_run(tmp_path)
    known = {} if error == "older" else {"reverse_kl_change": -1.5, "reverse_kl_change_standard_error": error}
    lines = [{"step": 0, "reverse_kl": 2.0, "standard_error": 0.3}]
    lines += [{"step": step, "reverse_kl": kl, "standard_error": 0.3, **known} for step, kl in ((10, 1.0), (20, 0.5))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = re.search(r"<p>After(.*?)</p>", report_page(tmp_path), re.DOTALL)[1]
    text = " ".join(re.sub(r"<.*?>", "", text).split())
    interval = " ± 0.196, each prompt compared with itself" if error == 0.1 else ""
    assert text.endswith(f"0.500 ± 0.588 after step 20 (change -1.500{interval})")


def test_a_long_run_is_thinned_to_what_a_screen_shows(tmp_path):
    items = [chart.item("x") for chart in run_charts([metrics(step) for step in range(1, 5001)], [])]
    assert len(json.dumps(items)) < 1_500_000


def test_rolling_figures_are_those_of_each_window():
    values = np.random.default_rng(0).normal(size=40) + np.arange(40) * 0.3
    values[[7, 20]] = np.nan
    mean, deviation = rolling(values, 6)
    spread = fluctuation(values, 6)
    for i in range(40):
        part = values[max(0, i - 5) : i + 1]
        known = part[np.isfinite(part)]
        assert mean[i] == pytest.approx(known.mean())
        assert deviation[i] == pytest.approx(known.std(ddof=1) if len(known) > 1 else 0, abs=1e-12)
        if len(part) < 6 or np.isnan(part).any():
            assert math.isnan(spread[i])
        else:
            residuals = part - np.polyval(np.polyfit(np.arange(6), part, 1), np.arange(6))
            assert spread[i] == pytest.approx(math.sqrt((residuals**2).sum() / 4))


def test_a_trend_alone_is_no_fluctuation():
    assert np.nanmax(fluctuation(np.linspace(5, 1, 50), 10)) < 1e-9


def test_report_command(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    make_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_several_runs_are_compared_on_one_page(tmp_path, capsys):
    runs = [tmp_path / name for name in ("a/same", "b/same", "other<b>")]
    for run in runs:
        run.mkdir(parents=True)
        make_run(run)
    target = tmp_path / "page.html"
    assert main([*map(str, runs), "--output", str(target)]) == 0
    text = target.read_text()
    rows = re.findall(r'<th scope="row">(.*?)</th>', text)
    assert rows == [str(runs[0]), str(runs[1]), "other&lt;b&gt;"]
    assert Page(text).classes("div").count("chart") == 4
    assert not (runs[0] / "report.html").exists()
    assert main([*map(str, runs), "--output", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "could not be written" in capsys.readouterr().err


def test_a_running_report_is_written_by_another_process_now_and_then(tmp_path, monkeypatch):
    make_run(tmp_path)
    output, page = OutputFolder(tmp_path), tmp_path / "report.html"
    LiveReport(output).write()  # too early
    assert not page.exists()
    monkeypatch.setattr("distill.run.live_report.FIRST", 0)
    report = LiveReport(output)
    report.write()
    assert report._process.wait() == 0
    page.unlink()
    report.write()  # at once again: not due
    report._process.wait()
    assert not page.exists()
    report.finish()
    assert page.exists()
    output.release()


def test_a_run_writes_its_report_before_it_ends(write_config, tmp_path, monkeypatch):
    seen = []
    real = LiveReport.write

    def look(self):
        real(self)
        self._process.wait()
        seen.append(Page((tmp_path / "run" / "report.html").read_text()).classes("div").count("chart"))

    monkeypatch.setattr(LiveReport, "write", look)
    monkeypatch.setattr("distill.run.live_report.FIRST", 0)
    execute(write_config({"training.eval_every": 2}))
    assert len(seen) == 2  # after steps 2 and 4
    assert seen[0] > 5


# ---- The tokens of held-out completions ---------------------------------------------------------------------------


def test_the_token_view_is_of_the_evaluation_itself(write_config, tmp_path):
    """Two held-out prompts are all in it, so its figures are those of the evaluation."""
    run = execute(write_config({"evaluation.max_new_tokens": 40}))
    records, evaluations = (read_json_lines(tmp_path / "run" / f"{n}.jsonl") for n in ("tokens", "evaluations"))
    assert [r["step"] for r in records] == [e["step"] for e in evaluations] == [0, 5]
    for record, evaluation in zip(records, evaluations, strict=True):
        kl = [value for sample in record["samples"] for value in sample["reverse_kl"]]
        assert len(kl) == evaluation["completion_tokens"]
        assert np.mean(kl) == pytest.approx(evaluation["reverse_kl"], abs=1e-4)
    for record, texts in zip(records, (run.progress.samples["before"], run.progress.samples["after"]), strict=True):
        assert [sample["prompt"] for sample in record["samples"]] == ["Count to three.", "Name a bird."]
        for sample, text in zip(record["samples"], texts, strict=True):
            for name in ("student", "teacher"):
                for spelled, logprob, top in zip(
                    sample["text"], sample[f"{name}_logprob"], sample[f"{name}_top"], strict=True
                ):
                    assert len(top) == 3
                    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
                    assert logprob <= top[0][1]
                    # Bytes that are no text look alike.
                    assert (
                        "\ufffd" in spelled or logprob in [v for t, v in top if t == spelled] or logprob <= top[-1][1]
                    )
            assert re.sub(r"<\|\w+\|>|\ufffd", "", "".join(sample["text"])) == text.replace("\ufffd", "")


@pytest.mark.parametrize("text", ["plain words here", "äöü ✓ 漢字 done"])
def test_the_texts_of_tokens_add_up_to_the_completion(text):
    from conftest import tiny_tokenizer

    from distill.training.token_records import _text

    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = [_text(tokenizer, ids[:at], token) for at, token in enumerate(ids)]
    assert "".join(piece for piece in pieces if "\ufffd" not in piece) == text


def shown(terminal: bool, steps: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=30, _environ={})
    with Display(20, 0, console) as display:
        display.phase("rollout")
        for step in range(1, steps + 1):
            display.update(metrics(step), f"a sample\ncompletion {NASTY}")
        if terminal:
            display._live.refresh()
    return console.file.getvalue()


def test_a_terminal_sees_phase_figures_and_a_sample():
    text = shown(terminal=True, steps=16)
    for part in ("rollout", "16/20", "reverse KL 0.125", "70 tokens/s", "0:06 left", "a sample completion", "[bold]"):
        assert part in text


def test_no_terminal_gets_plain_lines():
    lines = shown(terminal=False, steps=16).splitlines()
    assert len(lines) == 16
    assert lines[-1].startswith("step 16/20  reverse KL 0.125 (trend -0.")
    assert lines[14].startswith("step 15/20  reverse KL 0.133  gradient ")  # no trend of fewer steps
    assert "\x1b" not in "".join(lines)


def test_closing_table_escapes_what_models_wrote():
    console = Console(file=io.StringIO(), width=120)
    closing_table(console, [(NASTY, "before", "after")])
    assert "[bold]" in console.file.getvalue()
