"""The steps of `BESIDE` by MaxText's own `train_compile`, in an environment that has it.

    python3.12 -m venv peer && peer/bin/pip install 'maxtext[tpu]'
    JAX_PLATFORMS=cpu peer/bin/python experiments/pods/peer.py 8192-v5p runs/pods/peer

One step a process. Leaves the text of the program and `NAME.json`, as `experiment.kept` does for
ours; totals of the text are made by the same code. Everything that is not named below is as
MaxText has it: the Llama 3.1 8B of its configs, attention by its kernels, synthetic data.
"""

import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

HLO = pathlib.Path(__file__).parents[2] / "lcm" / "aot" / "hlo.py"  # needs nothing else of lcm
SETTINGS = (
    "model_name=llama3.1-8b",
    "remat_policy=full",
    "attention=flash",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "compile_topology_num_slices=1",
    "run_name=peer",
    "base_output_directory=/tmp/peer",
)


class Peer(NamedTuple):
    """topology: by its name in MaxText, and as `lcm compile` takes it; rows: of a chip."""

    kind: str
    topology: str
    length: int
    rows: float
    mesh: dict[str, int]

    @property
    def settings(self) -> tuple[str, ...]:
        own = {"compile_topology": self.kind, "max_target_length": self.length}
        own |= {"per_device_batch_size": self.rows}
        own |= {f"ici_{axis}_parallelism": size for axis, size in self.mesh.items()}
        return *SETTINGS, *(f"{key}={value}" for key, value in own.items())


PEERS = {
    "8192-v5p": Peer("v5p-128", "v5p:4x4x4", 8192, 4, {"fsdp": 64}),
    "65536-v5p": Peer("v5p-128", "v5p:4x4x4", 65_536, 0.25, {"fsdp": 16, "context": 4}),
    "8192-v5e": Peer("v5e-256", "v5e:16x16", 8192, 1, {"fsdp": 256}),
}


def point(peer: Peer, text: str, used: Any, seconds: float) -> dict[str, Any]:
    """What `experiment.point` says of ours; bytes of one device and step."""
    spec = importlib.util.spec_from_file_location("hlo", HLO)
    hlo = sys.modules["hlo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hlo)
    totals = hlo.Module(text).totals()
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    temporaries = min(used.temp_size_in_bytes, used.peak_memory_in_bytes - held)
    chips = 1
    for size in peer.mesh.values():
        chips *= size
    return {
        "topology": peer.topology,
        "mesh": peer.mesh,
        "tokens": round(peer.length * peer.rows * chips),
        "arguments": used.argument_size_in_bytes,
        "temporaries": temporaries,
        "memory": held + temporaries,
        "host": used.host_temp_size_in_bytes,
        "side": "MaxText",
        "cycles": totals.cycles,
        "seconds": seconds,
        "length": peer.length,
        "sent": {kind: list(each) for kind, each in totals.collectives.items()},
    }


def main(name: str, folder: pathlib.Path) -> None:
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from maxtext.trainers.pre_train import train_compile

    peer, inner = PEERS[name], train_compile.jit_and_compile

    def timed(*args: Any) -> Any:
        start = time.monotonic()
        compiled = inner(*args)
        found = point(
            peer, compiled.as_text(), compiled.memory_analysis(), time.monotonic() - start
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(compiled.as_text())
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        return compiled

    train_compile.jit_and_compile = timed
    base = pathlib.Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    train_compile.main(["train_compile", str(base), *peer.settings])


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
