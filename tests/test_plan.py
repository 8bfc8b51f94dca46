"""The plan: shapes against models and model cards, a step's parts against the code's own, and all of it measured."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import harness, tables, test_growth
from benchmarks.plan import measured, page
from benchmarks.plan.__main__ import main
from benchmarks.plan.machines import GIB, GPUS
from benchmarks.plan.model import Layout, Work, largest_rollouts, predict
from benchmarks.plan.shapes import KNOWN, Shape, known, shape_of
from benchmarks.plan.work import best, layouts, servers_for, work_of
from distill.config import load_config
from distill.forward import completion_hidden
from distill.models import fuse_norms
from distill.runtime.micro_batches import micro_batches

ROOT = Path(__file__).parent.parent
# Billions: all parameters, those without embeddings, and those active a token, as the model cards say.
CARDS = {
    "SmolLM2-135M": (0.135, None, None),
    "SmolLM2-360M": (0.362, None, None),
    "SmolLM2-1.7B": (1.71, None, None),
    "Llama-3.2-1B": (1.23, None, None),
    "Llama-3.2-3B": (3.21, None, None),
    "Llama-3.1-8B": (8.03, None, None),
    "Llama-3.1-70B": (70.6, None, None),
    "Qwen3-0.6B": (0.6, 0.44, None),
    "Qwen3-1.7B": (1.7, 1.4, None),
    "Qwen3-4B": (4.0, 3.6, None),
    "Qwen3-8B": (8.2, 6.95, None),
    "Qwen3-14B": (14.8, 13.2, None),
    "Qwen3-32B": (32.8, 31.2, None),
    "Qwen3-30B-A3B": (30.5, 29.9, 3.3),
    "Qwen3-235B-A22B": (235, 234, 22),
}


def qwen(student: str = "0.6B", teacher: str = "4B", **changes) -> Work:
    half = {"itemsize": 2, "rollout_itemsize": 2, "teacher_itemsize": 2}
    return Work(known(f"Qwen3-{student}"), known(f"Qwen3-{teacher}"), 256, 512, **{"N": 8, **half, **changes})


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_the_table_are_those_of_the_model_cards(name):
    every, body, active = CARDS[name]
    shape = known(name)
    assert shape.parameters / 1e9 == pytest.approx(every, rel=0.015)
    assert body is None or shape.body() / 1e9 == pytest.approx(body, rel=0.03)
    assert active is None or (shape.active + 2 * shape.head) / 1e9 == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_folder_s_shape_counts_the_weights_of_its_model(family, tmp_path):
    model = tiny_model(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    shape = shape_of(str(tmp_path))
    assert shape.parameters == sum(weights.values())
    assert shape.head == weights["lm_head.weight"]
    assert shape_of(str(tmp_path), dropped_layers=1).num_hidden_layers == 2


@pytest.mark.parametrize("itemsize", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(family, itemsize):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    P, T, N, kept = 64, 17, 4, {}

    def bytes_of(layers: int) -> int:
        options = {"vocab_size": 97, "head_dim": 16, "num_hidden_layers": layers, "pad_token_id": 0}
        body = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **options)).eval().base_model
        fuse_norms(body)  # as models are loaded
        own = {parameter.untyped_storage().data_ptr() for parameter in body.parameters()}
        kept.clear()

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        ids, completions = torch.randint(1, 97, (1, P)), torch.randint(1, 97, (N, T))
        half = torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
            completion_hidden(body, ids, torch.ones_like(ids, dtype=torch.bool), completions, [T] * N, [0] * N)
        return sum(storage.nbytes() for storage in kept.values())

    a_layer = bytes_of(3) - bytes_of(2)
    shape = Shape(64, 192, 1, 4, 2, 16, 97, True, qk_norm=family == "qwen3")
    tokens = P + N * (T - 1)
    casts = 2 * shape.body() if itemsize == 2 else 0  # of the weights, which the plan counts once and not a token
    assert shape.activation_bytes(itemsize) * tokens == pytest.approx(a_layer - casts, rel=0.02)


@pytest.mark.parametrize(
    "shape", [(64, 32, 4, 3, 8192), (64, 32, 4, 3, 400), (64, 32, 16, 2, 300), (900, 50, 7, 2, 256)]
)
def test_micro_batches_are_the_code_s(shape):
    P, T, N, prompts, budget = shape
    index = [row // N for row in range(prompts * N)]
    cut = micro_batches([P] * prompts, [T] * len(index), index, budget)
    work = dataclasses.replace(qwen(), P=P, T=T, N=N, prompts=prompts, micro_batch=budget)
    count, tokens, largest, completion = work.split()
    found = [len({index[row] for row in part.tolist()}) * P + len(part) * (T - 1) for part in cut]
    assert (count, tokens) == (len(cut), sum(found))
    assert largest == max(found)
    assert completion == max(len(part) for part in cut) * T


@pytest.mark.parametrize(
    "point", measured.points() + measured.gpu_points(), ids=lambda point: f"{point.what}: {point.figure}"
)
def test_predictions_hold_to_what_was_measured(point):
    limits = (0.75, 1.25) if "memory" in point.figure else (1 / 1.5, 1.5)
    assert limits[0] <= point.ratio <= limits[1]


def test_decoding_a_row_waits_for_memory_and_a_forward_for_products():
    h100 = dataclasses.replace(GPUS["h100"], efficiency=GPUS["h100"].efficiency._replace(decode_layer_seconds=0.0))
    slower = dataclasses.replace(h100, bandwidth=h100.bandwidth / 2)
    weaker = dataclasses.replace(h100, flops={size: rate / 2 for size, rate in h100.flops.items()})
    work = qwen(N=1, prompts=8, batch=1)
    plan, slow, weak = (predict(work, machine) for machine in (h100, slower, weaker))
    assert slow.seconds["decode"] == pytest.approx(2 * plan.seconds["decode"], rel=0.1)
    assert weak.seconds["decode"] == pytest.approx(plan.seconds["decode"], rel=0.1)
    assert weak.seconds["fused head"] > 1.3 * plan.seconds["fused head"]


def test_shards_need_less_memory_and_a_prompt_a_device_is_the_least():
    work, h100 = qwen("8B", "32B", prompts=16, batch=16), GPUS["h100"]
    whole, shards = predict(work, h100, Layout(8)), predict(work, h100, Layout(8, "shard"))
    assert not whole.fits
    assert shards.fits
    parts = ("student", "gradients and Adam", "teacher")
    assert sum(shards.held[part] for part in parts) == pytest.approx(sum(whole.held[part] for part in parts) / 8)
    work = qwen(prompts=16, batch=16)
    on_16, on_64 = (predict(work, h100, Layout(count)) for count in (16, 64))
    assert on_64.seconds["decode"] == on_16.seconds["decode"]


def test_the_largest_number_of_rollouts_fits_and_more_do_not():
    work, machine = qwen(), GPUS["a100-40"]
    for waves in (1, None):
        most = largest_rollouts(work, machine, waves=waves)
        fits, beyond = (predict(dataclasses.replace(work, N=n), machine) for n in (most, int(1.05 * most) + 1))
        assert fits.fits
        assert waves is None or fits.waves == 1
        assert beyond.waves > 1 if waves else not beyond.fits


def test_micro_batches_are_halved_until_they_fit():
    work = qwen("0.6B", "1.7B", micro_batch=32_768, N=128)
    small, large = (predict(work, GPUS[name]) for name in ("l40s", "h200"))
    assert large.micro_batch == 32_768
    assert small.micro_batch in (4096, 8192, 16_384)
    assert small.fits
    assert max(small.peak.values()) <= 45 * GIB


def test_a_teacher_that_no_shard_holds_is_served():
    work, h100 = qwen("8B", "235B-A22B", prompts=64, batch=64), GPUS["h100"]
    assert servers_for(work.teacher, h100) == 8
    layout, plan = best(list(layouts(work, h100, 8)))
    assert layout.servers >= 8
    assert plan.held["teacher"] == 0
    assert best(list(layouts(work, h100, 1))) is None  # 8 billion weights with Adam's moments are 131 GB


def test_work_of_a_configuration(write_config, tiny_pair):
    changes = {
        "training.num_rollouts_per_prompt": 5,
        "student.drop_layers": [0],
        "loss.objective": "sampled_reverse_kl",
    }
    lora = {"student.lora": {"rank": 4}, "teacher.model": "base", "loss.baseline": "exact"}
    plain = work_of(load_config(write_config(changes)), GPUS["h100"], 100)
    adapted = work_of(load_config(write_config(changes | lora)), measured.machine(), 100)
    assert (plain.N, plain.P, plain.T, plain.batch, plain.itemsize, plain.rollout_itemsize) == (5, 100, 6, 2, 2, 4)
    assert plain.student.num_hidden_layers == 2
    assert plain.trained == plain.student.parameters
    assert adapted.one_model
    assert adapted.scores_first
    assert adapted.itemsize == 4
    layer = 4 * (2 * 64 + 2 * 48 + 3 * (32 + 64))  # rank times inputs and outputs: q and o, k and v, feed-forward
    assert adapted.trained == 2 * layer


def test_the_command_says_what_is_not_verified(write_config, capsys):
    for arguments in (["--gpu", "rtx4090", "--gpus", "2"], ["--gpu", "this"]):
        assert main(["--config", str(write_config()), *arguments]) == 0
        text = capsys.readouterr().out
        assert ("not verified" in text) == ("rtx4090" in arguments)
        assert "Choose: " in text
        for part in ("prefill", "decode", "fused head", "optimizer", "weight refresh", "most in update", "largest N"):
            assert re.search(rf"^ *{part} .*\d", text, re.MULTILINE), part


def test_what_the_command_cannot_answer(write_config, tmp_path, capsys):
    unknown = write_config({"teacher.model": "acme/Nobody-7B"}, "unknown.yaml")
    (tmp_path / "page.md").write_text("no section\n")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_attention_heads": 2}))
    partial = write_config({"teacher.model": str(tmp_path)}, "partial.yaml")
    for arguments, message in (
        (["--config", str(unknown)], "acme/Nobody-7B"),
        (["--config", str(partial)], "intermediate_size"),
        (["--config", str(write_config()), "--gpu", "cpu", "--gpus", "2"], "--gpus"),
        (["--page", str(tmp_path / "page.md")], "has no section"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["--gpu", "h100"])
    assert error.value.code == 2


def test_growth_makes_rows_exponents_table_and_plot(tmp_path, capsys):
    rows, curves = [], {}
    for letter, sizes in {"K": ((16, 64), {"V": 512, "H": 16}), "V": ((256, 1024), {"K": 32, "H": 16})}.items():
        found = test_growth.grow("the fused head", letter, {letter: sizes}, test_growth.head_of, rows.append, curves)
        assert len(found) == 2
        assert f"time ~ {letter}^{found[0]:.2f}" in capsys.readouterr().out
    test_growth.plot(curves, tmp_path / "machine" / "growth.png")
    assert (tmp_path / "machine" / "growth.png").stat().st_size > 10_000
    harness.write_json(tmp_path / "machine" / "growth.json", rows, command="pytest benchmarks/test_growth.py")
    text = "\n".join(tables.tables(tmp_path))
    assert "| K = 64 |" in text
    assert text.count("Time grows with ") == 2


def test_exponents_are_those_of_a_power_law():
    rows = [
        harness.Row("growth of x", f"N = {n}", 3.0 * n**0.7, peak_bytes=round(1e9 * n**0.25)) for n in (1, 4, 16, 64)
    ]
    assert harness.growth(rows) == pytest.approx((0.7, 0.25), abs=1e-6)


def test_a_run_s_phases_are_kept_as_medians_and_its_memory_at_the_most(write_config, tmp_path):
    folder = tmp_path / "red"
    folder.mkdir()
    write_config().rename(folder / "config.yaml")
    (folder / "summary.json").write_text(json.dumps({"torch": "2", "threads": 7, "device": "cpu"}))
    with (folder / "metrics.jsonl").open("w") as file:
        for seconds in (9.0, 1.0, 2.0):
            phases = {"seconds_rollout": seconds, "seconds_score": 2 * seconds, "seconds_update": 3 * seconds}
            length = {"completion_length": 5.6, "completion_tokens": 11, "peak_memory_bytes": int(1e9 * seconds)}
            file.write(json.dumps(phases | length) + "\n")
    assert main(["--record", str(folder), "--results", str(tmp_path / "runs.json")]) == 0
    content = json.loads((tmp_path / "runs.json").read_text())
    assert content["machine"]["threads"] == 7
    rows = {row["name"]: row for row in content["rows"]}
    assert {name: row["seconds"] for name, row in rows.items()} == {"rollout": 2, "score": 4, "update": 6, "ours": 12}
    assert rows["ours"]["peak_bytes"] == 9_000_000_000
    assert re.fullmatch(r"step of configs/red.yaml, B = \d+, P = \d+, T = 6 on average", rows["ours"]["group"])


def test_the_page_is_what_the_command_makes():
    text = (ROOT / "docs" / "scaling.md").read_text()
    begin, end = page.MARKERS
    assert text.split(begin + "\n")[1].split(end)[0] == page.section(), (
        "run: python -m benchmarks.plan --page docs/scaling.md"
    )


def test_a_teacher_in_4_bits_and_one_that_follows_take_what_they_take():
    def held(**teacher) -> dict[str, float]:
        config = load_config(ROOT / "configs/self.yaml", {"teacher": {"update": "frozen", **teacher}})
        machine = GPUS["h100"]
        return predict(work_of(config, machine, 64), machine, Layout()).held

    plain, following, small = held(), held(update="ema:0.9"), held(precision="int4")
    assert following["teacher that follows"] == pytest.approx(plain["student"])
    assert plain["teacher that follows"] == 0
    assert small["teacher"] == pytest.approx(plain["teacher"] * 5 / 16)
