"""Training over ranks: the same numbers as on one process, ranks that die, hang or are told to stop, other numbers."""

import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from serving import ModelServer
from test_train import ROOT, environment, execute, weights_of

from distill.config import ConfigError, load_config
from distill.run import checkpoint
from distill.run.output import OutputFolder
from distill.runtime import read_json_lines
from distill.training.ranks import divide

TOLERANCE = 1e-5
# What depends on how rows are cut into micro-batches, and what clocks and the operating system say.
OF_THE_MACHINE = {"top_token_agreement", "tokens_per_second", "peak_memory_bytes"}
# Seven prompts in batches of six, three a step: a step has three prompts, three, or one, so that ranks have two or one
# or none.
SEVEN = ("Say red.", "Say green.", "Say a long word.", "Say blue.", "Say grey.", "Say pink and more.", "Say ochre.")
UNEVEN = {
    "rollout.prompts_per_batch": 6,
    "training.prompts_per_step": 3,
    "training.num_rollouts_per_prompt": 3,
    "training.num_epochs": 4,
    "training.max_steps": 10,
    "training.learning_rate": 1e-4,
    "training.tokens_per_micro_batch": 64,
}
KEPT = re.compile(r"rank 0 keeps ([\d,]+) of the student's ([\d,]+) parameters")
TIMEOUT = ["--training.rank_timeout_s", "30"]
ALL_WEIGHTS = {"loss.objective": "reverse_kl"}
ANSWERS = {
    "training.warm_start": {"steps": 2, "objective": "forward_kl"},
    "training.off_policy_fraction": 0.25,
    "training.max_steps": 4,
}
FROZEN_WEIGHTS = {
    "student.lora.rank": 4,
    "loss.objective": "sampled_reverse_kl",
    "loss.baseline": "group",
    "loss.reduction": "token",
    "training.activation_checkpointing": True,
    "evaluation.metrics": ["contains"],
    "evaluation.num_rollouts_per_prompt": 2,
    "training.warm_start": {"steps": 2, "answers_per_step": 3},
    "training.off_policy_fraction": 0.25,
    "training.off_policy_objective": "cross_entropy",
}


