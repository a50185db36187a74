"""Kernels run as plain JAX here, in tiles of 128."""

import pytest

from lcm.ops.attention.pallas import plan


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "interpret", True)
        patch.setattr(plan, "LARGEST", 128)
        yield
