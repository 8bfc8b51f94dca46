"""`teacher.server`: against a real small server that scores, fails, stops and starts again."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from serving import ModelServer
from test_train import SAMPLED, events_of, execute, metrics_of, weights_of

from distill.config import ConfigError, load_config
from distill.report.charts import run_charts
from distill.runtime import read_json_lines
from distill.servers import Server, ServerError, in_parallel
from distill.servers.client import CONCURRENT
from distill.teachers.served import connect
from distill.train import main

# Rows that a server scores before the first step: the probe, and eight twice.
CONNECTING = 17
pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory):
    """A teacher without padded columns: a server's softmax is over all that the model has."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model("qwen3", vocab_size=260, seed=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def served(server: ModelServer, **changes) -> dict:
    return SAMPLED | {"teacher.server": server.url} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.tokens_per_micro_batch": 40, "training.prompts_per_step": 2},
        {"loss.baseline": "group", "loss.discount": 0.5, "loss.reward_clip": 1.0},
        {"teacher.system_prompt": "Be brief."},
    ],
    ids=["plain", "micro-batches", "advantages", "system-prompt"],
)
def test_a_served_teacher_trains_like_a_loaded_one(server, write_config, tmp_path, changes):
    """The same losses, gradients and weights; what only the whole distribution tells is null."""
    local = {"teacher.model": str(server.folder), "training.output_dir": str(tmp_path / "local")}
    execute(write_config(SAMPLED | changes | local))
    execute(write_config(served(server, **changes, **{"training.output_dir": str(tmp_path / "served")})))
    ours, theirs = metrics_of(tmp_path / "served"), metrics_of(tmp_path / "local")
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "reverse_kl", "student_entropy", "grad_norm", "completion_tokens"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
        assert one["reverse_kl_exact"] is one["teacher_entropy"] is one["top_token_agreement"] is None
    local = weights_of(tmp_path / "local")
    for name, weight in weights_of(tmp_path / "served").items():
        torch.testing.assert_close(weight, local[name], rtol=1e-3, atol=2e-5)


def test_the_evaluation_is_the_mean_of_the_sampled_tokens(server, write_config, tmp_path):
    execute(write_config(served(server, **{"training.max_steps": 1})))
    for line, view in zip(
        read_json_lines(tmp_path / "run" / "evaluations.jsonl"),
        read_json_lines(tmp_path / "run" / "tokens.jsonl"),
        strict=True,
    ):
        gaps = [
            student - teacher
            for sample in view["samples"]  # every token of the evaluation
            for student, teacher in zip(sample["student_logprob"], sample["teacher_logprob"], strict=True)
        ]
        assert len(gaps) == line["completion_tokens"]
        assert line["reverse_kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)
        assert line["teacher_entropy"] is None
        assert view["samples"][0]["teacher_top"] == [[]] * len(view["samples"][0]["text"])
    charts = run_charts(read_json_lines(tmp_path / "run" / "metrics.jsonl"), [])
    assert charts[0].title == "Reverse KL"


def test_a_server_that_echoes_does_too(served_folder, write_config, server, tmp_path):
    echoing = ModelServer(served_folder, echo_only=True)
    try:
        execute(write_config(served(echoing, **{"training.output_dir": str(tmp_path / "echo")})))
    finally:
        echoing.stop()
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "plain")})))
    assert metrics_of(tmp_path / "echo") == metrics_of(tmp_path / "plain")


def test_faults_that_pass_change_no_number(server, write_config, tmp_path):
    """Statuses 500, 503 and 429, a time-out and half an answer, all in one run: each is asked again."""
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "calm")})))
    server.faults.extend([None] * CONNECTING + [None, 500, "cut", 503, 429, None, 500, 60.0, None, 502, "cut"])
    changes = {"training.output_dir": str(tmp_path / "rough"), "teacher.timeout_seconds": 2}
    execute(write_config(served(server, **changes)))
    assert not server.faults
    assert metrics_of(tmp_path / "calm") == metrics_of(tmp_path / "rough")
    events = events_of(tmp_path / "rough")
    assert {event["event"] for event in events} == {"server"}
    assert any("status 503" in event["message"] for event in events)


def test_a_stopped_server_is_waited_for(server, write_config, tmp_path):
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "calm")})))
    noticed = tmp_path / "rough" / "events.jsonl"
    server.faults.extend([None] * (CONNECTING + 7) + [lambda: server.go_away(until=lambda: noticed.stat().st_size > 0)])
    changes = {"training.output_dir": str(tmp_path / "rough"), "teacher.retries": 14}
    execute(write_config(served(server, **changes)))
    assert {event["event"] for event in events_of(tmp_path / "rough")} == {"server"}
    assert metrics_of(tmp_path / "calm") == metrics_of(tmp_path / "rough")


