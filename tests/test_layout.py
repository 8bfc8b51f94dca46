"""The rules of the house: which wing may import which, and how short a step's path stays.

A wing is a folder below `distill/`. Arrows run down only, between wings and between files, those under `TYPE_CHECKING`
and within functions included; what one wing needs of another it takes from that wing's `__init__.py`.
"""

import ast
import graphlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "distill"

# From the ground up: each wing's floor, and what it may import. What is not named it may not.
GROUND = {"config", "grading", "prompts", "servers", "runtime"}
LOSS = {"forward", "models", "runtime"}
ROLLOUT = {"loss", *LOSS, "servers"}
FLOORS: dict[str, tuple[int, set[str]]] = {
    **{wing: (1, set()) for wing in sorted(GROUND)},
    "models": (2, {"config", "runtime"}),
    "forward": (3, {"models", "runtime"}),
    "loss": (4, LOSS - {"models"}),
    "rollout": (5, ROLLOUT),
    "teachers": (5, {"loss", "forward", "models", *GROUND}),
    "training": (6, {"rollout", "teachers", *ROLLOUT, *GROUND}),
    "report": (6, {"runtime", "config"}),
    "run": (7, {"training", "report", "rollout", "teachers", *ROLLOUT, *GROUND}),
}
COMMANDS = {"train", "chat", "evaluate", "report.__main__", "__main__"}  # on the top floor, which may import all of it
USE_KERNELS = {"forward", "loss", "rollout", "training"}
USE_TRANSFORMERS = {"prompts", "models", "forward", "rollout", "teachers", "training", "run"}
# The loop itself takes tensors and callables, never a model's class.
WITHOUT_TRANSFORMERS = {"training.trainer", "training.state", "training.diagnostics", "training.evaluation"}

# What an optimizer step runs: the loop, and the engine that samples. Beside it, each a sitting of its own, stand the
# wings below, the kernels, and what only several ranks need.
STEP = ("training.trainer", "rollout.native")
BESIDE = {"config", "grading", "prompts", "models", "servers", "runtime"}
RANKS = {"training.ranks", "training.sharding", "training.vllm_ranks"}
LONGEST_STEP, LONGEST_FILE, LONGEST_FUNCTION = 2500, 350, 60


class Import(NamedTuple):
    """One `from MODULE import NAME` or `import MODULE`, MODULE without `distill.`."""

    line: int
    module: str
    name: str | None


def module_of(path: Path) -> str:
    """`loss.group` for distill/loss/group.py, `loss` for the wing's face."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(HOUSE.rglob("*.py")) if path != HOUSE / "__init__.py"}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def wing_of(module: str) -> str:
    return module.split(".")[0]


def all_imports(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """Line, module and name of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)


def house_imports(tree: ast.AST) -> list[Import]:
    """The imports of `distill`, each with the deepest module that it names."""
    found = []
    for line, module, name in all_imports(tree):
        if module == "distill" and name is not None:
            found.append(Import(line, name, None))
        elif module.startswith("distill."):
            module = module.removeprefix("distill.")
            inner = f"{module}.{name}"
            found.append(Import(line, inner, None) if inner in MODULES else Import(line, module, name))
    return found


def fault(module: str, target: str, name: str | None) -> str:
    """What is wrong with one import of a module; empty where nothing is."""
    wing, other = wing_of(module), wing_of(target)
    if other == wing:
        through_the_face = "." not in target and module != wing and module not in COMMANDS
        return f"its own wing's face instead of the file that has {name}" if through_the_face else ""
    allowed = set(FLOORS) if module in COMMANDS else FLOORS[wing][1]
    if other not in allowed:
        return f"distill.{target}, and {wing} may import {sorted(allowed)} only"
    return f"distill.{target}, which is private to {other}: take it from distill.{other}" if "." in target else ""


