"""Which file may import, change or export what; read from the source, or from a fresh process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import lightning_mi_prune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_mi_prune"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# A step may import those before it, never one after it.
STEPS = (
    "core",
    "graph",
    "surgery",
    "discovery",
    "calibration",
    "importance",
    "allocation",
    "reconstruction",
    "checkpoint",
    "reporting",
    "pipeline",
    "pruner",
    "planning",
    "export",
    "callbacks",
    "cli",
)
# Take seconds to import, and most programs need none of them.
HEAVY = ("datasets", "matplotlib", "rich", "transformers")
LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
TORCH_FREE = [
    *(name for name in FILES if name.startswith("core/") and "running" not in name),
    *("graph/graph.py", "graph/groups.py", "graph/inputs.py", "graph/layouts.py"),
    *(name for name in FILES if name.startswith("allocation/")),
]
WITH_TORCH = {
    "core/consumers.py",
    "core/empty_linear.py",
    "core/functional.py",
    "core/spilling.py",
    "allocation/mac_counter.py",
    "allocation/mac_meter.py",
    "allocation/macs.py",
}
WITH_TORCH |= {"allocation/measuring.py"}
TORCH_FREE = [name for name in TORCH_FREE if name not in WITH_TORCH]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def module_of(name: str) -> str:
    parts = ["lightning_mi_prune", *name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(name): name for name in FILES}


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What is executed when the file is imported: no bodies of functions, no imports for types."""
    for child in ast.iter_child_nodes(tree):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not deferred and not is_typing_only(child):
            yield child
            yield from nodes_run_at_import(child)


