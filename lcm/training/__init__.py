"""Training: one compiled step, exact resume, metrics."""

from lcm.training.checkpoints import restore_params, steps
from lcm.training.loop import Result, abstract_state, check, train
from lcm.training.optimizers import optimizer, schedule
from lcm.training.step import TrainState, init_state, make_step

__all__ = [
    "Result",
    "TrainState",
    "abstract_state",
    "check",
    "init_state",
    "make_step",
    "optimizer",
    "restore_params",
    "schedule",
    "steps",
    "train",
]
