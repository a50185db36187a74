"""Where a program will run, which need not be where it is traced."""

import jax


def platform() -> str:
    """cpu, gpu or tpu: that of the mesh in use (`jax.set_mesh`), else that of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
