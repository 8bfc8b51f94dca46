"""Teachers that see another prompt than the student, several of them, in fewer bits, and in host memory."""

import json
import sys

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_loss import make_rollouts, parts_of

from distill.config import FrozenModel, StudentConfig, TeacherConfig, load_config
from distill.loss import Group, GroupGradient, LossOptions, TeacherView, accumulate_gradients, score, statistics
from distill.models import ModelError
from distill.prompts import PromptError, left_pad, load_prompts, tokenise
from distill.runtime import read_json_lines
from distill.runtime.micro_batches import micro_batches
from distill.teachers import Teacher, load_teachers, teacher_prompts
from distill.teachers.local import HostMemory
from distill.teachers.rounding import FourBits, round_weights
from distill.train import main

LENGTHS, N = [5, 3, 1, 6, 2, 4], 2


ONE_EACH = [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
MIXED = [[0.0, 1.0], [0.3, 0.7], [0.75, 0.25]]


def viewed(weight=ONE_EACH) -> Group:
    """Three prompts with two completions each; two teachers, and another, longer prompt for each of them."""
    rollouts = make_rollouts(LENGTHS, num_rollouts=N, vocab_size=97, prompt_lengths=[4, 2, 6])
    generator = torch.Generator().manual_seed(5)
    seen = [[torch.randint(3, 97, (n,), generator=generator).tolist() for n in each] for each in ((9, 5, 7), (4, 8, 6))]
    return Group.of(rollouts, TeacherView([left_pad(each, 0) for each in seen], torch.tensor(weight)))


@torch.no_grad()
def plain_logprob(model, group: Group, row: int) -> torch.Tensor:
    """A model's log-probabilities of a row's completion after the group's own prompt, whole logits, no padding."""
    prompt, length = group.prompt_index[row], group.completion_lengths[row]
    completion = group.completion_ids[row, :length]
    ids = torch.cat([group.prompt_ids[prompt][group.prompt_mask[prompt]], completion])
    logits = model(ids[None]).logits[0, -length - 1 : -1]
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


@pytest.mark.parametrize("weight", [ONE_EACH, MIXED])
@pytest.mark.parametrize("budget", [10**6, 14])
def test_each_completion_is_scored_by_its_teachers_after_the_prompts_that_they_see(budget, weight):
    """Teachers of two families and widths; their log-probabilities against one plain forward a row and teacher."""
    student = tiny_model("llama", seed=1)
    teachers = [tiny_model("qwen3", seed=2), tiny_model("llama", seed=3, hidden_size=48)]
    group, parts = viewed(weight), [parts_of(model) for model in teachers]
    batches = micro_batches(*group.seen_lengths, budget)
    stats = statistics(parts_of(student), parts, group, batches)
    expected = [
        sum(w * plain_logprob(teachers[t], group.seen_by(t), row) for t, w in enumerate(weight[row // N]) if w)
        for row in range(6)
    ]
    torch.testing.assert_close(stats.teacher_logprob, torch.cat(expected), rtol=1e-5, atol=1e-5)
    own = [plain_logprob(student, group, row) for row in range(6)]
    torch.testing.assert_close(stats.student_logprob, torch.cat(own), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.reward, torch.cat(expected) - torch.cat(own), rtol=1e-5, atol=1e-5)


OPTIONS = [
    LossOptions("reverse_kl"),
    LossOptions("jsd", reduction="token"),
    LossOptions(baseline="group", discount=0.5),
    LossOptions(reward_clip=0.2, baseline="exact"),
]


def gradients(weight, options, budget) -> tuple[torch.Tensor, list[torch.Tensor], GroupGradient]:
    """Loss and gradients of a group, with what else is known of it."""
    student = tiny_model("llama", seed=1)
    parts = [parts_of(tiny_model("qwen3", seed=2)), parts_of(tiny_model("llama", seed=3, hidden_size=48))]
    group = viewed(weight)
    hidden = score(parts, group, micro_batches(*group.seen_lengths, budget))
    assert {key: tuple(states.shape) for key, states in hidden.items()} == {
        (teacher, row): (length, (32, 48)[teacher])
        for row, length in enumerate(LENGTHS)
        for teacher in (0, 1)
        if weight[row // N][teacher]
    }
    result = accumulate_gradients(
        parts_of(student), parts, hidden, group, micro_batches(*group.lengths, budget), options
    )
    return result.loss, [parameter.grad for parameter in student.parameters()], result


@pytest.mark.parametrize("weight", [ONE_EACH, MIXED])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_of_a_group_with_several_teachers_does_not_depend_on_micro_batches(options, weight):
    found = [gradients(weight, options, budget)[:2] for budget in (10**6, 14)]
    largest = max(gradient.abs().max().item() for gradient in found[0][1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6 * max(1, largest))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_of_a_mixture_is_the_weighted_sum_of_the_losses_to_each(options):
    """Every prompt by the same mixture, as a group's weights of tokens do not know of teachers."""
    loss, mixture, result = gradients([[0.3, 0.7]] * 3, options, 10**6)
    alone = [gradients([[1.0 - teacher, float(teacher)]] * 3, options, 10**6) for teacher in (0, 1)]
    torch.testing.assert_close(loss, 0.3 * alone[0][0] + 0.7 * alone[1][0])
    for name in ("reward", "reverse_kl", "teacher_entropy", "student_logprob"):
        each = [getattr(of_one[2].stats, name) for of_one in alone]
        torch.testing.assert_close(getattr(result.stats, name), 0.3 * each[0] + 0.7 * each[1], rtol=1e-4, atol=1e-5)
    for found, one, other in zip(mixture, alone[0][1], alone[1][1], strict=True):
        expected = 0.3 * one + 0.7 * other
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.fixture
def prompt_set(tmp_path):
    def make(*records):
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(path, tiny_tokenizer())

    return make


def teachers_named(*names, **settings) -> list[Teacher]:
    section = FrozenModel(model="x", **settings)
    return [Teacher(name, None, None, tiny_tokenizer(), None, section) for name in names]


def seen_by(prompts, teachers, longest=None, **options):
    return teacher_prompts(prompts, teachers, longest=longest, pad_token_id=0, special=False, **options)


def ids_of(seen, index: int, teacher: int = 0) -> list[int]:
    return seen.seen[index][teacher][0]


def test_a_system_prompt_is_the_teachers_alone_and_replaces_the_prompts_own(prompt_set):
    conversation = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Say <|end|>."}]
    prompts = prompt_set({"prompt": "Say red."}, {"messages": conversation})
    seen = seen_by(prompts, teachers_named(None, system_prompt="Be brief."))
    decode = tiny_tokenizer().decode
    assert decode(ids_of(seen, 0)) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nSay red.<|end|>\n<|start|>assistant\n"
    )
    assert "Be long." not in decode(ids_of(seen, 1))
    assert "Be brief." not in decode(prompts.token_ids[0])
    assert ids_of(seen, 1).count(2) == 2  # the control token that the prompt spells out stays text
    ids, mask = seen.view([1, 0]).prompts[0]
    assert ids[1][mask[1]].tolist() == ids_of(seen, 0)


def test_template_arguments_reach_the_teachers_template_only(prompt_set):
    prompts = prompt_set({"prompt": "Say red."})
    seen = seen_by(prompts, teachers_named(None, chat_template_kwargs={"opening": "Well, "}))
    assert ids_of(seen, 0) == prompts.token_ids[0] + tokenise(
        [{"role": "user", "content": "Well, "}], tiny_tokenizer(chat_template=None), False
    )


def test_one_teacher_that_sees_what_the_student_sees_needs_no_view(prompt_set):
    assert seen_by(prompt_set({"prompt": "Say red."}), teachers_named(None)) is None


def test_a_record_names_its_teacher(prompt_set):
    prompts = prompt_set({"prompt": "1 + 1", "teacher": "maths"}, {"prompt": "Say red."})
    assert seen_by(prompts, teachers_named(None, "maths")).view([0, 1]).weight.tolist() == [[0, 1], [1, 0]]


def test_a_record_names_a_mixture_of_teachers_each_with_a_prompt_of_its_own(prompt_set):
    prompts = prompt_set({"prompt": "1 + 1", "teacher": {"maths": 0.75, "main": 0.25}}, {"prompt": "Say red."})
    brief = teachers_named("maths", system_prompt="Be brief.")
    view = seen_by(prompts, teachers_named(None) + brief).view([0, 1])
    assert view.weight.tolist() == [[0.25, 0.75], [1, 0]]
    texts = [tiny_tokenizer().decode(ids[0][mask[0]]) for ids, mask in view.prompts]
    assert ["Be brief." in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("records", "settings", "expected"),
    [
        ({"prompt": "1 + 1", "teacher": "math"}, {}, "names the teacher 'math', and teacher.others has none"),
        ({"prompt": "a"}, {"system_prompt": "word " * 40}, "64 fit its context"),
        ({"prompt": "a"}, {"chat_template_kwargs": {"tokenize": 1}}, "cannot be tokenised for the teacher"),
    ],
)
def test_what_does_not_fit_a_teacher_is_refused_with_the_prompt(prompt_set, records, settings, expected):
    with pytest.raises(PromptError, match=expected):
        seen_by(prompt_set(records), teachers_named(None, **settings), longest=64)


def test_a_teacher_without_chat_template_cannot_be_given_a_system_prompt(prompt_set):
    section = FrozenModel(model="x", system_prompt="Be brief.")
    bare = [Teacher(None, None, None, tiny_tokenizer(chat_template=None), None, section)]
    with pytest.raises(PromptError, match="tokenizer has none"):
        seen_by(prompt_set({"prompt": "a"}), bare)


def test_context_distillation_teaches_the_student_the_system_prompt(write_config, tiny_pair, tmp_path):
    """The same weights on both sides: all there is to learn is what the teacher's own prompt changes.

    On the training prompts, as random models have nothing in common between one prompt and another.
    """
    changes = {
        "teacher.model": str(tiny_pair["student"]),
        "teacher.system_prompt": "Be brief.",
        "prompts.eval": str(tmp_path / "prompts.txt"),
        "training.num_epochs": 20,
        "training.num_rollouts_per_prompt": 8,
        "training.learning_rate": 3e-3,
    }
    assert main(["--config", str(write_config(changes))]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_reverse_kl_before"] > 0.1
    assert summary["eval_reverse_kl_after"] < 0.5 * summary["eval_reverse_kl_before"]


def test_a_run_with_two_teachers_continues_to_the_same_numbers(write_config, tiny_pair, tmp_path):
    prompts = tmp_path / "named.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Say {i}.", "teacher": ("b", None)[i % 2]}) + "\n" for i in range(4))
    )
    changes = {
        "prompts.train": str(prompts),
        "teacher.others": {"b": str(tiny_pair["student"])},
        "training.prompts_per_step": 2,
        "training.num_epochs": 2,
        "training.save_every": 1,
    }
    config = write_config(changes)
    folders = [tmp_path / name for name in ("whole", "parts")]
    assert main(["--config", str(config), "--training.output_dir", str(folders[0])]) == 0
    for steps in (1, 4):
        options = ["--training.output_dir", str(folders[1]), "--training.max_steps", str(steps)]
        assert main(["--config", str(config), *options]) == 0
    assert load_config(folders[1] / "config.yaml").teacher.others["b"] == str(tiny_pair["student"])
    whole, parts = ([line["loss"] for line in read_json_lines(folder / "metrics.jsonl")] for folder in folders)
    assert whole == parts


def load(config: TeacherConfig) -> Teacher:
    student = StudentConfig(model="unused")
    return load_teachers(config, torch.device("cpu"), torch.float32, "auto", student=student, base=None)[0]


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.05), ("int4", 0.5)])
def test_fewer_bits_change_a_teacher_little_and_leave_its_head(tiny_pair, precision, most):
    if precision == "int8":
        pytest.importorskip("torchao")
    ids = torch.arange(3, 40)[None]
    full, small = (load(TeacherConfig(model=str(tiny_pair["teacher"]), precision=p)) for p in ("float32", precision))
    assert torch.equal(full.parts.head.weight, small.parts.head.weight)
    one, other = (teacher.parts.body.layers[0].mlp.up_proj.weight for teacher in (full, small))
    assert type(one) is not type(other)  # a tensor of 8 bits, and one that is made of 4 for each product
    expected, found = (teacher.model(ids).logits.log_softmax(-1) for teacher in (full, small))
    assert 0 < (expected - found).abs().mean() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_within_half_a_step_and_take_five_a_weight(dtype):
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight[5, 32:64], weight[7, :32] = 0.25, 0  # groups of one value
    bits = FourBits(dtype)
    stored = bits.right_inverse(weight)
    assert sum(part.nbytes for part in stored) * 8 == 5 * weight.numel()
    found = bits(*stored)
    assert (found.dtype, found.shape) == (dtype, weight.shape)
    groups = weight.float().unflatten(1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1))[..., None] / 15
    error = (found.float().unflatten(1, (-1, 32)) - groups).abs()
    assert (error <= 0.5 * step + 2 * torch.finfo(dtype).eps * 4 + 2e-3).all()
    torch.testing.assert_close(found[5, 32:64], weight[5, 32:64])
    # What is on the grid already comes back as it was, to the precision of the scales.
    torch.testing.assert_close(bits(*bits.right_inverse(found)), found, rtol=1e-2, atol=1e-2)


