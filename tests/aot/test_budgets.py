"""The budgets beside the configs are kept by what is compiled now: one here, all of them slowly."""

import ast
import json
import pathlib
import re

import pytest

from lcm import config
from lcm.aot import gate
from lcm.aot.chips import GIB
from tests.aot.test_program import needs_libtpu

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
BUDGETS = [
    (file.name.removesuffix(".budget.json"), key)
    for file in sorted(CONFIGS.glob("*.budget.json"))
    for key in json.loads(file.read_text())
]
QUICK = ("llama3_1b", "- v5e:4x4 fsdp=16 full decode")


def test_there_are_budgets():
    assert QUICK in BUDGETS


@pytest.mark.parametrize("name", sorted({name for name, _ in BUDGETS}))
def test_docstring_says_what_the_budget_of_its_command_does(name):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    topology, mesh = re.search(r"--topology (\S+) --mesh (\S+)", text).groups()
    memory = re.search(r"takes (\S+) of (\d+) GiB", text).group(1)
    budget = json.loads((CONFIGS / f"{name}.budget.json").read_text())
    assert f"{budget[f'- {topology} {mesh} full train']['memory'] / GIB:.1f}" == memory


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "key"),
    [b if b == QUICK else pytest.param(*b, marks=pytest.mark.slow) for b in BUDGETS],
)
def test_budget_is_kept(name, key):
    arg, topology, mesh, remat, step = key.split(" ")
    spec = f"{CONFIGS}/{name}.py" + (f":{arg}" if arg != "-" else "")
    cfg = gate.with_mesh(config.load(spec), mesh)
    cfg.model.remat = remat
    report = gate.measure(cfg, step, topology, gate.mesh_of(cfg, topology))
    assert not gate.drifts(spec, report)
    assert not report.findings
