"""The other process of `schedules`: compiles a program named on its input, prints its kernels."""

import importlib.util
import json
import pickle
import sys
from typing import Any


def main() -> None:
    file, name, given, topology = pickle.load(sys.stdin.buffer)
    fn, args = getattr(_module(file), name)(*given)
    from lcm import aot

    print(json.dumps(aot.compile(fn, *args, topology=topology).kernels))


def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("lcm_aot_build", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
