"""A small decoder trained on a synthetic task of short lengths.

    lcm train --config configs/task.py:copy_rsc --workdir runs/copy
    lcm train --config configs/task.py --config.data.source=task:addition,train=1-4,test=5-8 ...

The argument names a task of lcm.data.tasks, with fields. Bytes are the tokenizer, so that any task
can be given by `data.source` alone; `data.tokenizer=task:NAME` has its words instead. The loss is
on answers alone. 0.1M parameters, 8.2M tokens; score it with lcm.evaluation.exact_match, since
`lcm evaluate` reads documents without prompts.
"""

from ml_collections import ConfigDict

from lcm import config


def get_config(arg: str = "copy_rsc") -> ConfigDict:
    """A task's spec (copy_rsc), or `SPEC,tiny` or `tiny` for a run of seconds."""
    words = [word for word in arg.split(",") if word]
    spec = ",".join(word for word in words if word != "tiny") or "copy_rsc"
    cfg = config.base()
    cfg.name = spec
    cfg.model.update(width=64, depth=2, heads=4)
    cfg.data.update(source=f"task:{spec}", packing="first_fit", packing_bins=512)
    cfg.train.update(steps=2000, lr=1e-3, batch=16)
    if "tiny" in words:
        config.shrink(cfg)
        cfg.data.length = 128
        cfg.train.batch = 2
    return cfg