def test_layers_that_no_group_divides_stay_and_no_plain_copy_is_kept():
    model = tiny_model("qwen3", seed=2, intermediate_size=80).requires_grad_(False)
    before = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    down = model.model.layers[0].mlp.down_proj.weight.clone()
    round_weights(model, "int4")
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    kept = sum(layer.mlp.down_proj.weight.nbytes for layer in model.model.layers)
    after = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    assert (after - kept) / (before - kept) == pytest.approx(5 / 32, rel=0.1)  # and the norms


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_teacher_that_is_stored_quantised_is_not_rounded_again(precision):
    model = tiny_model("qwen3")
    model.hf_quantizer = object()
    with pytest.raises(ModelError, match=f"teacher.precision {precision}: the model is stored quantised already"):
        round_weights(model, precision)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_run_with_a_teacher_of_fewer_bits(write_config, tmp_path, precision):
    if precision == "int8":
        pytest.importorskip("torchao")
    assert main(["--config", str(write_config({"teacher.precision": precision}))]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 5


def test_eight_bits_without_torchao_say_what_to_install(tiny_pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    config = TeacherConfig(model=str(tiny_pair["teacher"]), precision="int8")
    with pytest.raises(ModelError, match=r"pip install 'distill-on-policy\[int8\]'"):
        load(config)
    load(TeacherConfig(model=str(tiny_pair["teacher"]), precision="int4"))  # which needs no package


def test_a_body_in_host_memory_computes_what_it_did(monkeypatch):
    """On the CPU the two places are two sets of memory: outside of its phase the body is in the first."""
    body = tiny_model("qwen3", seed=2).requires_grad_(False).base_model
    ids = torch.arange(3, 20)[None]
    expected, at_host = body(ids).last_hidden_state, {p.data_ptr() for p in body.parameters()}
    host, real = HostMemory(body, torch.device("cpu")), torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: real(tensor, *args, **kwargs).clone())
    with host.present():
        monkeypatch.undo()
        assert not at_host & {p.data_ptr() for p in body.parameters()}
        assert torch.equal(body(ids).last_hidden_state, expected)
    assert {p.data_ptr() for p in body.parameters()} == at_host


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_body_in_host_memory_takes_none_of_the_gpus():
    body = tiny_model("qwen3", seed=2).requires_grad_(False).base_model.cuda()
    expected = body(torch.arange(3, 20, device="cuda")[None]).last_hidden_state
    before = torch.cuda.memory_allocated()
    host = HostMemory(body, torch.device("cuda"))
    assert torch.cuda.memory_allocated() < before
    with host.present():
        assert torch.equal(body(torch.arange(3, 20, device="cuda")[None]).last_hidden_state, expected)
    assert all(parameter.is_pinned() for parameter in body.parameters())
