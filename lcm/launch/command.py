"""The command itself: from its options to the script, and the script to its end."""

import logging
import os
import re
import shutil
from typing import Any

from lcm import config
from lcm.errors import UserError
from lcm.launch import spec, tpus
from lcm.launch.script import script
from lcm.launch.spec import Launch

_log = logging.getLogger(__name__)


def run(args: Any, overrides: list[str]) -> int:
    """`lcm launch`: becomes its script, whose exit code it has; `--dry-run` prints it.

    Raises:
        UserError: of `spec.check`, and if the program is missing that rents slices.
    """
    slice_ = tpus.find(args.tpu)
    cfg = config.override(config.load(args.config), overrides)
    path, colon, arg = args.config.partition(":")
    here = spec.checkout(path)
    if here.wrong and not args.dry_run:
        raise UserError(here.wrong)
    launch = Launch(
        tpu=slice_,
        name=args.name or _name(cfg.name),
        root=here.root,
        commit=here.commit,
        config=f"{here.file}{colon}{arg}",
        overrides=tuple(overrides),
        workdir=args.workdir,
        zone=args.zone,
        project=args.project,
        capacity="spot" if args.spot else "reserved" if args.reserved else "",
        runtime=args.runtime,
        cluster=args.cluster,
        image=args.image,
        restarts=args.restarts,
        wait=args.wait,
        delete=args.delete,
    )
    spec.check(launch, cfg)
    if here.wrong:
        _log.warning("this would be refused: %s", here.wrong)
    if not launch.workdir:
        _log.warning("no --workdir: the run lies on the workers' disks and goes with the slice")
    text = script(launch)
    if args.dry_run:
        print(text, end="")
        return 0
    program = "xpk" if launch.cluster else "gcloud"
    if shutil.which(program) is None:
        where = "pip install xpk" if launch.cluster else "see cloud.google.com/sdk/docs/install"
        raise UserError(f"lcm launch needs {program}, which is not on the PATH: {where}")
    # In place of this process, so that Ctrl-C and the exit code are those of the script.
    os.execvp("bash", ["bash", "-c", text, "lcm launch"])


def _name(name: str) -> str:
    """The name of an experiment as one of a resource: `llama3_8b` as `llama3-8b`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
