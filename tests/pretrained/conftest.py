"""Folders of tiny models, and what is read from them."""

import json

import pytest

from lcm import pretrained

from . import cases, make_golden

SHAPES = json.loads((make_golden.FOLDER / "shapes.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A function from a case to a folder of it; keys change its config, `drop` removes them."""

    def make(name: str, *, at: str = "model", drop: tuple = (), dtype="float32", shards=1, **keys):
        config = {k: v for k, v in {**cases.CONFIGS[name], **keys}.items() if k not in drop}
        return cases.write(tmp_path / at, config, SHAPES[name], dtype, shards)

    return make


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """A function from a case to its model."""
    made = {}

    def load(name: str):
        if name not in made:
            at = tmp_path_factory.mktemp("model")
            made[name] = pretrained.load(cases.write(at, cases.CONFIGS[name], SHAPES[name]))
        return made[name]

    return load