def over_ranks(tmp_path, *jobs) -> tuple[list[dict], str]:
    """What came of each job (see over_ranks.py), and what all of them said."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ROOT / "tests/over_ranks.py"), str(tmp_path / "jobs.json")]
    result = subprocess.run(command, cwd=ROOT, env=quiet(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"statuses"')]
    return found, result.stdout + result.stderr


def job(config, folder, ranks, parallel="replicate", *, words=(), **more) -> dict:
    words = ["--training.parallel", parallel, "--training.output_dir", str(folder), *words]
    made = {"config": str(config), "ranks": ranks, "folder": str(folder), "words": words}
    return made | more


def quiet() -> dict[str, str]:
    return environment() | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def uneven(write_config, tmp_path, tiny_pair):
    """Writes the configuration of a run whose steps have three prompts, three, or one; a third has another teacher, and
    as many have both. Rank 0 judges all completions.
    """
    (tmp_path / "reward.py").write_text("def short(record, completion):\n    return -0.1 * len(completion)\n")
    rewards = {"rewards": [{"function": f"{tmp_path / 'reward.py'}:short", "weight": 0.5}]}
    teacher = ("two", {"two": 0.25, "main": 0.75}, None)
    records = [{"prompt": prompt, "teacher": teacher[at % 3]} for at, prompt in enumerate(SEVEN)]
    for record in records[1:]:
        record["completion"] = record["prompt"].split()[-1]
    (tmp_path / "seven.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    teachers = {"prompts.train": str(tmp_path / "seven.jsonl"), "teacher.others": {"two": str(tiny_pair["student"])}}

    def write(changes, name="config.yaml"):
        return write_config(UNEVEN | teachers | rewards | changes, name)

    return write


@pytest.fixture
def whole(uneven, tmp_path):
    """Makes that run here, on one process; returns its folder."""

    def make(changes):
        execute(uneven({**changes, "training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
        return tmp_path / "whole"

    return make


def known(value):
    """A number or a list of them, NaN where it is null."""
    if isinstance(value, list):
        return [known(each) for each in value]
    return math.nan if value is None else value


def assert_close_runs(one, other) -> None:
    for ours, theirs in zip(*(read_json_lines(run / "metrics.jsonl") for run in (one, other)), strict=True):
        assert ours.get("phase") == theirs.get("phase")
        for name in set(ours) - OF_THE_MACHINE - {"phase"}:
            if not name.startswith("seconds"):
                values = [torch.tensor(known(each)) for each in (ours[name], theirs[name])]
                if name == "sampler_logprob_gap_max" and max(values) < 5e-5:
                    continue  # the largest of many roundings, which each way of cutting has its own of
                torch.testing.assert_close(*values, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    for ours, theirs in zip(*(read_json_lines(run / "rollouts.jsonl") for run in (one, other)), strict=True):
        assert ours.pop("reverse_kl_exact") == pytest.approx(theirs.pop("reverse_kl_exact"), abs=TOLERANCE)
        assert ours == theirs  # the same tokens, in the same order
    for ours, theirs in zip(*(read_json_lines(run / "evaluations.jsonl") for run in (one, other)), strict=True):
        sets = [line.pop("sets", {}) for line in (ours, theirs)]
        assert sets[0].keys() == sets[1].keys()
        for name, of_set in sets[0].items():
            assert_close_evaluations(of_set, sets[1][name])
        assert_close_evaluations(ours, theirs)
    ours, theirs = weights_of(one), weights_of(other)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=TOLERANCE)
    # Weights and moments of the last checkpoint, to which every rank gave its own.
    ours, theirs = (saved_tensors(checkpoint.load_newest(run / "checkpoints")) for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=TOLERANCE * max(1, tensor.abs().max()))


def assert_close_evaluations(ours: dict, theirs: dict) -> None:
    sums = [line["clusters"].pop("sums") for line in (ours, theirs)]
    teachers = [line.pop("by_teacher", {}) for line in (ours, theirs)]  # made of the same sums
    assert teachers[0].keys() == teachers[1].keys()
    assert ours.pop("metrics", None) == theirs.pop("metrics", None)  # of the same completions
    assert ours.pop("clusters") == theirs.pop("clusters")  # as many tokens, of the same prompts
    assert sums[0] == pytest.approx(sums[1], abs=TOLERANCE * ours["completion_tokens"])
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


def assert_ranks_do_what_one_does(path, runs, alone, tmp_path) -> str:
    """That the run of each (ranks, parallel) is that of `alone`, which makes it here; returns what all said."""
    folders = [tmp_path / f"{size}-{parallel}" for size, parallel in runs]
    results, said = over_ranks(tmp_path, *(job(path, folder, *run) for run, folder in zip(runs, folders, strict=True)))
    assert [set(result["statuses"]) for result in results] == [{0}] * len(runs), said
    one = alone()
    for folder in folders:
        assert_close_runs(one, folder)
    return said


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        (ALL_WEIGHTS, list(itertools.product((2, 4), ("replicate", "shard")))),
        (ALL_WEIGHTS | ANSWERS, [(3, "replicate"), (2, "shard")]),
        (FROZEN_WEIGHTS, [(2, "replicate"), (4, "shard")]),
    ],
    ids=["all weights", "answers", "frozen weights"],
)
def test_two_and_four_ranks_do_what_one_does(changes, runs, uneven, whole, tmp_path):
    said = assert_ranks_do_what_one_does(uneven(changes), runs, lambda: whole(changes), tmp_path)
    # Rank 0 keeps, of one weight or another, the larger part where they do not come out even.
    shares = [int(kept.replace(",", "")) / int(of.replace(",", "")) for kept, of in KEPT.findall(said)]
    expected = [1 / size if parallel == "shard" else 1 for size, parallel in runs]
    assert shares == pytest.approx(expected, rel=0.02)


def test_a_teacher_that_follows_does_so_on_every_rank(uneven, whole, tmp_path, tiny_pair):
    others = {"two": {"model": str(tiny_pair["teacher"]), "system_prompt": "Be brief."}}
    changes = {"teacher.model": "base", "teacher.update": "ema:0.75", "teacher.others": others, **ALL_WEIGHTS}
    # Without a prompt of its own it would be the student at first, and what Adam makes large mere rounding.
    changes["teacher.system_prompt"] = "Be kind."
    runs = [(2, "shard"), (3, "replicate")]
    assert_ranks_do_what_one_does(uneven(changes), runs, lambda: whole(changes), tmp_path)


def test_a_signal_to_one_of_four_ranks_stops_all_and_two_continue_and_one_ends(uneven, whole, tmp_path):
    """The four share the weights out, the two have all of them; each writes its part of a checkpoint."""
    changes, run = ALL_WEIGHTS | {"training.keep_last": 9}, tmp_path / "run"
    path = uneven(changes)
    (four, two), said = over_ranks(
        tmp_path, job(path, run, 4, "shard", signal=("SIGTERM", 3, 2)), job(path, run, 2, signal=("SIGTERM", 0, 6))
    )
    assert (four["statuses"], two["statuses"]) == ([143] * 4, [143] * 2), said
    execute(uneven(changes | {"training.output_dir": str(run)}))
    assert_close_runs(whole(changes), run)
    checkpoints = [checkpoint.load(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]
    shards = [[path.stat().st_size for path in found.path.glob("shard-*")] for found in checkpoints]
    assert [len(sizes) for sizes in shards] == [4, 2, 0]
    for sizes in shards[:2]:
        assert max(sizes) < 1.1 * min(sizes) + 8192
    assert len({tuple(sorted(found.shapes.items())) for found in checkpoints}) == 1  # in whichever parts


def test_a_checkpoint_that_one_rank_cannot_write_ends_all_with_the_one_before(uneven, whole, tmp_path):
    changes, run = ALL_WEIGHTS | {"training.save_every": 3}, tmp_path / "run"
    path = uneven(changes)
    (failed, continued), said = over_ranks(
        tmp_path, job(path, run, 3, "shard", largest_file=(2, 100_000)), job(path, run, 3, "shard")
    )
    assert (failed["statuses"], continued["statuses"]) == ([2] * 3, [0] * 3), said
    assert said.count("the checkpoint of step 3 could not be written") == 1
    assert "File too large (on rank 2)" in said
    assert not list((run / "checkpoints").glob(".*"))
    assert_close_runs(whole(changes), run)


def test_what_rank_0_alone_finds_wrong_ends_all_with_its_message(uneven, tmp_path):
    path, held = uneven(ALL_WEIGHTS), OutputFolder(tmp_path / "held")
    (tmp_path / "own.py").write_text("raise ValueError('not today')\n")
    try:
        results, said = over_ranks(
            tmp_path,
            job(path, tmp_path / "held", 2),
            job(path, tmp_path / "new", 2, words=["--training.resume", str(tmp_path / "nowhere")]),
            job(path, tmp_path / "own", 2, words=["--evaluation.metrics", f"{tmp_path}/own.py:score"]),
        )
    finally:
        held.release()
    assert [result["statuses"] for result in results] == [[2, 2]] * 3, said
    assert re.findall("in use by another run|not a complete checkpoint|not today", said) == [
        "in use by another run",
        "not a complete checkpoint",
        "not today",
    ]


def test_a_rank_that_dies_or_hangs_is_named_and_the_others_stop(uneven, tmp_path):
    path, words = uneven(ALL_WEIGHTS | {"training.max_steps": 10_000, "training.num_epochs": 10_000}), TIMEOUT
    (killed, hung), said = over_ranks(
        tmp_path,
        job(path, tmp_path / "killed", 3, "shard", signal=("SIGKILL", 2, 2), words=words),
        job(path, tmp_path / "hung", 3, signal=("SIGSTOP", 1, 2), words=words),
    )
    assert (killed["statuses"], hung["statuses"]) == ([1, 1, -9], [1, None, 1]), said
    # The time-out is a promise in seconds; what a process needs beside its waits depends on the machine. It gets what
    # these ranks needed to load their models and take two steps.
    for result in (killed, hung):
        assert result["ending"] < 30 + result["starting"]
    for rank in (2, 1):
        assert f"error: rank {rank} died or hangs: rank 0 of 3 has waited for it (training.rank_timeout_s: 30)" in said
    assert "Traceback" not in said


def test_torchrun_starts_the_ranks_again_from_the_last_checkpoint(uneven, whole, tmp_path):
    path, run = uneven(ALL_WEIGHTS | {"training.save_every": 1}), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "tests/signalled.py", "SIGKILL", "1", "3", str(run), "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=quiet(), capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "error: rank 1 died or hangs" in output
    assert "continuing after step" in output
    assert_close_runs(whole(ALL_WEIGHTS), run)


def saved_tensors(found: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full(shape, torch.nan) for name, shape in found.shapes.items()}
    found.read(tensors)
    return tensors


@pytest.mark.parametrize("changes", [{"teacher.precision": "int8"}, {"teacher.offload": True}])
def test_teachers_that_cannot_be_shared_out_are_refused(changes, uneven):
    with pytest.raises(ConfigError, match=r"training\.parallel shard .* set training\.parallel to replicate"):
        load_config(uneven({"training.parallel": "shard", **changes}))


def test_prompts_are_divided_by_their_tokens():
    assert divide([5, 1, 1, 1, 2], 2) == [[0], [1, 2, 3, 4]]
    assert divide([1] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert divide([7], 3) == [[0], [], []]


@pytest.fixture(scope="module")
def served_folder(tiny_pair):
    return tiny_pair["student"]


@pytest.fixture
def sampled_there(server):
    """What has a server sample for a run, each batch while the one before is trained on."""
    made = {"rollout.engine": "vllm", "rollout.server": server.url, "rollout.retries": 0, "rollout.async_batches": 1}
    return {"loss.objective": "sampled_reverse_kl", "training.save_every": 3, **made}


def test_all_ranks_learn_from_what_one_server_samples(uneven, whole, tmp_path, server, sampled_there):
    path, runs = uneven(sampled_there), [(2, "replicate"), (3, "shard")]
    folders = [tmp_path / parallel for _, parallel in runs]
    results, said = over_ranks(tmp_path, *(job(path, folder, *run) for run, folder in zip(runs, folders, strict=True)))
    assert [set(result["statuses"]) for result in results] == [{0}] * 2, said
    before = len(server.calls)
    one = whole(sampled_there)
    for folder in folders:
        assert_close_runs(one, folder)
    # The ranks ask no more of the server than one process does.
    sampled = [path == "/v1/completions" and "n" in (body or {}) for path, body in server.calls]
    assert sum(sampled[:before]) == 2 * sum(sampled[before:])


def test_a_rollout_server_that_is_gone_ends_all_ranks_and_all_continue(uneven, whole, tmp_path, server, sampled_there):
    path, run = uneven(sampled_there), tmp_path / "run"
    # Of two evaluations' and two batches' worth of requests.
    server.faults.extend([None] * 20 + [503] * 10)
    (failed,), said = over_ranks(tmp_path, job(path, run, 3, "shard"))
    assert failed["statuses"] == [2] * 3, said
    assert said.count("answered with status 503") == 1, said
    server.faults.clear()
    (continued,), said = over_ranks(tmp_path, job(path, run, 3, "shard"))
    assert continued["statuses"] == [0] * 3, said
    assert "continuing after step" in said
    assert_close_runs(whole(sampled_there), run)


def test_a_teacher_s_server_that_is_gone_ends_all_ranks_and_all_continue(write_config, tmp_path, tiny_pair):
    (tmp_path / "seven.txt").write_text("\n".join(SEVEN))
    server, run = ModelServer(tiny_pair["teacher"]), tmp_path / "run"
    changes = UNEVEN | {"teacher.server": server.url, "teacher.retries": 0, "loss.objective": "sampled_reverse_kl"}
    changes |= {"prompts.train": str(tmp_path / "seven.txt")}
    path = write_config(changes)
    try:
        server.faults.extend([None] * 60 + [503] * 100)
        (failed,), said = over_ranks(tmp_path, job(path, run, 2))
        assert failed["statuses"] == [2, 2], said
        assert said.count("error: ") == 1
        assert "Saved after step" in said
        server.faults.clear()
        (continued,), said = over_ranks(tmp_path, job(path, run, 2))
        assert continued["statuses"] == [0, 0], said
        execute(write_config(changes | {"training.output_dir": str(tmp_path / "whole")}, "whole.yaml"))
    finally:
        server.stop()
    assert_close_runs(tmp_path / "whole", run)
