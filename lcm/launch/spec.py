"""What is to be launched, and what can be known to be wrong with it before anything is rented."""

import pathlib
import re
import subprocess
from typing import Any, NamedTuple

from lcm import config, models, parallel, positions
from lcm.errors import ConfigError, UserError
from lcm.launch.tpus import Slice
from lcm.training import optimizer

# Of resources in the cloud, and of xpk's workloads, which may have 40 letters.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class Launch(NamedTuple):
    """One run on one slice.

    tpu: the slice.
    name: of the queued resource and its node, or of the workload.
    root, commit: a checkout and what of it the workers get.
    config: FILE.py or FILE.py:ARG, relative to `root`; overrides: `a.b=value`, in their order.
    workdir: a bucket's folder or a path that all workers share; empty is what `lcm train` takes.
    zone, project: empty ones are those that gcloud is set to.
    capacity: `spot`, `reserved`, or empty for what is on demand.
    runtime: software of the machines.
    cluster, image: of Kubernetes, by xpk; without a cluster, a queued resource is asked for.
    restarts: runs after the first, each on a new slice, of what was preempted.
    wait: minutes for a slice to become active.
    delete: whether the slice is deleted when all is over.
    """

    tpu: Slice
    name: str
    root: pathlib.Path
    commit: str
    config: str
    overrides: tuple[str, ...] = ()
    workdir: str = ""
    zone: str = ""
    project: str = ""
    capacity: str = ""
    runtime: str = ""
    cluster: str = ""
    image: str = "python:3.12"
    restarts: int = 10
    wait: int = 1440
    delete: bool = False


def check(launch: Launch, cfg: Any) -> None:
    """Raises what would fail on the slice after minutes or hours of waiting for it.

    The data are not looked for, as they need not be on this machine; nothing is compiled:
    `lcm compile` says whether a step fits.

    Raises:
        ConfigError: for a config that cannot be, or whose mesh has not as many devices.
        UserError: for a name, a workdir or an override that the cloud does not take.
    """
    if not _NAME.fullmatch(launch.name):
        raise UserError(
            f"--name={launch.name!r} is no name of a resource: take up to 40 small letters, digits "
            "and hyphens, a letter first"
        )
    if launch.workdir and not launch.workdir.startswith(("gs://", "/")):
        raise UserError(
            f"--workdir={launch.workdir} would be a folder of its own on each worker: write "
            "gs://BUCKET/FOLDER, or the absolute path of a file system that all of them mount"
        )
    for text in (launch.config, launch.workdir, *launch.overrides):
        if not text.isprintable():
            raise UserError(
                f"{text!r} has letters that no command line should hold: leave them out"
            )
    if launch.cluster and launch.capacity == "reserved":
        raise UserError(
            "--reserved is of queued resources: a cluster has the capacity that its node pools "
            "were made with, so leave it out beside --cluster"
        )
    for key, least in (("restarts", 0), ("wait", 1)):
        if getattr(launch, key) < least:
            raise UserError(f"--{key}={getattr(launch, key)} must be at least {least}")
    config.check_keys(cfg)
    models.spec(cfg)
    optimizer(cfg.train)
    positions.make_placement(cfg.train.placement).check(cfg.data.length)
    try:
        parallel.sizes(cfg, launch.tpu.chips)
    except ConfigError as error:
        raise ConfigError(f"on {launch.tpu.type}, {launch.tpu.chips} chips: {error}") from error


class Checkout(NamedTuple):
    """Where a config lies, and what stands against launching from there, or nothing."""

    root: pathlib.Path
    commit: str
    file: str
    wrong: str = ""


def checkout(path: str) -> Checkout:
    """The checkout of lcm that a config lies in: workers get what is committed, nothing else."""
    file = pathlib.Path(path).resolve()
    try:
        root = pathlib.Path(_git(file.parent, "rev-parse", "--show-toplevel"))
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        known = _git(root, "ls-files", "--", str(file))
    except (OSError, subprocess.CalledProcessError):
        wrong = (
            f"{path} is in no git checkout with a commit, of which workers get a copy: put it into "
            "configs/ of a checkout of lcm and commit it"
        )
        return Checkout(file.parent, "HEAD", file.name, wrong)
    wrong = ""
    if not (root / "lcm" / "__init__.py").exists():
        wrong = f"{root}, where {path} is, is no checkout of lcm: put it into one"
    elif changed or not known:
        first = changed.partition("\n")[0].split(maxsplit=1)[-1:]
        what = f"{first[0]} is changed" if changed else f"{path} is new"
        wrong = f"{what} since commit {commit[:12]}, which is what workers get: commit it first"
    return Checkout(root, commit, file.relative_to(root).as_posix(), wrong)


def _git(folder: pathlib.Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
