"""The script that a launch is: printed by `--dry-run`, and otherwise run as it is.

One text for both, so that what is shown is what happens. Words of the user stand in it quoted for
the shell here, and those that go to a worker are quoted for the shell there beforehand.
"""

import re
import shlex

from lcm.errors import STOPPED
from lcm.launch.spec import Launch

POLL = 30  # seconds between looks at a slice that is waited for
LOOKS = 5  # at a slice that may have been taken away, until it says so

_HEAD = """\
#!/usr/bin/env bash
# {title}
# Asks {asked}, installs lcm of commit {short} and trains.
# Code {preempted} of training, preempted and saved, lets it go on {again}; others end it.
set -euo pipefail

name={name}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"""

_QUEUED = """\
place=({place})
type={type}
# What workers run, and what their shells expand.
# shellcheck disable=SC2016
install={install}
# shellcheck disable=SC2016
train={train}

tpus() { gcloud compute tpus "$@" "${place[@]}"; }
request() { tpus queued-resources "$1" "$name" "${@:2}"; }
state() { request describe '--format=value(state.state)'; }
workers() {
  # Without signs of life, a machine that is gone is waited for without end.
  tpus tpu-vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

create() {
  request create --node-id="$name" --accelerator-type="$type" \\
    {request}
}

delete() {
  request delete --force
}

# A slice that an earlier launch left is taken as it is; one that was taken away is made anew.
ensure() {
  local now there
  now=$(state 2>/dev/null) || now=
  case $now in
    '') create ;;
    FAILED | SUSPENDING | SUSPENDED) delete && create ;;
    *)
      there=$(request describe '--format=value(tpu.nodeSpec[0].node.acceleratorType)')
      if [[ $there != "$type" ]]; then
        echo "$name is there already and a $there, not a $type: take another name" >&2
        return 2
      fi
      ;;
  esac
}

# Waits up to {wait} minutes. Code {preempted} if the slice is taken away before it was there.
await() {
  local now tries
  for ((tries = 0; tries < {tries}; tries++)); do
    now=$(state) || now=UNKNOWN
    case $now in
      ACTIVE) return 0 ;;
      SUSPENDING | SUSPENDED) return {preempted} ;;
      FAILED | DELETING) break ;;
    esac
    echo "$name is $now, not yet ACTIVE" >&2
    sleep {poll}
  done
  echo "$name is $now and not ACTIVE: look at it with" \\
    "gcloud compute tpus queued-resources describe $name ${place[*]}" >&2
  return 1
}

# One run on one slice, from its code to the code of training.
attempt() {
  await || return
  tpus tpu-vm scp "$folder"/lcm.tar.gz "$name": --worker=all || return
  workers "$install" || return
  workers "$train"
}

# A worker that is gone says nothing, and the others end with any code: what was lost shows in the
# state of the slice, a while later.
lost() {
  local looks
  [[ $1 == {preempted} ]] && return 0
  for ((looks = {looks}; looks; looks--)); do
    case $(state) in SUSPENDING | SUSPENDED) return 0 ;; esac
    ((looks == 1)) || sleep {poll}
  done
  return 1
}

git -C {root} archive --format=tar.gz --output="$folder"/lcm.tar.gz {commit}
ensure
{ending}\
for ((run = 0; run <= {restarts}; run++)); do
  if ((run)); then
    echo "lcm launch: preempted, goes on on a new slice ($run of {restarts})" >&2
    delete
    create
  fi
  code=0
  attempt || code=$?
  if [[ $code == 0 ]] || ! lost "$code"; then break; fi
  code={preempted}
done
exit "$code"
"""

_DELETE_AT_END = """\
trap 'rm -rf "$folder"; {delete} || echo "$name may still be there: delete it" >&2' EXIT
"""

_CLUSTER = """\
place=({place})
# shellcheck disable=SC2016
command={command}

git -C {root} archive --format=tar {commit} | tar -x -C "$folder"
xpk workload create --workload="$name" {request} \\
  --script-dir="$folder" --command="$command" "${place[@]}"
{ending}\
xpk workload list --wait-for-job-completion="$name" "${place[@]}"
"""


