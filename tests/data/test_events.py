"""Streams of events: made up by settings that mean what they say, and read."""

import json

import numpy as np
import pytest

from lcm.data.events import JsonlEvents, SyntheticEvents, split
from lcm.errors import ConfigError, DataError
from lcm.evaluation.properties import irregularity, repetition


def test_a_stream_depends_on_its_number_alone():
    a, b = SyntheticEvents(size=5, events=30), SyntheticEvents(size=3, events=30)
    np.testing.assert_array_equal(a[2].codes_N, b[2].codes_N)
    np.testing.assert_array_equal(a[2].times_N, b[2].times_N)
    assert (a[1].codes_N != a[2].codes_N).any() and a[1].name != a[2].name
    with pytest.raises(IndexError):
        b[3]


def test_copying_repeats():
    rates = [
        np.mean([repetition(s.codes_N, 1) for s in SyntheticEvents(20, 100, 10**5, copy=p, zipf=0)])
        for p in (0.0, 0.3, 0.6, 0.9)
    ]
    assert rates[0] < 0.01 and rates == sorted(rates) and rates[3] > rates[1] + 0.1


def test_a_lag_is_the_farthest_that_is_copied():
    for stream in SyntheticEvents(3, 200, 10**6, copy=0.5, lag=1, zipf=0):
        codes = stream.codes_N
        again = codes[1:] == codes[:-1]
        assert 1 + (~again).sum() == len(set(codes.tolist()))  # what has left does not return
        assert again.mean() > 0.3
    all_copied = SyntheticEvents(1, 50, 10**6, copy=1.0)[0].codes_N
    assert (all_copied == all_copied[0]).all()


def test_times():
    clock = SyntheticEvents(2, 50, gap=60, irregularity=0)[1]
    assert irregularity(clock.times_N).deviation == pytest.approx(0, abs=1e-6)
    assert np.diff(clock.times_N) == pytest.approx(60) and clock.times_N[0] == 0
    streams = list(SyntheticEvents(50, 200, gap=60, irregularity=0.8))
    gaps = np.concatenate([np.diff(s.times_N) for s in streams])
    assert gaps.mean() == pytest.approx(60, rel=0.05)
    assert np.log(gaps).std() == pytest.approx(0.8, rel=0.05)


def test_progression_makes_late_codes_rarer():
    streams = list(SyntheticEvents(100, 60, 100, copy=0, zipf=2, progression=1))
    codes = np.stack([s.codes_N for s in streams])
    assert codes.min() >= 1 and codes.max() <= 100
    assert codes[:, :15].mean() < 10 and codes[:, -5:].mean() > 30


@pytest.mark.parametrize(
    "wrong",
    [{"copy": 1.5}, {"events": 0}, {"gap": 0}, {"irregularity": -1}, {"copy": float("nan")}],
)
def test_settings_beyond_their_limits_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value} of events must lie between"):
        SyntheticEvents(**wrong)


def test_streams_are_read(tmp_path):
    file = tmp_path / "e.jsonl"
    lines = [
        {"codes": ["a", "b", "a"], "times": [0, 1.5, 1.5]},
        {"codes": ["b", 7], "times": [3, 4], "name": "x"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    streams = JsonlEvents(file)
    assert [s.codes_N.tolist() for s in streams] == [[1, 2, 1], [2, 3]]
    assert streams[0].times_N.tolist() == [0, 1.5, 1.5] and streams.vocabulary == {
        "a": 1,
        "b": 2,
        7: 3,
    }
    assert [streams.name(i) for i in range(2)] == ["e.jsonl:1", "e.jsonl:x"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "no codes and times"),
        ('{"codes": [], "times": []}', "one event or more"),
        ('{"codes": [1], "times": [1, 2]}', "1 codes and 2 times"),
        ('{"codes": [1.5], "times": [1]}', r"code 1\.5 is not a string"),
        ('{"codes": [1], "times": [true]}', "time True is not a number"),
        ('{"codes": [1, 2], "times": [2, 1]}', "time 1 of event 2 .*goes back"),
        ('{"codes": [1], "times": [NaN]}', "time nan of event 1"),
        ("", "no streams"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, line, match):
    (tmp_path / "e.jsonl").write_text(line)
    with pytest.raises(DataError, match=match):
        JsonlEvents(tmp_path / "e.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        JsonlEvents(tmp_path / "none.jsonl")


def test_a_name_decides_what_is_held_out():
    few, many = SyntheticEvents(50), SyntheticEvents(200)
    assert split(few, 0.3)[1] == [i for i in split(many, 0.3)[1] if i < 50]
    train, held = split(many, 0.3)
    assert sorted(train + held) == list(range(200)) and 30 < len(held) < 90
    with pytest.raises(ConfigError, match="fraction=0"):
        split(few, 0)
