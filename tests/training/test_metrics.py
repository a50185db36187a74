"""What writing metrics takes of a process."""

import os
import subprocess
import sys

PROGRAM = """
import pathlib, sys
from lcm.training.metrics import Metrics

metrics = Metrics(pathlib.Path(sys.argv[1]), 0)
metrics.write(1, {"loss": 1.0})
metrics.close()
assert "torch" not in sys.modules
import torch
print(torch.__file__)
"""


def test_torch_is_not_imported_for_events_and_can_be_later(tmp_path):
    """Not even one that takes no time: any torch is found here before another."""
    (tmp_path / "torch.py").write_text("")
    path = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "torch.py"), done.stderr
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
