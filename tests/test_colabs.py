"""The notebooks run top to bottom, and show what their text says."""

import json
import os
import pathlib
import sys

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
COLABS = ROOT / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))
QUICKSTART = COLABS / "quickstart.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_cell_installs_in_colab_only(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code").source
    condition, _, install = first.partition('if "google.colab" in sys.modules:')
    assert "REPOSITORY = " in condition and "pip" not in condition
    assert "git clone" in install and "pip install" in install
    assert all(line.startswith("    ") for line in install.strip("\n").splitlines())


def test_quickstart_runs_at_a_tiny_scale(tmp_path):
    cells = run(QUICKSTART, tmp_path, {**os.environ, "LCM_TINY": "1"})
    assert packing_error(cells) < 1e-4
    assert len(figures(cells)) == 4
    assert {name for name, _ in table(cells)} == {"RoPE", "ALiBi", "RoPE, windowed"}


@pytest.mark.slow
def test_quickstart_shows_what_it_says(tmp_path):
    tests_only = ("LCM_TINY", "XLA_FLAGS")
    full = {name: value for name, value in os.environ.items() if name not in tests_only}
    cells = run(QUICKSTART, tmp_path, full)
    losses = table(cells)
    assert losses["RoPE", 1024] > losses["RoPE", 128] + 0.3
    assert losses["ALiBi", 1024] < losses["ALiBi", 128] + 0.1
    assert losses["RoPE, windowed", 1024] < losses["RoPE, windowed", 128] + 0.1
    assert losses["RoPE, windowed", 128] == losses["RoPE", 128]
    assert packing_error(cells) < 1e-4


def run(path: pathlib.Path, folder: pathlib.Path, environment: dict[str, str]) -> list:
    """The code cells of a notebook after running it with this Python, in a folder of its own."""
    notebook = nbformat.read(path, as_version=4)
    kernel = folder / "kernels" / "this-python"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    manager = AsyncKernelManager(kernel_name="this-python")
    manager.kernel_spec_manager.kernel_dirs = [str(folder / "kernels")]
    client = NotebookClient(notebook, km=manager, timeout=900)
    client.execute(cwd=str(folder), env={**environment, "TMPDIR": str(folder)})
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    return cells


def printed(cells: list) -> str:
    """What all cells wrote to standard output."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def figures(cells: list) -> list:
    outputs = [output for cell in cells for output in cell.outputs]
    return [o for o in outputs if "image/png" in o.get("data", {})]


def packing_error(cells: list) -> float:
    return float(printed(cells).split("largest difference of their logits:")[1].split()[0])


def table(cells: list) -> dict[tuple[str, int], float]:
    """Mean losses by name and window length, from the lines of the notebook's table."""
    lines = [line for line in printed(cells).splitlines() if " bytes  " in line]
    return {(line[:16].strip(), int(line[16:22])): float(line.split()[-3]) for line in lines}