def faults(module: str, tree: ast.AST) -> list[str]:
    """What a module imports against the rules, each with both names and the line."""
    found = [(line, fault(module, target, name)) for line, target, name in house_imports(tree)]
    where = f"distill/{module.replace('.', '/')}"
    return [f"{where}, line {line}: {module} imports {what}" for line, what in found if what]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below(module):
    assert wing_of(module) in FLOORS or module in COMMANDS, f"{module} is in no wing: give it one, in {__file__}"
    assert not faults(module, TREES[module]), "\n".join(faults(module, TREES[module]))


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("loss.group", "from distill.training import Trainer", ["loss.group imports distill.training", "line 1:"]),
        ("runtime.memory", "if TYPE_CHECKING:\n    from distill.loss import Group", ["distill.loss", "line 2"]),
        ("models.lora", "def late():\n    import distill.run.run", ["models.lora imports distill.run.run"]),
        ("rollout.engine", "from distill.loss.group import Group", ["private to loss", "from distill.loss"]),
        ("report.page", "from distill.run import OutputFolder", ["report may import ['config', 'runtime']"]),
        ("loss.group", "from distill.loss import Rollouts", ["its own wing's face"]),
    ],
)
def test_an_arrow_that_runs_up_is_named(module, line, said):
    (fault,) = faults(module, ast.parse(line))
    assert all(words in fault for words in said), fault


def test_floors_and_permissions_run_down():
    for wing, (floor, below) in FLOORS.items():
        assert all(FLOORS[other][0] < floor for other in below), wing
    assert {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)


def faces() -> dict[str, dict[str, str]]:
    """For each wing, the module that defines each name which its face hands on."""
    return {
        wing: {name: module for _, module, name in house_imports(TREES[wing]) if name is not None} for wing in FLOORS
    }


def graph() -> dict[str, dict[str, int]]:
    """Each module with those that it imports, and in which line; through a face, the files behind it."""
    behind = faces()
    return {
        module: {
            behind[target][name] if target in behind else target: line for line, target, name in house_imports(tree)
        }
        for module, tree in TREES.items()
        if module not in FLOORS  # a face only hands on
    }


def circle_of(arrows: dict[str, dict[str, int]]) -> str:
    """One circle of imports, each with its line; empty where there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        back = error.args[1]  # each is imported by the one after it
        return ", ".join(f"{b} imports {a} (line {arrows[b][a]})" for a, b in itertools.pairwise(back))
    return ""


def test_no_circle():
    assert not circle_of(graph())
    assert circle_of({"a": {"b": 3}, "b": {"c": 5}, "c": {"b": 7}}) in (
        "b imports c (line 5), c imports b (line 7)",
        "c imports b (line 7), b imports c (line 5)",
    )


@pytest.mark.parametrize("wing", FLOORS)
def test_a_face_says_what_the_wing_is_for_and_hands_on_what_others_use(wing):
    """In a few lines; and nothing that no other wing or command takes."""
    tree, handed = TREES[wing], faces()[wing]
    said = ast.get_docstring(tree)
    assert "In: " in said, "what enters"
    assert "Out: " in said, "what leaves"
    assert len(said.splitlines()) < 10
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} == {"__all__"}, "only imports and names"
    assert set(ast.literal_eval(tree.body[-1].value)) == set(handed)
    used = {
        name
        for module, other in TREES.items()
        for _, target, name in house_imports(other)
        if target == wing and (wing_of(module) != wing or module in COMMANDS)
    }
    assert set(handed) <= used


def closure(modules: tuple[str, ...]) -> set[str]:
    """The modules that these import, and so on, without those that stand beside a step's path."""
    arrows, found, new = graph(), set(), set(modules)
    while new:
        found |= new
        new = {to for module in new for to in arrows[module] if wing_of(to) not in BESIDE and to not in RANKS} - found
    return found


def test_the_path_of_a_step_reads_in_one_sitting():
    lengths = {module: len(MODULES[module].read_text().splitlines()) for module in closure(STEP)}
    assert {"loss.gradients", "rollout.decode", "forward.packing"} < set(lengths), "the path was not followed"
    assert sum(lengths.values()) <= LONGEST_STEP, f"{sum(lengths.values())} lines: {lengths}"


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    """Those on a step's path and all others."""
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION}
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_kernels_and_transformers_are_where_they_belong(module):
    packages = {name.split(".")[0] for _, name, _ in all_imports(TREES[module])}
    wing = wing_of(module)
    assert ("distill_kernels" in packages) <= (wing in USE_KERNELS or module in COMMANDS)
    allowed = wing in USE_TRANSFORMERS and module not in WITHOUT_TRANSFORMERS
    assert ("transformers" in packages) <= (allowed or module in COMMANDS)


def test_kernels_import_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "distill_kernels"}
    for path in (ROOT / "kernels" / "distill_kernels").glob("*.py"):
        packages = {name.split(".")[0] for _, name, _ in all_imports(ast.parse(path.read_text()))}
        assert packages <= allowed, path.name


def test_kernels_folder_is_no_package():
    # Hugging Face has a package of that name, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
