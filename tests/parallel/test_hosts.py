"""How a run of several processes is asked for, what they agree on, and what is refused."""

import socket
import threading

import pytest
from programs import free_port

from lcm import cli
from lcm.errors import CheckpointError, ConfigError, HostError, UserError
from lcm.parallel import hosts, meeting
from lcm.training import stopping, watch

HERE = ["--coordinator=localhost:1234", "--processes=2", "--process=1"]


class Store:
    """The store of a coordination service, for threads in the place of processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        assert value
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [item for item in self.values.items() if item[0].startswith(folder)]


@pytest.fixture
def each(monkeypatch):
    """A function that calls another as every one of some processes, each a thread here."""
    here, store = threading.local(), Store()
    monkeypatch.setattr(hosts.jax, "process_index", lambda: here.process)
    monkeypatch.setattr(hosts, "client", lambda: store)

    class Turns:
        def __next__(self) -> int:
            here.turn = getattr(here, "turn", -1) + 1
            return here.turn

    monkeypatch.setattr(hosts, "_turns", Turns())

    def call(count, act):
        monkeypatch.setattr(hosts.jax, "process_count", lambda: count)
        found = [None] * count

        def run(process):
            here.process = process
            try:
                found[process] = act(process)
            except Exception as error:
                found[process] = error

        threads = [threading.Thread(target=run, args=(process,)) for process in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return found

    call.store = store
    return call


def test_flags_come_before_the_environment():
    environment = {"LCM_COORDINATOR": "there:1", "LCM_PROCESSES": "4", "LCM_PROCESS": "2"}
    assert hosts.asked(environment={}) is None
    assert hosts.asked(environment=environment) == hosts.Start("there:1", 4, 2, hosts.WAIT)
    assert hosts.asked("here:2", process=3, wait=9, environment=environment) == hosts.Start(
        "here:2", 4, 3, 9
    )
    assert hosts.asked("auto", environment={}) == hosts.Start("auto", None, None, hosts.WAIT)


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (["--coordinator=localhost:1234"], {}, "--processes (LCM_PROCESSES) is missing"),
        (["--process=0", "--processes=1"], {}, "--coordinator (LCM_COORDINATOR) is missing"),
        ([], {"LCM_PROCESSES": "2", "LCM_PROCESS": "0"}, "(LCM_COORDINATOR) is missing"),
        ([], {"LCM_PROCESSES": "two"}, "LCM_PROCESSES='two' is not a whole number"),
        ([*HERE, "--process=2"], {}, "--process=2 is not one of the 2 of --processes"),
        ([*HERE, "--process=-1"], {}, "numbered from 0 to 1"),
        ([*HERE, "--processes=0"], {}, "--processes=0 must be at least 1"),
        ([*HERE, "--coordinator=localhost"], {}, "--coordinator=localhost is not HOST:PORT"),
        ([*HERE, "--coordinator=localhost:http"], {}, "is not HOST:PORT"),
        ([*HERE, "--coordinator=localhost:70000"], {}, "is not HOST:PORT"),
        ([*HERE, "--coordinator=auto"], {}, "leave them out"),
        ([*HERE, "--wait=0"], {}, "--wait=0 must be at least 1 second"),
        ([*HERE, "--processes=many"], {}, "argument --processes: invalid int value: 'many'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words, environment, says, monkeypatch, capsys, tmp_path
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["train", "--config=configs/byte_lm.py:tiny", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*arguments, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lcm: error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "run").exists()


def met(*callers: tuple[int, int], wait: int = 20) -> list:
    """How processes, each with its number and that of all, fare when they meet."""
    address, found = f"localhost:{free_port()}", [None] * len(callers)

    def run(place, process, processes):
        try:
            meeting.meet(address, processes, process, wait)
        except Exception as error:
            found[place] = error

    threads = [
        threading.Thread(target=run, args=(place, *caller)) for place, caller in enumerate(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_processes_meet():
    assert met((0, 3), (1, 3), (2, 3)) == [None] * 3


@pytest.mark.parametrize(
    ("callers", "kind", "says"),
    [
        ([(1, 2)], HostError, "did not answer within 1 s"),
        ([(0, 2)], HostError, "process 1 of 2 did not come to localhost"),
        ([(0, 4), (2, 4)], HostError, "process 1, 3 of 4 did not come"),
        ([(0, 2), (1, 3)], ConfigError, "--processes=3 of process 1 is 2 for process 0"),
        ([(0, 3), (1, 3), (1, 3)], ConfigError, "--process=1 was given to two processes"),
    ],
)
def test_processes_that_do_not_meet_are_told_why(callers, kind, says):
    for error in met(*callers, wait=1):
        assert type(error) is kind and says in str(error)


def test_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"port {port} of .* choose another"):
            meeting.meet(f"localhost:{port}", 2, 0, 1)


def test_texts_are_gathered_in_the_order_of_processes(each):
    def twice(process):
        return hosts.gather(f"a{process}"), hosts.gather("" if process else "b")

    assert each(3, twice) == [(["a0", "a1", "a2"], ["b", "", ""])] * 3


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(CheckpointError("in use"), CheckpointError), (OSError("cut short"), RuntimeError)],
)
def test_error_of_one_is_the_error_of_all(each, raised, expected):
    def act(process):
        def fail():
            if process == 1:
                raise raised

        return hosts.by_all(fail)

    found = each(3, act)
    assert found[1] is raised
    for other in (found[0], found[2]):
        assert isinstance(other, expected) and str(raised) in str(other)


def test_first_acts_alone_and_its_error_ends_all(each):
    acted = []

    def act(process):
        hosts.by_first(lambda: acted.append(process))
        hosts.by_first(lambda: (_ for _ in ()).throw(ConfigError("no room")))

    found = each(4, act)
    assert acted == [0]
    assert [type(error) for error in found] == [ConfigError] * 4


def test_processes_of_different_configs_are_refused(each):
    found = each(3, lambda process: hosts.check_same("config", str(process == 2)))
    assert all("process 2 has another config than process 0" in str(error) for error in found)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_all_stop_after_the_latest_step_that_any_has_begun(each, ahead):
    """Whoever hears the signal, at whatever step the others are, and even if they wait there."""
    barrier = threading.Barrier(3)

    def act(process):
        stop = stopping.Stop([15] if process == 1 else [], 10)
        for _ in range(ahead if process == 0 else 1):
            assert stop.more()
        barrier.wait()
        for _ in range(3):  # hears, promises, takes the promises of all
            stop.look(each.store)
            barrier.wait()
        while stop.more():
            pass
        return stop.begun

    assert each(3, act) == [10 + max(ahead, 1)] * 3


def test_nothing_is_promised_before_the_step_is_known(each):
    def act(process):
        stop = stopping.Stop([15])
        stop.look(each.store)
        unknown = stop.promised
        stop.restored(3 + process)
        stop.look(each.store)
        return unknown, stop.promised

    assert each(2, act) == [(None, 3), (None, 4)]


def test_one_process_stops_at_once(monkeypatch):
    received = []
    stop = stopping.Stop(received, 0)
    assert stop.more() and stop.more()
    received.append(15)
    assert not stop.more() and stop.begun == 2


def test_lost_process_is_said_in_one_line(each):
    def act(process):
        with hosts.losses_said():
            if process == 0:
                raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer\nmore")
            raise KeyError("a bug")

    lost, bug = each(2, act)
    assert isinstance(lost, HostError) and isinstance(lost, UserError)
    assert "process 0 of 2 lost another" in str(lost) and "\n" not in str(lost)
    assert isinstance(bug, KeyError)


def test_hang_is_told_with_stacks_and_ends_one_of_several(tmp_path, each, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(hosts, "end", ended.append)
    monkeypatch.setattr(watch.sys, "stderr", watch.sys.__stderr__)

    def act(process):
        seen = watch.Watch(tmp_path, 5)
        seen.restored(7)
        seen.since -= 20
        seen.look()  # the first step, which compiles: 50 seconds
        assert not ended
        seen.ended(8)
        seen.write()
        seen.look()
        assert not ended
        seen.since -= 20
        seen.look()
        seen.look()

    assert each(1, act) == [None]
    assert ended == [] and "in act" in (tmp_path / "hang-0.txt").read_text()
    said = capfd.readouterr().err
    assert said.count("lcm: warning: process 0: no step has ended for 20 s after step 8") == 1
    assert [beat["step"] for beat in watch.heartbeats(tmp_path)] == [8]

    def hang(process):
        seen = watch.Watch(tmp_path, 5)
        seen.ended(7 + process)
        seen.write()
        seen.since -= 20
        if process == 0:
            seen.look()

    ended.clear()
    assert each(2, hang) == [None] * 2
    assert ended == [watch.HUNG]
    assert "lcm: error: process 0: no step has ended" in capfd.readouterr().err
