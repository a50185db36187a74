"""Workdirs of runs that were saved before their first step."""

import jax
import numpy as np

from lcm import config, models
from lcm.training import checkpoints, init_state, optimizer, workdir

LENGTH = 16


def write_run(folder, *overrides):
    """A workdir as after step 0, of rows of 16 bytes of three texts."""
    text = folder / "text.txt"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0).choice(list("abcdefgh \n"), 9_000)
    text.write_text("".join(drawn))
    cfg = config.override(
        config.shrink(config.base()),
        [
            "data.source=text",
            f"data.paths={text}",
            "data.heldout=1.0",
            f"data.length={LENGTH}",
            f"name={folder.name}",
            *overrides,
        ],
    )
    state = init_state(models.spec(cfg), optimizer(cfg.train), jax.random.key(0), 0.0)
    workdir.write_config(folder, cfg)
    writer = checkpoints.Writer(folder, keep=1)
    writer.save(state, {}, workdir.to_dict(cfg))
    writer.finish()
    writer.close()
    return folder
