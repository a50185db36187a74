"""Settings of the kernels that several tests share."""

import pytest

from lcm.ops.attention.pallas import plan


@pytest.fixture(scope="module")
def interpreted():
    """Kernels run as plain JAX, in tiles of 128."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "interpret", True)
        patch.setattr(plan, "LARGEST", 128)
        yield
