"""The variance study: its arithmetic on known numbers, its gradients against the trainer's, and the command."""

import csv
import json
import math

import pytest
import torch
import yaml
from conftest import tiny_model
from test_loss import gradients, make_rollouts, parts_of

from benchmarks.variance import fixed, split, top_k
from benchmarks.variance.__main__ import main
from benchmarks.variance.figures import fluctuation, interval
from benchmarks.variance.pool import PromptPool, Sketch, rollout_gradients, vectors_of
from benchmarks.variance.training import reach
from distill.loss import Group, LossOptions

ESTIMATORS = {
    "plain": LossOptions(),
    "group": LossOptions(baseline="group"),
    "exact": LossOptions(baseline="exact"),
    "returns": LossOptions(discount=0.9),
    "clip": LossOptions(reward_clip=0.5),
    "reverse_kl": LossOptions("reverse_kl"),
    "jsd": LossOptions("jsd", beta=0.3),
}


def test_fluctuation_is_the_noise_about_each_prompts_own_trend():
    generator = torch.Generator().manual_seed(0)
    epochs = torch.arange(200.0)
    series = [
        (level + slope * epochs + 0.3 * torch.randn(200, generator=generator)).tolist()
        for level, slope in ((5.0, -0.01), (1.0, 0.002), (0.0, -0.02), (2.0, 0.0))
    ]
    assert fluctuation(series) == pytest.approx(0.3, rel=0.05)
    assert fluctuation(series, robust=True) == pytest.approx(0.3, rel=0.1)
    assert fluctuation([list(range(10))]) == 0
    assert math.isnan(fluctuation([[1.0, 2.0]]))


def test_intervals_are_those_of_students_t():
    mean, half = interval([1.0, 2.0, 4.0])
    assert (mean, half) == (pytest.approx(7 / 3), pytest.approx(4.303 * 1.527525 / math.sqrt(3), rel=1e-4))
    assert interval([3.0]).half_width is None
    assert math.isnan(interval([math.nan]).mean)


def test_compute_to_a_held_out_kl_is_interpolated():
    line = {"completion_tokens": 10}
    evaluations = [{"step": 0, "reverse_kl": 3.0}, {"step": 4, "reverse_kl": 1.0}, {"step": 8, "reverse_kl": 0.9}]
    found = reach(2.0, [line] * 8, evaluations, [2.0] * 8)
    assert found == {"steps": 2.0, "tokens": 20.0, "seconds": 4.0}
    assert math.isnan(reach(0.5, [line] * 8, evaluations, [1.0] * 8)["tokens"])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_groups_gradient_from_the_pool_is_the_trainers(name):
    """One prompt, three rollouts of different lengths; no sketch, so that the equality is one of gradients."""
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    rollouts = make_rollouts([3, 7, 5], num_rollouts=3, vocab_size=97)
    *_, expected, _ = gradients(student, teacher, rollouts, ESTIMATORS[name])
    group, parameters = Group.of(rollouts), list(student.parameters())
    vectors = vectors_of({name: ESTIMATORS[name]})
    rows: dict[str, list] = {vector: [] for vector in vectors}
    rewards = []
    for row in range(3):
        stats, found = rollout_gradients(parts_of(student), [parts_of(teacher)], group, row, vectors, parameters, None)
        rewards.append(stats.reward.mean())
        for vector, of_row, _ in found:
            rows[vector].append(torch.cat([g.flatten() for g in of_row]))
    pool = PromptPool({k: torch.stack(v) for k, v in rows.items()}, {}, {}, torch.stack(rewards), torch.zeros(3), None)
    (ours,) = fixed.group_gradients(pool, name, ESTIMATORS[name], torch.arange(3)[None])
    flat = torch.cat([expected[n].flatten() for n, _ in student.named_parameters()])
    torch.testing.assert_close(ours, flat, rtol=1e-4, atol=1e-5 * flat.abs().max().item())


def test_a_sketch_keeps_inner_products_even_of_gradients_that_meet_in_every_layer():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(300, 50)) for _ in range(20)]
    sketch = Sketch(parameters, size=4096)
    errors = []
    for _ in range(10):
        one, other = ([torch.randn(300, 50) * 0.01 for _ in parameters] for _ in range(2))
        for gradient in (*one, *other):
            gradient[:40, 7] += 1 + torch.rand(40)  # the same few places in every layer
        exact = sum((a * b).sum() for a, b in zip(one, other, strict=True))
        norms = math.sqrt(sum(a.square().sum() for a in one) * sum(b.square().sum() for b in other))
        errors.append(float((sketch(one) @ sketch(other) - exact) / norms))
    assert abs(sum(errors) / 10) < 2 * math.sqrt(2 / 4096)
    assert max(map(abs, errors)) < 5 * math.sqrt(2 / 4096)


