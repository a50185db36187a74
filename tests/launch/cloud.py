"""A cloud of one folder: `gcloud`, `xpk` and what machines have, as far as a launch needs them.

Every command that is run is kept in `calls`. Files beside it say what happens: `states` what a
request goes through, `codes` what trainings end with, where `lost` means that the slice is taken
away under it.
"""

import json
import os
import pathlib
import stat
import subprocess
import sys

_GCLOUD = """\
import json, os, pathlib, shutil, subprocess, sys
here, words = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(here / "calls", "a") as file:
    print(json.dumps([pathlib.Path(sys.argv[0]).name, *words]), file=file)
state, home = here / "state", here / "home"
option = lambda name: next(w.partition("=")[2] for w in words if w.startswith(f"--{name}="))
if "xpk" in sys.argv[0]:
    folder = pathlib.Path(option("script-dir")) if "create" in words else here
    (here / "seen").write_text("\\n".join(sorted(p.name for p in folder.iterdir())))
    sys.exit(int((here / "xpk").read_text()) if "list" in words else 0)
verb = words[3]
if verb == "create":
    if state.exists():
        sys.exit("ALREADY_EXISTS")
    home.mkdir()
    state.write_text((here / "states").read_text())
    (here / "kind").write_text(option("accelerator-type"))
elif verb == "delete":
    state.unlink()
    shutil.rmtree(home)
elif verb == "describe":
    if not state.exists():
        sys.exit("NOT_FOUND")
    now, *later = state.read_text().split()
    if "acceleratorType" in option("format"):
        print((here / "kind").read_text())
    else:
        state.write_text(" ".join(later or [now]))
        print(now)
elif verb == "scp":
    shutil.copy(words[4], home)
elif verb == "ssh":
    command = option("command")
    code = subprocess.run(["bash", "-c", command], cwd=home, stdin=subprocess.DEVNULL).returncode
    if code == 99:  # the machine is gone
        state.write_text("ACTIVE SUSPENDING SUSPENDED")  # as the cloud says, but later
        code = 255
    sys.exit(code)
"""
_UV = """\
import os, pathlib, sys
if sys.argv[1] == "venv":
    there = pathlib.Path(".venv/bin")
    there.mkdir(parents=True)
    (there / "lcm").symlink_to(pathlib.Path(os.environ["FAKE"]) / "bin" / "worker-lcm")
"""
_LCM = """\
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FAKE"])
with open(here / "trained", "a") as file:
    print(json.dumps([os.getcwd(), *sys.argv[1:]]), file=file)
code, *later = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(later))
sys.exit({"lost": 99}.get(code) or int(code))
"""


class Cloud:
    """The folder, and what happened in it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        programs = {"gcloud": _GCLOUD, "xpk": _GCLOUD, "uv": _UV, "worker-lcm": _LCM}
        programs = {name: f"#!{sys.executable} -S\n{code}" for name, code in programs.items()}
        for name, code in (programs | {"sleep": "#!/bin/sh\n"}).items():
            file = folder / "bin" / name
            file.write_text(code)
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        self.say(states="ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE", codes="0", xpk="0")

    def say(self, **values: str) -> None:
        """What happens from now on."""
        for name, value in values.items():
            (self.folder / name).write_text(value)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "FAKE": str(self.folder), "HOME": str(self.folder)}

    def run(self, script: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", script], env=self.environment, capture_output=True, text=True
        )

    def _lines(self, name: str) -> list[list[str]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        """Commands of `gcloud` and `xpk`, word by word."""
        return self._lines("calls")

    @property
    def verbs(self) -> list[str]:
        """What was done, without the looks at the state."""
        return [words[4] for words in self.calls if words[4] != "describe"]

    @property
    def trained(self) -> list[list[str]]:
        """The folder and the words of each training on the workers."""
        return self._lines("trained")
