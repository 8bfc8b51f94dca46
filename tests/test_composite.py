"""Models of text and pictures: the language model inside is trained, and what is saved is what was loaded."""

import json

import pytest
import torch
from conftest import TINY_SIZES, tiny_tokenizer
from safetensors.torch import load_file
from test_train import execute, metrics_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from benchmarks.plan.shapes import shape_of
from distill.models import is_adapted, load_model, split_head
from distill.models.composite import auto_class, other_parameters
from distill.rollout.generation_copy import GenerationCopy
from distill.runtime import read_json_lines

VOCAB_SIZE = 264
IDS = torch.arange(3, 13)[None]
TEXT = TINY_SIZES | {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2}
# As many layers as the language model has, where a family allows it: the two stacks must not be taken for one another.
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS |= {"image_size": 28, "patch_size": 14}
BLOCKS = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
BLOCKS |= {"num_position_embeddings": 16}
LINEAR = {f"linear_{name}": size for name, size in (("num_key_heads", 2), ("num_value_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES = {
    "gemma3": ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, LAYERS),
    "mistral3": ({"model_type": "mistral"}, LAYERS | {"model_type": "pixtral", "head_dim": 16}),
    "qwen3_5": (LINEAR | {"layer_types": ["linear_attention", "full_attention"]}, BLOCKS),
    "qwen3_vl": ({}, BLOCKS | {"deepstack_visual_indexes": [0]}),
}


def tiny_composite(family: str, seed: int = 0):
    """A random model of text and pictures, as large as the others of the tests."""
    text, vision = FAMILIES[family]
    config = AutoConfig.for_model(family, text_config=TEXT | text, vision_config=vision)
    config.image_token_id = config.image_token_index = VOCAB_SIZE - 1
    config.text_config.initializer_range = 0.3
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.fixture
def save(tmp_path):
    """Writes a tiny model of a family with a tokenizer and what its pictures go through; returns its folder."""

    def write(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
        folder = tmp_path / f"{family}-{seed}"
        tiny_composite(family, seed).to(dtype).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SomeImageProcessor"}')
        return folder

    return write


def is_language(name: str) -> bool:
    return name.startswith(("model.language_model.", "language_model.", "lm_head."))


def config_of(folder) -> dict:
    """A saved configuration but for the dtypes in it: weights are trained, and saved, in float32."""
    return json.loads((folder / "config.json").read_text(), object_hook=lambda found: found | {"dtype": None})


def check_saved(final, source) -> None:
    """Of two folders: the same class and configuration; the other parts bit for bit, the language model changed."""
    ours, theirs = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (final, source))
    assert type(ours) is type(theirs)
    configs = [config_of(folder) for folder in (final, source)]
    assert configs[0] == configs[1]
    assert configs[0]["architectures"] == [type(theirs).__name__]
    found, expected = (load_file(folder / "model.safetensors") for folder in (final, source))
    assert set(found) == set(expected)
    others = {name for name in expected if not is_language(name)}
    assert others
    for name in others:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name
    changed = {
        name for name in set(expected) - others if not torch.equal(found[name].to(expected[name].dtype), expected[name])
    }
    assert len(changed) > 5
    assert not ours.get_output_embeddings().weight.dtype.itemsize < 4, (
        "trained weights would be rounded as they are loaded"
    )
    assert (final / "preprocessor_config.json").read_text() == (source / "preprocessor_config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_trained_and_all_else_is_saved_as_it_was(write_config, save, family):
    folder = save(family, torch.bfloat16)
    engine = "transformers" if family == "qwen3_5" else "native"
    changes = {"student.model": str(folder), "training.max_steps": 2, "rollout.engine": engine, "prompts.eval": None}
    changes["teacher.model"] = str(save(family, seed=1))  # what a tokenizer is depends on the family
    run = execute(write_config(changes | {"training.learning_rate": 0.01}))
    trained = {name for name, p in run.parts.student.named_parameters() if p.requires_grad}
    assert trained
    assert all(map(is_language, trained))
    assert len(metrics_of(run.output.path)) == 2
    check_saved(run.output.path / "final", folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_are_those_that_text_passes(save, family):
    model = load_model(str(save(family)))
    body, head = split_head(model)
    torch.testing.assert_close(head.logits(body(input_ids=IDS).last_hidden_state), model(input_ids=IDS).logits)
    inside = {id(parameter) for parameter in (*body.parameters(), *model.get_output_embeddings().parameters())}
    assert id(head.weight) in inside
    others = {id(parameter) for parameter in other_parameters(model)}
    assert others
    assert not others & inside
    assert len(others) + len(inside) == len(list(model.parameters()))


@pytest.fixture
def copies(save):
    """A generation copy of a model of a family, and the model."""

    def make(family: str, dtype: torch.dtype = torch.bfloat16):
        model = load_model(str(save(family)))
        return GenerationCopy(model, dtype, eos_token_ids=[2], pad_token_id=0, pack=True).model, model

    return make


def test_a_generation_copy_shares_the_other_parts(copies):
    copied, model = copies("gemma3")
    ours, theirs = ({p.data_ptr() for p in other_parameters(each)} for each in (copied, model))
    assert ours == theirs
    assert len(ours) > 10
    towers = [[type(module) for module in each.model.vision_tower.modules()] for each in (copied, model)]
    assert towers[0] == towers[1], "none of its layers is packed"


def test_layers_are_dropped_from_the_language_model_alone(save):
    model, whole = (load_model(str(save("gemma3")), drop_layers=dropped) for dropped in ([0], []))
    assert model.config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 1
    assert model.config.text_config.layer_types == ["full_attention"]
    assert model.config.vision_config.num_hidden_layers == 2
    assert len(list(other_parameters(model))) == len(list(other_parameters(whole)))


@pytest.mark.parametrize(("student", "teacher"), [("qwen3_vl", None), (None, "mistral3"), ("gemma3", "qwen3_vl")])
def test_a_pair_may_have_pictures_on_either_side(write_config, save, student, teacher):
    sides = {"student": student, "teacher": teacher}
    models = {f"{side}.model": str(save(family)) for side, family in sides.items() if family}
    run = execute(write_config(models | {"training.max_steps": 1, "prompts.eval": None}))
    assert metrics_of(run.output.path)[0]["grad_norm"] > 0
    assert [bool(list(other_parameters(run.parts.student)))] == [student is not None]


def test_both_engines_sample_the_same_from_a_model_of_pictures(write_config, save):
    folder, found = save("qwen3_vl"), {}
    for engine in ("native", "transformers"):
        changes = {"student.model": str(folder), "training.max_steps": 1, "prompts.eval": None}
        changes |= {"rollout.engine": engine, "training.output_dir": str(folder.parent / engine)}
        run = execute(write_config(changes))
        assert run.parts.engine.engine == engine
        found[engine] = [line["completion"] for line in read_json_lines(run.output.path / "rollouts.jsonl")]
    assert found["native"] == found["transformers"]


def test_adapters_are_put_into_the_language_model_alone_and_resumed(write_config, save, tmp_path):
    folder = save("gemma3")
    changes = {"student.model": str(folder), "student.lora.rank": 4, "training.learning_rate": 0.01}
    changes |= {"training.max_steps": 2, "training.save_every": 1, "prompts.eval": None}
    run = execute(write_config(changes))
    inside = {name for name, module in run.parts.student.named_modules() if is_adapted(module)}
    assert inside
    assert all("language_model" in name for name in inside)
    check_saved(run.output.path / "final", folder)
    expected = run.parts.student(input_ids=IDS).logits
    code = (run.output.path / "adapter" / "README.md").read_text().split("```")[1].removeprefix("python\n")
    names: dict = {}
    exec(code, names)
    torch.testing.assert_close(names["model"](input_ids=IDS).logits, expected, rtol=0, atol=1e-3)
    start = str(run.output.path / "checkpoints" / "step-000001")
    again = execute(write_config(changes | {"training.resume": start, "training.output_dir": str(tmp_path / "again")}))
    ours, theirs = (each.parts.student.state_dict() for each in (run, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics_of(run.output.path) == metrics_of(again.output.path)


def test_a_text_model_of_a_family_with_pictures_stays_one(tmp_path):
    """Of some families the language model alone is a class of its own, and a folder may name it."""
    config = AutoConfig.for_model("qwen3_5_text", **TEXT, **FAMILIES["qwen3_5"][0])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert not list(other_parameters(model))
    whole = AutoConfig.for_model("qwen3_5", text_config=config.to_dict())
    assert auto_class(whole) is AutoModelForMultimodalLM
    whole.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class(whole) is AutoModelForCausalLM


def test_other_parts_keep_their_dtype_unless_that_would_round_them(save):
    folder = save("mistral3", torch.bfloat16)
    trained, teacher = (load_model(str(folder), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in other_parameters(trained)} == {torch.bfloat16}
    assert {parameter.dtype for parameter in split_head(trained)[0].parameters()} == {torch.float32}
    wide = save("gemma3")
    (wide / "config.json").write_text((wide / "config.json").read_text().replace("float32", "bfloat16"))
    rounded = {parameter.dtype for parameter in other_parameters(load_model(str(wide)))}
    assert torch.float32 in rounded, "what is stored in float32 stays so, whatever the configuration says"
    assert {parameter.dtype for parameter in other_parameters(teacher)} == {torch.bfloat16}


def test_the_planner_counts_the_language_model(save):
    folder = save("mistral3")
    model = load_model(str(folder))
    body, _ = split_head(model)
    norms = sum(parameter.numel() for parameter in body.parameters() if parameter.dim() == 1)
    assert shape_of(str(folder)).parameters == sum(parameter.numel() for parameter in body.parameters()) - norms