def imports(nodes: Iterator[ast.AST]) -> list[tuple[str, str]]:
    """Modules that are imported, each with the name that is taken from it, or ''."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def own_imports(name: str) -> list[tuple[str, str]]:
    """Files of the package that a file imports, each with the name taken from it, or ''."""
    found = []
    for module, taken in imports(ast.walk(tree_of(name))):
        if f"{module}.{taken}" in MODULES:
            found.append((MODULES[f"{module}.{taken}"], ""))
        elif module in MODULES:
            found.append((MODULES[module], taken))
    return found


def exported(name: str) -> list[str]:
    """``__all__`` of a file, which must be one literal list."""
    lists = [
        node.value
        for node in tree_of(name).body
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        and "__all__" in ast.unparse(node).split("=")[0]
    ]
    assert len(lists) == 1, f"{name}: expected one `__all__ = [...]`"
    found: list[str] = ast.literal_eval(lists[0])
    return found


def step_of(name: str) -> int:
    return STEPS.index(name.removesuffix(".py").split("/")[0])


# ----------------------------------------------------------------------------------------- folders


def test_the_package_has_few_entries() -> None:
    entries = {p.name for p in PACKAGE.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert len(entries) <= 16
    assert {entry.removesuffix(".py") for entry in entries} == set(STEPS)


def test_folders_are_neither_crowded_nor_nearly_empty() -> None:
    for folder in {path.parent for path in FILES.values()} - {PACKAGE}:
        count = len({*folder.glob("*.py")} - {folder / "__init__.py"})
        assert 3 <= count <= (15 if folder.name == "discovery" else 12), (
            f"{folder.name}: {count} files"
        )


# ----------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("name", FILES)
def test_a_step_imports_only_those_before_it(name: str) -> None:
    if name == "__init__.py":
        return
    later = {other for other, _ in own_imports(name) if other != "__init__.py"}
    assert [other for other in sorted(later) if step_of(other) > step_of(name)] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other, _ in own_imports(name):
                visit(other, [*trail, name])
        done.add(name)

    for name in FILES:
        if name != "__init__.py":  # what it offers is imported when it is asked for
            visit(name, [])


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_takes_from_another_is_public_there(name: str) -> None:
    for other, taken in own_imports(name):
        assert not taken or taken in exported(other), f"{taken!r} is not in __all__ of {other}"
    modules = {
        alias.asname or alias.name.rpartition(".")[2]
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if f"{getattr(node, 'module', None)}.{alias.name}" in MODULES or alias.name in MODULES
    }
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            assert not re.match("_[^_]", node.attr), ast.unparse(node)


@pytest.mark.parametrize("name", FILES)
def test_lightning_is_imported_where_a_trainer_is_used(name: str) -> None:
    nodes = ast.walk(tree_of(name))
    if name.startswith(("callbacks/", "cli/")):
        return
    if name == "checkpoint/loading.py":  # in `load_pruned`, which makes a LightningModule
        nodes = nodes_run_at_import(tree_of(name))
    if name == "__init__.py":
        nodes = iter(tree_of(name).body)
    assert [module for module, _ in imports(nodes) if module.split(".")[0] in LIGHTNING] == []


@pytest.mark.parametrize("name", FILES)
def test_heavy_packages_are_imported_by_the_functions_that_need_them(name: str) -> None:
    found = imports(nodes_run_at_import(tree_of(name)))
    assert [module for module, _ in found if module.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_plain_data_is_free_of_torch(name: str) -> None:
    found = imports(nodes_run_at_import(tree_of(name)))
    packages = {module.split(".")[0] for module, _ in found}
    assert packages & {"torch", "torchmetrics"} == set()


def test_every_import_is_a_declared_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    required = project.split("dependencies = [")[1].split("\n]")[0]
    optional = project.split("[project.optional-dependencies]")[1].split("\nbenchmark = ")[0]
    needed, extra = (
        {name.replace("-", "_") for name in re.findall(r'"([a-z-]+)(?:\[[a-z]+\])?>=', part)}
        for part in (required, optional)
    )
    extra |= {"docstring_parser"}  # which jsonargparse[signatures] needs itself
    needed |= {"yaml"} if "pyyaml" in needed else set()  # its module has another name
    assert {"torch", "lightning"} <= needed
    for name in FILES:
        for nodes, known in (
            (nodes_run_at_import(tree_of(name)), needed | (extra if "cli/" in name else set())),
            (ast.walk(tree_of(name)), needed | extra),
        ):
            packages = {module.split(".")[0] for module, _ in imports(nodes)}
            others = packages - sys.stdlib_module_names - {"lightning_mi_prune"}
            assert others <= known, name


def loaded_by(*stages: str) -> list[set[str]]:
    """Packages that each stage of a fresh process adds to those of the stages before it."""
    code = "import sys\n" + "".join(
        f"before = set(sys.modules)\n{stage}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
        for stage in stages
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_the_package_imports_no_other() -> None:
    with_trainer = ["CKALayerPruning", "MutualInformationPruning"]
    without = [name for name in lightning_mi_prune.__all__ if name not in with_trainer]
    package, plain, torch, some, lightning, others = loaded_by(
        "import lightning_mi_prune",
        "\n".join(f"import {module_of(name)}" for name in TORCH_FREE),
        "import torch, torchmetrics",  # which imports transformers and matplotlib itself
        f"from lightning_mi_prune import {', '.join(without)}",
        "import lightning.pytorch",
        f"from lightning_mi_prune import {', '.join(with_trainer)}",
    )
    unwanted = {*HEAVY, *LIGHTNING, "torch", "torchmetrics"}
    assert package & unwanted == set()
    assert plain & unwanted == set()
    assert "torch" in torch
    assert some & {*HEAVY, *LIGHTNING} == set()
    assert "lightning" in lightning
    assert others & {*HEAVY} == set()


# --------------------------------------------------------------------------------------- mutations

CHANGES = {"add_param_group", "append", "clear", "extend", "insert", "pop", "remove", "setdefault"}
CHANGES |= {"update", "__setitem__"}


def changed(tree: ast.AST) -> Iterator[str]:
    """Source of everything that is assigned to, deleted, or changed by a method of containers."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in CHANGES else []
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
            yield from (ast.unparse(part) for part in parts)


