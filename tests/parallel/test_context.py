"""Sequences over several devices: the same step as on one, and what is refused."""

import jax
import numpy as np
import pytest
from context_cases import EXCHANGES, GIVEN, KEPT, MODELS, OPS, QUICK
from programs import result, start

from lcm import models, parallel
from lcm.errors import ConfigError
from lcm.ops.attention import Spread


def run(names: list[str]) -> dict:
    """How far eight devices are from one, by case and quantity: see `context_cases`."""
    program = start("tests/parallel/context_cases.py", ",".join(names), devices=8)
    return result(program, timeout=1200)


@pytest.fixture(scope="module")
def found():
    return run([*OPS, *KEPT, GIVEN, *QUICK])


def are_equal(errors: dict) -> None:
    assert "[0]['loss']" in errors and "[1]['embedding']['table']" in errors
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("name", QUICK)
def test_loss_and_gradients_are_those_of_one_device(found, name):
    are_equal(found[name])


@pytest.mark.slow
def test_all_meshes_give_loss_and_gradients_of_one_device():
    names = [name for name in MODELS if name not in QUICK]
    for name, errors in run(names).items():
        print(name)
        are_equal(errors)


@pytest.mark.parametrize("name", OPS)
def test_recurrences_pass_states_and_gradients_on(found, name):
    assert len(found[name]) >= 5
    assert max(found[name].values()) < 5e-6, found[name]


@pytest.mark.parametrize("name", KEPT)
def test_backward_pass_keeps_no_keys_of_other_devices(found, name):
    assert 0.9 < found[name]["share"] < 1.5


def test_an_exchange_is_of_the_rows_of_a_device(found):
    assert found[GIVEN]["share"] == 1


@pytest.mark.slow
def test_scans_do_not_wait_for_each_chunk_of_other_devices():
    for name, counts in run([*EXCHANGES]).items():
        assert counts["2"] == counts["8"] > 0, name


@pytest.mark.parametrize("name", ["plain", "zigzag", "striped"])
def test_orders_are_permutations_that_balance_a_causal_mask(name):
    at = parallel.order(name, 48, 4)
    np.testing.assert_array_equal(np.sort(at), np.arange(48))
    pairs = (at.reshape(4, 12) + 1).sum(1)  # keys that the queries of each device see
    if name == "zigzag":
        assert len(set(pairs)) == 1
    if name == "striped":
        assert np.ptp(pairs) < 48
    if name == "plain":
        assert pairs[-1] > 6 * pairs[0]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["mesh.order=zigzag", "data.length=40"],
            "data.length=40 is not divisible by 16.*48",
        ),
        (["mesh.order=zigzag", "model.pattern=('mamba2',)"], "recurrence of mamba2 needs: set"),
        (["mesh.order=striped", "model.positions=cope"], "which CoPE counts: set mesh.order=plain"),
        (["model.context_attention=ulysses"], "mesh.context=8 .* 8, which do not divide .*heads=2"),
        (["model.context_attention=rings"], "'rings' is unknown: choose from auto, gather, ring"),
        (["mesh.order=zig"], "mesh.order='zig' is unknown: choose from plain, zigzag, striped"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, assignments, message):
    cfg = tiny("mesh.context=8", "mesh.data=1", "data.length=64", *assignments)
    with pytest.raises(ConfigError, match=message):
        parallel.make(cfg, [jax.devices()[0]] * 8)


def test_methods_are_of_the_layers_of_a_config(tiny):
    cfg = tiny("model.context_attention=ring", "mesh.order=striped")
    assert [layer.over for layer in models.spec(cfg).layers] == [Spread("ring", "striped")]
    with pytest.raises(ValueError, match="how='rings'"):
        Spread("rings")