def script(launch: Launch) -> str:
    """The bash script of a launch: a queued resource, or a workload of a cluster if there is one.

    Its exit code is that of training, 75 where it was preempted once more than `restarts`, and
    otherwise that of the command which failed.
    """
    return _cluster(launch) if launch.cluster else _queued(launch)


def train(launch: Launch, program: str) -> str:
    """The command of each worker, for its shell."""
    words = [program, "train", "--coordinator=auto", f"--config={launch.config}"]
    words += [f"--workdir={launch.workdir}"] if launch.workdir else []
    return shlex.join([*words, *(f"--config.{each}" for each in launch.overrides)])


def _queued(launch: Launch) -> str:
    folder = f"lcm-{launch.commit[:12]}"
    install = [
        f"rm -rf {folder} && mkdir {folder} && tar -xzf lcm.tar.gz -C {folder} && cd {folder}",
        # Machines of TPUs bring a Python that is too old; uv brings one of its own.
        'export PATH="$HOME/.local/bin:$PATH"',
        "{ command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; }",
        "uv venv --quiet --python 3.12 .venv",
        "uv pip install --quiet --python .venv/bin/python '.[data,tpu]'",
    ]
    request = [f"--runtime-version={launch.runtime or launch.tpu.runtime}"]
    request += [f"--{launch.capacity}"] if launch.capacity else []
    values = {
        "install": shlex.quote(" && ".join(install)),
        "train": shlex.quote(f"cd {folder} && {train(launch, '.venv/bin/lcm')}"),
        "request": shlex.join(request),
        "type": shlex.quote(launch.tpu.type),
        "place": shlex.join(_place(launch, "--quiet")),  # nothing is asked on a terminal
        "tries": str(-(-60 * launch.wait // POLL)),
        "wait": str(launch.wait),
        "poll": str(POLL),
        "looks": str(LOOKS if launch.capacity == "spot" else 1),
        "restarts": str(launch.restarts),
        "ending": _DELETE_AT_END.replace("{delete}", "delete") if launch.delete else "",
    }
    head = {"asked": "for a queued resource", "again": "on a new slice"}
    return _filled(_HEAD + _QUEUED, launch, values | head)


def _cluster(launch: Launch) -> str:
    request = [
        f"--tpu-type={launch.tpu.type}",
        f"--base-docker-image={launch.image}",
        f"--max-restarts={launch.restarts}",
        f"--restart-on-exit-codes={STOPPED}",
        "--termination-grace-period-seconds=300",  # in which a checkpoint is written
    ]
    request += [f"--{launch.capacity}"] if launch.capacity else []
    install = "pip install --quiet '.[data,tpu]'"
    delete = 'xpk workload delete --workload="$name" --force "${place[@]}"'
    values = {
        "command": shlex.quote(f"{install} && {train(launch, 'lcm')}"),
        "request": shlex.join(request),
        "place": shlex.join(_place(launch, f"--cluster={launch.cluster}")),
        "ending": _DELETE_AT_END.replace("{delete}", delete) if launch.delete else "",
    }
    head = {"asked": "the cluster for a workload", "again": "in the same workload"}
    return _filled(_HEAD + _CLUSTER, launch, values | head)


def _place(launch: Launch, first: str) -> list[str]:
    """Where everything is, one word at least: older shells do not know empty lists."""
    given = {"zone": launch.zone, "project": launch.project}
    return [first, *(f"--{key}={value}" for key, value in given.items() if value)]


def _filled(text: str, launch: Launch, values: dict[str, str]) -> str:
    """The text with each `{key}` of small letters replaced once; those of bash have other signs."""
    values = values | {
        "title": f"{launch.config} on {launch.tpu.type}, {launch.tpu.chips} chips "
        f"({launch.tpu.topology}).",
        "name": shlex.quote(launch.name),
        "root": shlex.quote(str(launch.root)),
        "commit": launch.commit,
        "short": launch.commit[:12],
        "preempted": str(STOPPED),
    }
    return re.sub(r"(?<!\$)\{([a-z]+)\}", lambda found: values[found[1]], text)