def test_a_server_that_stays_away_ends_the_run_resumably(server, write_config, tmp_path, capsys):
    """Status 2 and one message; the step is not trained on, and the same command continues to the same numbers."""
    execute(write_config(served(server, **{"training.output_dir": str(tmp_path / "calm")})))
    # What is asked at the start, 2 evaluated rows, twice as shown, and two steps of 2 rows, each followed by the probe;
    # then nothing.
    server.faults.extend([None] * (CONNECTING + 13) + [503] * 200)
    path = write_config(served(server, **{"teacher.retries": 2}))
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "Given up after 3 attempts" in error
    assert "Saved after step 2" in error
    assert "Traceback" not in error
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    server.faults.clear()
    assert main(["--config", str(path)]) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "calm")
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_server_without_prompt_logprobs_is_refused(server, write_config, capsys):
    server.faults.extend(["silent"] * 2)
    assert main(["--config", str(write_config(served(server)))]) == 2
    assert "returns no log-probabilities of the prompt's tokens" in capsys.readouterr().err


def test_one_that_stops_giving_them_ends_the_run(server, write_config, capsys):
    server.faults.extend([None] * (CONNECTING + 10) + ["silent"] * 50)
    assert main(["--config", str(write_config(served(server)))]) == 2
    error = capsys.readouterr().err
    assert "returns no log-probabilities" in error
    assert "Saved after step 1" in error


@pytest.mark.parametrize("drift", [0.001, 0.05, float("nan")])
def test_one_that_answers_differently_when_asked_again_is_refused(server, write_config, capsys, drift):
    """Rows that are scored a second time, in another order; what rounding may do is let pass."""
    server.drift = drift
    assert main(["--config", str(write_config(served(server)))]) == (0 if drift == 0.001 else 2)
    error = capsys.readouterr().err
    if drift != 0.001:
        gap = "0.4" if drift == 0.05 else "nan"
        assert f"{gap} nats a token apart, where 0.15 is allowed" in error
        assert [path for path, _ in server.calls].count("/v1/completions") == CONNECTING


def test_other_vocabularies_are_refused(server, tmp_path):
    tokenizer = tiny_tokenizer()
    client = Server(server.url, "teacher.server", timeout_seconds=9, retries=0)
    server.tokenizer.add_tokens(["Paris"])
    with pytest.raises(ServerError, match="has another vocabulary"):
        connect(client, "x", tokenizer)
    server.tokenizer = tiny_tokenizer()
    server.model = tiny_model("qwen3", vocab_size=200)  # too small for the probe's last token
    with pytest.raises(ServerError, match="out of vocabulary"):
        connect(client, "x", tokenizer)


def test_a_short_context_limits_the_prompts(server, write_config, capsys):
    server.max_model_len = 5
    assert main(["--config", str(write_config(served(server)))]) == 2
    assert "less than the models' context of 5 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"loss.objective": "reverse_kl", "teacher.server_gives": "sampled"},
            "loss.objective reverse_kl compares distributions",
        ),
        ({"teacher.server_gives": "top_k"}, "teacher.server_gives is top_k"),
        (
            {"loss.temperature": 2.0, "loss.importance_clip": None, "teacher.server_gives": "sampled"},
            "loss.temperature 2.0 needs the teacher's whole distribution",
        ),
        (
            {"teacher.others": {"two": {"model": "x", "server": "http://127.0.0.1:9", "offload": True}}},
            "teacher.others.two.offload is of weights here",
        ),
        ({"teacher.precision": "int8"}, "teacher.precision int8 is of weights here"),
        ({"loss.baseline": "exact", "teacher.server_gives": "sampled"}, "loss.baseline exact needs"),
        (
            {"loss.objective": "reverse_kl", "teacher.server_gives": "top_k", "student.drop_layers": "auto:1"},
            "student.drop_layers auto:1 needs",
        ),
        ({"teacher.server": "file:///etc/passwd"}, "teacher.server"),
        ({"teacher.server": "127.0.0.1:8000"}, "teacher.server"),
    ],
)
def test_what_a_served_teacher_cannot_do_is_refused_with_the_reason(write_config, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(write_config(SAMPLED | {"teacher.server": "http://127.0.0.1:9"} | changes))


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "jsd"])
def test_a_server_that_names_all_its_tokens_trains_like_a_loaded_teacher(server, write_config, tmp_path, objective):
    """Every one of the vocabulary: the exact objective, but for rounding; what is said of the whole stays unknown."""
    server.max_logprobs = 260
    common = {"loss.objective": objective, "training.max_steps": 2}
    local = {"teacher.model": str(server.folder), "training.output_dir": str(tmp_path / "local")}
    execute(write_config(common | local))
    there = {"teacher.server": server.url, "teacher.server_top_k": 260, "training.output_dir": str(tmp_path / "there")}
    execute(write_config(common | there))
    for one, other in zip(metrics_of(tmp_path / "there"), metrics_of(tmp_path / "local"), strict=True):
        for key in ("loss", "reverse_kl", "student_entropy", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-5), key
        assert one["reverse_kl_exact"] is one["teacher_entropy"] is None
    local = weights_of(tmp_path / "local")
    for name, weight in weights_of(tmp_path / "there").items():
        torch.testing.assert_close(weight, local[name], rtol=1e-3, atol=5e-5)