def loop_names(tree: ast.AST, iterated: str) -> set[str]:
    """Names of loop variables over something whose source contains a word."""
    return {
        ast.unparse(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and iterated in ast.unparse(node.iter)
    }


OPTIMIZERS = {"surgery/optimizers.py", "surgery/optimizer_state.py"}


def test_optimizers_change_in_one_place() -> None:
    found = set()
    for name in FILES:
        tree = tree_of(name)
        groups = loop_names(tree, ".param_groups")
        for target in changed(tree):
            inside = any(target.startswith(f"{group}[") for group in groups)
            state = re.search(r"optimi[sz]er\w*\.(state|defaults)\b", target)
            if ".param_groups" in target or inside or state:
                found.add(name)
    assert found
    assert found <= OPTIMIZERS


def test_the_strategy_changes_in_one_place() -> None:
    found = {
        name
        for name in FILES
        for target in changed(tree_of(name))
        if re.search(r"\bstrategy\.", target)
    }
    wraps = {name for name, path in FILES.items() if ".configure_ddp(" in path.read_text()}
    assert found == wraps == {"callbacks/distributed.py"}


def test_modules_and_parameters_change_in_surgery() -> None:
    written = r"\._parameters\[|\._modules\[|\._buffers\["
    methods = {"register_parameter", "register_module", "add_module"}
    found = set()
    for name in FILES:
        tree = tree_of(name)
        calls = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        if calls & methods or any(re.search(written, target) for target in changed(tree)):
            found.add(name)
    # An empty layer holds the bias of the one it replaces; the others fill a copy or a new model.
    allowed = {"core/empty_linear.py", "core/running.py", "checkpoint/pretrained.py"}
    assert found
    assert {name for name in found if not name.startswith("surgery/")} <= allowed


# ------------------------------------------------------------------------------------------- names


def order_of(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as ruff sorts ``__all__``."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", FILES)
def test_files_declare_what_is_public(name: str) -> None:
    names, tree = exported(name), tree_of(name)
    assert ast.get_docstring(tree)
    assert names == sorted(set(names), key=order_of)
    if name == "__init__.py":
        return
    defined = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    assert [n for n in names if n in defined and not ast.get_docstring(defined[n])] == []
    assert [n for n in names if n.startswith("_")] == []


def test_public_names_exist_and_are_documented() -> None:
    names = lightning_mi_prune.__all__
    assert names == sorted(names, key=order_of)
    assert 12 <= len(names) <= 17
    assert names == [*lightning_mi_prune._HOME]
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    text = (ROOT / "README.md").read_text() + pages
    for name in names:
        assert getattr(lightning_mi_prune, name).__doc__
        assert re.search(rf"\b{name}\b", text), f"{name} is on no page"


@pytest.mark.parametrize("name", FILES)
def test_nothing_dangerous_is_called(name: str) -> None:
    for module, taken in imports(ast.walk(tree_of(name))):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "joblib", "marshal")
        assert (module, taken) != ("os", "system")
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system")
            assert options.get("shell", "False") == "False"
            assert options.get("trust_remote_code", "False") == "False"
            if called.endswith("torch.load"):
                assert options.get("weights_only") == "True"


# ------------------------------------------------------------------------------- beside the package


def test_the_readme_shows_the_yaml_of_the_demo() -> None:
    readme = (ROOT / "README.md").read_text()
    demo = (ROOT / "examples/text_classification/demo.yaml").read_text()
    assert f"```yaml\n{demo}```" in readme
    assert yaml.safe_load(demo)["trainer"]["callbacks"]


def test_the_files_that_are_run_first_are_there() -> None:
    stems = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    longest = re.findall(r'^    "(test_\w+)",$', (ROOT / "conftest.py").read_text(), re.M)
    assert longest
    for name in longest:
        assert stems.count(name) == 1, name


def test_constraints_pin_every_requirement() -> None:
    pins = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {pin.lower().replace("_", "-") for pin in pins}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^  "([A-Za-z0-9-]+)(?:\[[a-z]+\])?>=', project, re.M)
    assert len(wanted) >= 12
    assert {name.lower() for name in wanted} <= pins
