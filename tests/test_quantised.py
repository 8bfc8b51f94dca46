"""Models stored quantised: computed with, dequantised, or refused in one message; tiny checkpoints are made by hand."""

import importlib.util
import json
import warnings

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_train import execute, metrics_of
from transformers import AutoConfig, AutoModelForCausalLM, TorchAoConfig

from distill.models import ModelError, load_model, split_head
from distill.train import main

IDS = torch.arange(3, 13)[None]
BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # and the same below zero: E2M1, of the OCP microscaling formats
ABSENT = {"awq": "gptqmodel", "gptq": "optimum", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "quanto": "optimum"}


@pytest.fixture
def save(tmp_path):
    """Writes a tiny model, some tensors replaced, under quantisation settings; returns its folder."""

    def write(settings: dict, tensors=lambda found: found, model=None):
        folder = tmp_path / settings["quant_method"]
        (model or tiny_model("qwen3", vocab_size=264, seed=2)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        path = folder / "model.safetensors"
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return folder

    return write


def in_fp8(tensors: dict) -> dict:
    """Each linear layer's weight in 8 bits, with a scale for each block."""
    found = dict(tensors)
    for name in tensors:
        if "_proj.weight" in name:
            blocks = tensors[name].unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, B, columns, B]
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            found[name] = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale
    return found


def quietly(load):
    """What `load` returns, and what is said of the model's format."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load()
    return model, [str(each.message) for each in caught if "stored as" in str(each.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantised_on_a_cpu_and_said_to_be(save, dtype):
    folder = save(FP8, in_fp8)
    model, said = quietly(lambda: load_model(str(folder), dtype=dtype))
    assert len(said) == 1
    assert f"{folder}" in said[0]
    assert "stored as fp8" in said[0]
    assert f"dequantised to {str(dtype).removeprefix('torch.')}" in said[0]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(model.get_parameter(name), (stored[name].float() * scales).to(dtype))


def test_mxfp4_is_dequantised_on_a_cpu(save):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("gpt_oss", vocab_size=264, eos_token_id=2, pad_token_id=0, **sizes)
    generator = torch.Generator().manual_seed(0)

    def in_mxfp4(tensors: dict) -> dict:
        """The experts' weights as pairs of 4 bits, 32 to a scale; any bytes are a weight."""
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = (experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(120, 126, blocks[:3], dtype=torch.uint8, generator=generator)
        return tensors

    folder = save({"quant_method": "mxfp4"}, in_mxfp4, AutoModelForCausalLM.from_config(config))
    model, said = quietly(lambda: load_model(str(folder), attention="eager"))
    assert "stored as mxfp4" in said[0]
    stored, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    pairs, scales = stored[f"{name}_blocks"].int(), stored[f"{name}_scales"].int()
    table = torch.tensor(FP4 + [-value for value in FP4])
    values = torch.stack([table[pairs & 15], table[pairs >> 4]], -1).flatten(-2)  # the low half first
    expected = torch.ldexp(values, scales[..., None] - 127).flatten(-2).transpose(1, 2)
    assert torch.equal(model.get_parameter(name), expected)
    body, head = split_head(model)
    torch.testing.assert_close(head.logits(body(input_ids=IDS).last_hidden_state), model(input_ids=IDS).logits)


def test_a_student_stored_quantised_is_trained_and_saved_as_a_plain_model(write_config, save):
    folder = save(FP8, in_fp8)
    run = execute(write_config({"student.model": str(folder), "training.max_steps": 1, "prompts.eval": None}))
    assert {parameter.dtype for parameter in run.parts.student.parameters()} == {torch.float32}
    final = run.output.path / "final"
    assert set(load_file(final / "model.safetensors")) == set(tiny_model("qwen3", vocab_size=264).state_dict()) - {
        "lm_head.weight"
    }
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(final)
    assert torch.equal(again(IDS).logits, run.parts.student(IDS).logits)


def test_a_teacher_that_computes_as_it_is_stored_stays_so(write_config, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    plain, folder = tmp_path / "plain", tmp_path / "torchao"
    tiny_model("qwen3", vocab_size=264, seed=2).save_pretrained(plain)
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(folder)
    for each in (plain, folder):
        tiny_tokenizer().save_pretrained(each)
    short = {"training.max_steps": 1, "prompts.eval": None}
    run, said = quietly(lambda: execute(write_config({"teacher.model": str(folder)} | short)))
    assert not said
    weight = run.parts.teachers[0].body.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Int8Tensor"
    again = execute(write_config({"teacher.model": str(plain), "training.output_dir": str(tmp_path / "plain")} | short))
    found, expected = (metrics_of(each.output.path)[0]["reverse_kl_exact"] for each in (run, again))
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    with pytest.raises(ModelError, match="int8: the model is stored quantised"):
        execute(write_config({"teacher.model": str(folder), "teacher.precision": "int8"} | short))
    trained, said = quietly(lambda: load_model(str(folder), trained=True))
    assert not said
    assert torch.equal(trained.model.layers[0].mlp.up_proj.weight, weight.dequantize())


@pytest.mark.parametrize("method", ABSENT)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_format_whose_package_is_absent_is_one_message(write_config, save, capsys, method, side):
    if importlib.util.find_spec(ABSENT[method]):
        pytest.skip(f"{ABSENT[method]} is installed")
    folder = save({"quant_method": method, "bits": 4, "load_in_4bit": method == "bitsandbytes"})
    assert main(["--config", str(write_config({f"{side}.model": str(folder)}))]) == 2
    message = capsys.readouterr().err
    assert f"model {str(folder)!r}: its weights are stored as {method}, which cannot be used here" in message
    assert ABSENT[method] in message.lower()
    assert "name a checkpoint of plain weights" in message
    assert "Traceback" not in message


def test_weights_of_a_format_that_nobody_knows_are_not_taken_for_plain_ones(save):
    with pytest.raises(ModelError, match=r"stored as own-format, .* does not know this format"):
        load_model(str(save({"quant_method": "own-format"})))


def test_what_cannot_compute_as_it_is_stored_is_dequantised_also_where_there_is_a_gpu(save, monkeypatch):
    """A product without its kernel is found before the first step, by the model's own forward."""
    from distill.models import quantised

    folder, probed = save(FP8, in_fp8), []

    def fails(model):
        probed.append(model)
        raise RuntimeError("no kernel for this GPU")

    monkeypatch.setattr(quantised, "_is_quantised", lambda model: not probed)
    monkeypatch.setattr(quantised, "_usable", fails)
    config, read = (
        AutoConfig.from_pretrained(folder),
        lambda **more: AutoModelForCausalLM.from_pretrained(folder, **more),
    )
    options = {"dtype": torch.float32, "device": torch.device("cuda"), "plain": False}
    model, said = quietly(lambda: quantised.load_quantised("it", config, read, **options))
    assert len(probed) == len(said) == 1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