def test_the_likeliest_tokens_alone_bring_the_student_closer(server, write_config, tmp_path):
    """Five tokens of 260, over micro-batches."""
    changes = {"loss.objective": "reverse_kl", "teacher.server_top_k": 5, "training.tokens_per_micro_batch": 40}
    changes |= {"training.max_steps": 30, "training.num_epochs": 30, "training.learning_rate": 1e-2}
    execute(write_config(changes | {"teacher.server": server.url}))
    found = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_more_tokens_than_a_server_gives_are_refused(server, write_config, capsys):
    path = write_config({"loss.objective": "reverse_kl", "teacher.server": server.url, "teacher.server_top_k": 21})
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "--max-logprobs" in error
    assert "teacher.server_top_k" in error
    server.echo_only = True
    path = write_config({"loss.objective": "reverse_kl", "teacher.server": server.url, "teacher.server_top_k": 5})
    assert main(["--config", str(path)]) == 2
    assert "others give none" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["main", "other", "both"])
def test_each_of_several_teachers_may_have_a_server(server, write_config, tmp_path, where):
    """Records of one, of the other and of both, weighted: as if all were here."""
    records = tmp_path / "records.jsonl"
    shares = ["main", "two", {"main": 0.25, "two": 0.75}]
    lines = [{"prompt": f"{n} + 1", "teacher": share} for n, share in enumerate(shares)]
    records.write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "second"
    tiny_model("llama", vocab_size=260, seed=5).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    second = ModelServer(folder)
    try:
        common = SAMPLED | {
            "prompts.train": str(records),
            "training.prompts_per_step": 3,
            "rollout.prompts_per_batch": 3,
        }
        common |= {"prompts.eval": None, "training.eval_every": None, "training.max_steps": 2, "training.num_epochs": 2}
        for name, served_ones in (("here", ()), ("there", ("main", "other") if where == "both" else (where,))):
            main_model, other = {"teacher.model": str(server.folder)}, {"model": str(folder)}
            if "main" in served_ones:
                main_model |= {"teacher.server": server.url}
            if "other" in served_ones:
                other |= {"server": second.url}
            output = {"training.output_dir": str(tmp_path / name)}
            execute(write_config(common | main_model | output | {"teacher.others": {"two": other}}))
    finally:
        second.stop()
    for one, other in zip(metrics_of(tmp_path / "here"), metrics_of(tmp_path / "there"), strict=True):
        for key in ("loss", "reverse_kl", "student_entropy", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
        assert other["reverse_kl_exact"] is None
    weights = weights_of(tmp_path / "here")
    for name, weight in weights_of(tmp_path / "there").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-5)


def test_the_time_out_and_the_key_of_the_server_arrive(server, monkeypatch):
    client = Server(server.url + "/v1/", "teacher.server", timeout_seconds=0.2, retries=1)
    said = []
    client.report = said.append
    server.faults.extend([60.0, 60.0])
    with pytest.raises(ServerError, match=r"timed out.*Given up after 2 attempts.*raise teacher\.retries"):
        client.call("/v1/completions", {"prompt": [5, 6]})
    assert len(said) == 1
    client.timeout_seconds = 600
    with pytest.raises(ServerError, match="status 404"):
        client.call("/nowhere", {})


def test_the_first_failure_of_many_requests_ends_them(monkeypatch):
    """Only those that are under way come to their end, here after the others have been given up."""
    given_up, done = threading.Event(), []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait)

    def work(item: int) -> int:
        if item == 0:
            raise ServerError("away")
        given_up.wait()
        done.append(item)
        return item

    monkeypatch.setattr("distill.servers.client.ThreadPoolExecutor", Pool)
    with pytest.raises(ServerError, match="away"):
        in_parallel(work, range(10_000))
    assert len(done) <= CONCURRENT