def known_pools(prompts=60, rollouts=16, size=40, within=2.0, between=0.5):
    """Pools whose gradients have known parts, and the squared norm of their expectation."""
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(size, generator=generator)
    pools = []
    for _ in range(prompts):
        of_prompt = signal + between * torch.randn(size, generator=generator)
        rows = of_prompt + within * torch.randn(rollouts, size, generator=generator)
        sketches = {"plain": rows, "reverse_kl": of_prompt + 0.1 * (rows - of_prompt)}
        shifts = {name: 3 * value for name, value in sketches.items()}
        reward = torch.randn(rollouts, generator=generator)
        pools.append(PromptPool(sketches, shifts, {}, reward, torch.zeros(rollouts), None))
    return pools, signal.square().sum().item()


def test_noise_at_a_fixed_policy_of_known_gradients():
    pools, squared = known_pools(between=0.0)
    estimators = {"plain": LossOptions(), "reverse_kl": LossOptions("reverse_kl")}
    records = fixed.measure(pools, estimators, [1, 4, 8])
    found = {(record["estimator"], record["num_rollouts"]): record for record in records}
    ratio = fixed.against(records, ("reverse_kl", 4), ("plain", 8))
    assert ratio["_low"] < 0.02 < ratio["_high"]
    assert fixed.against(records, ("reverse_kl", 4), ("plain", 32)) is None
    for n in (1, 4, 8):
        record = found["plain", n]
        assert record["relative_variance"] == pytest.approx(40 * 4 / n / squared, rel=0.1)
        assert record["relative_variance_low"] < 40 * 4 / n / squared < record["relative_variance_high"]
        expected = 1 / math.sqrt(1 + 40 * 4 / n / squared)
        assert record["cosine"] == pytest.approx(expected, rel=0.1)
        assert found["reverse_kl", n]["relative_variance"] == pytest.approx(
            0.01 * record["relative_variance"], rel=0.01
        )
        assert record["shift_relative_variance"] == pytest.approx(record["relative_variance"])
        assert record["kl_sd"] == pytest.approx(1 / math.sqrt(n), rel=0.1)


def test_prompts_against_rollouts_of_known_gradients():
    pools, squared = known_pools()
    records = split.measure(pools, {"plain": LossOptions()}, [(64, 1), (16, 4), (1, 64)])
    for record in records:
        prompts, n = record["prompts_per_step"], record["num_rollouts"]
        assert record["within"] == pytest.approx(40 * 4 / (prompts * n) / squared, rel=0.1)
        assert record["between"] == pytest.approx(40 * 0.25 / prompts / squared, rel=0.25)
        assert record["total"] == pytest.approx(record["within"] + record["between"])
        assert record["total_low"] < record["total"] < record["total_high"]


