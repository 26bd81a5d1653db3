"""Fixtures that several files of this folder share: tiny models, their data, and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from .train_runs import Runs, write_all

# Helpers that need transformers are imported inside a fixture: a machine without transformers
# skips the tests that ask for the fixture, and runs the others.


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and data for `arguments`. Tests must not write into it."""
    pytest.importorskip("transformers")
    return write_all(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `source` with a tiny GPT-2."""
    pytest.importorskip("transformers")
    return write_all(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Starts training runs in processes of their own."""
    server = Runs()
    yield server
    server.close()


@pytest.fixture(params=["llama", "gpt2"])
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    """A function that makes a tiny model, for each model family."""
    from .train_models import MODELS

    return MODELS[request.param]


@pytest.fixture
def model(make: Callable[[], nn.Module]) -> nn.Module:
    """A tiny model of each family."""
    return make()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved RoSA adapter of a tiny Llama, with two modules_to_save. Tests must not change it."""
    from rosa_train.adapters.save import save_adapter

    from .train_models import give, make_llama

    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = make_llama()
    give(model, "rosa", modules_to_save=["lm_head", "model.norm"])
    save_adapter(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved adapter. The test may change it."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))
