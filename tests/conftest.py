"""Shared fixtures: small configs, and shape checks for the modules with named types."""

import atexit
import importlib.metadata
import logging
import os
import pathlib
import shutil
import tempfile
from fnmatch import fnmatch

import pytest
from jaxtyping import install_import_hook

# Compilation is most of the time of these tests, in this process and in those they start: programs
# are compiled once for all of them, and not optimised.
_CACHE = tempfile.mkdtemp(prefix="lcm-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"  # a third of the time; later ones abort on it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])  # this checkout's lcm
os.environ.setdefault("JAX_PLATFORMS", "cpu")

MOST_RESIDENT = 5 << 30  # bytes
# Mappings of memory, of which each program has some. Linux gives a process 65,530; jax ends with a
# segmentation fault where it gets no more.
MOST_MAPPINGS = 25_000

# Every call into these modules has its array shapes and dtypes checked against the annotations.
# Modules of pytree dataclasses are left out: jax rebuilds those around leaves that are no arrays.
CHECKED = (
    "lcm.ops.attention.api",
    "lcm.ops.attention.mask",
    "lcm.ops.attention.reference",
    "lcm.ops.losses",
    "lcm.positions",
)
install_import_hook(CHECKED, "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `quick(*patterns)`, the cases whose ids match none of them are slow."""
    for item in items:
        mark = item.get_closest_marker("quick")
        if mark and not any(fnmatch(item.callspec.id, pattern) for pattern in mark.args):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def tiny():
    """A function from overrides to a config of seconds."""
    from lcm import config

    def make(*assignments: str):
        cfg = config.shrink(config.base())
        return config.override(cfg, assignments)

    return make


@pytest.fixture(autouse=True)
def _quiet():
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def _bounded():
    """Programs of earlier modules are let go once they fill the memory; they are on disk."""
    yield
    resident, mappings = _used()
    if resident > MOST_RESIDENT or mappings > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


def _used() -> tuple[int, int]:
    """Bytes in memory and mappings of it; 0 where nobody says."""
    own = pathlib.Path("/proc/self")
    try:
        pages = int((own / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), (own / "maps").read_text().count("\n")
    except (OSError, ValueError, IndexError):
        return 0, 0
