"""Imports go one way, and the light entrances stay light."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "lcm"

# What each part may import, itself apart. The package's own __init__ and the command line name
# everything, but only when it is used.
BASE = {"types", "errors", "progress"}
TENSORS = BASE | {"ops", "positions", "nn", "models"}
RUNS = TENSORS | {"data", "parallel", "config", "training"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "progress": set(),
    "ops": BASE,
    "positions": BASE | {"ops"},
    "nn": BASE | {"ops", "positions"},
    "models": TENSORS - {"models"},
    "data": BASE,
    "parallel": TENSORS,
    "config": TENSORS | {"data", "parallel"},
    "training": TENSORS | {"data", "parallel", "config"},
    "pretrained": RUNS,
    "decoding": RUNS | {"pretrained"},
    "evaluation": RUNS | {"pretrained", "decoding"},
    "report": RUNS | {"pretrained", "decoding", "evaluation"},
    "aot": RUNS,
    "launch": RUNS,
    "reproduce": RUNS | {"pretrained", "decoding", "evaluation", "report"},
}
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"errors", "cli"}
ALLOWED["__init__"] = set(ALLOWED)

FILES = sorted(PACKAGE.rglob("*.py"))


def part(file: pathlib.Path) -> str:
    """`lcm/models/spec.py` belongs to models, `lcm/config.py` to config."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def module(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file) for file in FILES}


def imported(tree: ast.AST, nodes: list[ast.AST] | None = None) -> set[str]:
    """Modules of lcm that a tree imports, `from lcm import data` as `lcm.data`."""
    names = set()
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return {name for name in names if name == "lcm" or name.startswith("lcm.")}


def at_import(tree: ast.Module) -> list[ast.AST]:
    """The statements that run when a module is imported: those outside of functions."""
    found: list[ast.AST] = []
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        found.append(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        queue += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("file", FILES, ids=module)
def test_direction(file):
    here = part(file)
    assert here in ALLOWED, f"say in this test what lcm.{here} may import"
    for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
        there = name.removeprefix("lcm").removeprefix(".").split(".")[0]
        assert there, f"{module(file)} imports the package itself: import the part it needs"
        assert there == here or there in ALLOWED[here], f"{module(file)} imports {name}"


def test_no_cycle():
    """Each module can be imported first: what runs at import forms no cycle."""
    graph = {}
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[module(file)] = imported(tree, at_import(tree)) & MODULES - {module(file)}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("lcm.types") < order.index("lcm.cli")
    assert sum(map(len, graph.values())) > len(FILES)  # or the parsing found nothing


@pytest.mark.parametrize("name", ["lcm", "lcm.cli", "lcm.data"])
def test_light(name):
    heavy = "{'jax', 'flax', 'optax', 'grain', 'orbax', 'matplotlib', 'numpy'}"
    code = f"import sys, {name}; print(*sorted({heavy} & sys.modules.keys()))"
    run = [sys.executable, "-c", code]
    loaded = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_every_name_of_the_package_is_there():
    import lcm

    assert set(lcm.__all__) <= set(dir(lcm))
    for name in lcm.__all__:
        assert getattr(lcm, name) is not None
    with pytest.raises(AttributeError, match=r"'nothing'.*it has .*apply"):
        _ = lcm.nothing