@pytest.fixture
def tiny_study(tmp_path, write_config):
    """A recipe on tiny models, and a study of every part."""
    recipe = write_config({"rollout.prompts_per_batch": 5, "loss.objective": "sampled_reverse_kl"})
    (tmp_path / "single.txt").write_text("Say red.\n")
    single = write_config(
        {"prompts.train": str(tmp_path / "single.txt"), "rollout.prompts_per_batch": 1}, "single.yaml"
    )
    study = {
        "estimators": {
            "sampled_reverse_kl": {"objective": "sampled_reverse_kl"},
            "group": {"objective": "sampled_reverse_kl", "baseline": "group"},
            "reverse_kl": {"objective": "reverse_kl"},
        },
        "fixed": {
            "estimators": ["sampled_reverse_kl", "group", "reverse_kl"],
            "num_rollouts": [1, 2],
            "prompts": 3,
            "pool": 4,
        },
        "split": {"estimators": ["group", "reverse_kl"], "layouts": [[4, 1], [1, 4]], "prompts": 4, "pool": 2},
        "training": {
            "seeds": [0],
            "targets": [0.1],
            "overrides": {"training": {"num_epochs": 3, "eval_every": 5}},
            "blocks": [{"estimators": ["sampled_reverse_kl"], "num_rollouts": [1, 2]}],
        },
        "single": {"recipe": str(single), "runs": [[1, 8]], "seeds": [0]},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return recipe, path, study


def test_the_command_writes_every_table_and_repeats_nothing(tiny_study, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe, study, _ = tiny_study
    output = tmp_path / "out"
    arguments = ["--config", str(recipe), "--study", str(study), "--output", str(output)]
    assert main(arguments) == 0
    for name in ("fixed", "split", "training", "single"):
        assert (output / f"{name}.md").read_text().count("|---|") >= 1
        assert len((output / f"{name}.csv").read_text().splitlines()) > 1
    for name in ("fixed", "split", "fluctuation", "held_out"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "sampled_reverse_kl | 2" in (output / "training.md").read_text()
    assert "| 1 | 8 | 8 | 1 |" in (output / "single.md").read_text()
    assert not (output / "runs" / "sampled_reverse_kl-n1-seed0" / "checkpoints").exists()

    def times() -> dict:
        made = [*output.glob("runs/*/summary.json"), *output.glob("pools/*.safetensors")]
        return {path: path.stat().st_mtime_ns for path in made}

    before, tables = times(), {path: path.read_text() for path in output.glob("*.md")}
    assert len(before) == 3 + 3 + 4  # runs, and pools of both parts
    assert main(arguments) == 0
    assert times() == before
    assert main([*arguments, "--tables"]) == 0
    assert tables == {path: path.read_text() for path in output.glob("*.md")}
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- fixed -->\nold\n<!-- end of fixed -->\nend\n")
    assert main([*arguments, "--only", "fixed", "--page", str(page)]) == 0
    once = page.read_text()
    assert tables[output / "fixed.md"] in once
    assert "old" not in once
    assert once.endswith("<!-- end of fixed -->\nend\n")
    assert (tmp_path / "page" / "fixed.png").exists()
    assert main([*arguments, "--only", "fixed", "--page", str(page)]) == 0
    assert page.read_text() == once
    assert main([*arguments, "--only", "split", "--page", str(page)]) == 2
    assert tables == {path: path.read_text() for path in output.glob("*.md")}
    summary = json.loads((output / "runs" / "single-n1-steps8-seed0" / "summary.json").read_text())
    assert summary["steps"] == 8


def test_what_the_study_cannot_use_is_one_message(tiny_study, tmp_path, capsys):
    recipe, path, study = tiny_study

    def refused(changes: dict, *more: str) -> str:
        path.write_text(yaml.safe_dump(study | changes))
        options = ["--config", str(recipe), "--study", str(path), "--output", str(tmp_path / "out"), *more]
        assert main(options) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    assert "'nothing' is not among the estimators" in refused({"fixed": study["fixed"] | {"estimators": ["nothing"]}})
    assert "no two groups of 9" in refused({"fixed": study["fixed"] | {"num_rollouts": [9]}})
    assert "has no part 'fixed'" in refused({"fixed": None}, "--only", "fixed")
    assert "nothing of the part 'split'" in refused({}, "--tables", "--only", "split")
    path.write_text(yaml.safe_dump(study))
    assert main(["--config", str(recipe), "--study", str(path), "--output", str(tmp_path / "out"), "--tables"]) == 0
    assert "left out: nothing of the part 'split'" in capsys.readouterr().out
    assert "has 5 prompts" in refused({"split": study["split"] | {"prompts": 6}}, "--only", "split")
    wrong = study["estimators"] | {"group": {"baseline": "group", "objective": "jsd"}}
    runs = {"blocks": [{"estimators": ["group"], "num_rollouts": [2]}]}
    assert "loss.baseline" in refused({"estimators": wrong, "training": runs}, "--only", "training")
    assert main(["--config", str(tmp_path / "none.yaml"), "--study", str(path), "--output", str(tmp_path / "o")]) == 2


def test_what_is_lost_with_k_tokens_is_nothing_with_all_of_them(write_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(top_k, "KS", (3, 260))
    recipe, page = write_config({}), tmp_path / "page.md"
    page.write_text("<!-- top_k -->\n<!-- end of top_k -->\n")
    arguments = ["--config", str(recipe), "--prompts", "3", "--output", str(tmp_path / "out"), "--page", str(page)]
    assert top_k.main(arguments) == 0
    assert (tmp_path / "out" / "top_k.md").read_text() in page.read_text()
    with (tmp_path / "out" / "top_k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        if row["k"] == "260":
            assert float(row["distance"]) < 1e-3
            assert float(row["cosine"]) > 0.9999
            assert float(row["divergence"]) == pytest.approx(1, abs=1e-3)
        else:
            assert float(row["distance"]) > 0.01
            assert float(row["divergence"]) < 1
    assert top_k.main([*arguments, "--prompts", "99"]) == 2
    assert "of 99" in capsys.readouterr().err
