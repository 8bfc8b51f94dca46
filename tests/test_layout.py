"""The rules of the layout: which module may import which, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each module of distill may import of its siblings; kv_cache and generation_copy are parts of decode and rollout,
# cpu_linear, packing and prefix_attention of forward. `train` and `run` compose everything.
ALLOWED = {
    "config": {"sections", "yaml_file"},
    "sections": set(),
    "yaml_file": set(),
    "sources": set(),
    "metrics": set(),
    "prompts": {"records"},
    "records": set(),
    "models": {"config", "sources"},
    "lora": {"models", "sections"},
    "decode": {"kv_cache"},
    "kv_cache": set(),
    "generation_copy": {"lora", "models"},
    "memory": {"forward"},
    "group": set(),
    "sharding": {"forward", "models"},
    "processes": set(),
    "distributed": {"memory", "models", "processes", "server", "sharding"},
    "health": set(),
    "rollout": {"models", "decode", "kv_cache", "generation_copy", "memory"},
    "forward": {"models", "cpu_linear", "packing", "prefix_attention"},
    "cpu_linear": set(),
    "packing": {"prefix_attention"},
    "prefix_attention": set(),
    "advantage": set(),
    "head_pair": set(),
    "loss": {"advantage", "forward", "group", "head_pair"},
    "server": set(),
    "teacher_server": {"loss", "models", "server"},
    "diagnostics": {"metrics"},
    "trainer": {
        "rollout",
        "forward",
        "group",
        "loss",
        "diagnostics",
        "distributed",
        "checkpoint",
        "memory",
        "metrics",
        "models",
    },
    "checkpoint": {"config", "processes", "tensor_files"},
    "tensor_files": set(),
    "teachers": {"group", "loss", "models", "prompts", "server", "teacher_server"},
    "vllm_engine": {"decode", "lora", "rollout", "server", "teacher_server"},
    "vllm_ranks": {"distributed", "rollout", "server", "vllm_engine"},
    "loading": {
        *("config", "decode", "distributed", "lora", "loss", "memory", "models", "prompts", "rollout", "teachers"),
        *("server", "vllm_engine", "vllm_ranks"),
    },
    "layer_choice": {"config", "evaluate", "group", "loading", "loss", "memory", "models", "prompts"},
    "output": {"checkpoint", "metrics", "processes"},
    "trackers": {"config", "metrics", "output"},
    "summary": {"display", "metrics"},
    "evaluate": {
        *("config", "distributed", "group", "head_pair", "loading", "models", "forward", "prompts"),
        *("rollout", "loss", "memory"),
    },
    "display": {"metrics"},
    "token_view": {"group", "head_pair", "loss"},
    "charts": set(),
    "report": {"charts", "metrics", "output"},
    "card": {"config", "metrics", "summary"},
    "chat": {"config", "models", "prompts"},
}
USE_KERNELS = {"decode", "rollout", "advantage", "head_pair", "loss", "cpu_linear", "evaluate", "token_view"}
USE_TRANSFORMERS = {
    "prompts",
    "teachers",
    "teacher_server",
    "vllm_engine",
    "vllm_ranks",
    "models",
    "loading",
    "rollout",
    "decode",
    "kv_cache",
    "generation_copy",
    "forward",
    "lora",
}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports at run time; what only annotations need is left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "distill")
    return found


MODULES = sorted(path for path in (ROOT / "distill").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_only_what_the_design_allows(path):
    imports = imports_of(path)
    siblings = {name.split(".")[1] for name in imports if name.startswith("distill.")}
    if path.stem not in ("train", "run"):  # these two compose the others
        assert siblings <= ALLOWED[path.stem]
    assert ("distill_kernels" in {name.split(".")[0] for name in imports}) <= (path.stem in USE_KERNELS)
    assert ("transformers" in {name.split(".")[0] for name in imports}) <= (path.stem in USE_TRANSFORMERS)


def test_kernels_import_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "distill_kernels"}
    for path in (ROOT / "kernels" / "distill_kernels").glob("*.py"):
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path.name


def test_kernels_folder_is_no_package():
    # Hugging Face has a package of that name, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_two_packages_only(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"distill", "distill_kernels"}
