"""Settings of the recurrence kernels that several tests share."""

import pytest

from lcm.ops.recurrence.pallas import plan


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run as plain JAX."""
    monkeypatch.setattr(plan, "interpret", True)
