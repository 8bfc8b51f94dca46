"""The report and the display: what they show, and that nothing a model wrote is taken for markup."""

import io
import json

from rich.console import Console

from distill.display import Display, closing_table
from distill.report import main, write_report

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


def make_run(folder, steps=20):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics(step)) + "\n" for step in range(1, steps + 1)))
    evaluation = {"step": 0, "reverse_kl": 2.0, "standard_error": None}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    summary = {"steps": steps, "device": NASTY, "samples": [{"prompt": NASTY, "before": NASTY, "after": NASTY}]}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_report_is_one_file_with_charts_and_everything_escaped(tmp_path):
    make_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") == 8
    assert "within prompts" in page
    assert "between prompts" not in page  # never known
    assert "reward clipped" not in page
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "http-equiv" not in page
    assert 'src="http' not in page
    assert "held-out" in page


def test_report_of_an_unfinished_run(tmp_path):
    make_run(tmp_path, steps=1)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "evaluations.jsonl").unlink()
    assert "<svg" in write_report(tmp_path).read_text()


def test_report_of_a_run_without_diagnostics(tmp_path):
    make_run(tmp_path)
    known = ("step", "reverse_kl_exact", "grad_norm", "student_entropy", "teacher_entropy")
    lines = [{k: v for k, v in metrics(s).items() if k in known or k.startswith("seconds_")} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_report(tmp_path).read_text().count("<svg") == 4


def test_report_command(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    make_run(tmp_path)
    assert main([str(tmp_path)]) == 0


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
    assert "\x1b" not in "".join(lines)


def test_closing_table_escapes_what_models_wrote():
    console = Console(file=io.StringIO(), width=120)
    closing_table(console, [(NASTY, "before", "after")])
    assert "[bold]" in console.file.getvalue()
