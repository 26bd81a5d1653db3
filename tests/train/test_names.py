"""The public names of rosa_train."""

from __future__ import annotations

import pytest

import rosa_train


def test_every_public_name_exists() -> None:
    for name in rosa_train.__all__:
        value = getattr(rosa_train, name)
        assert getattr(value, "__name__", name) == name
    assert set(rosa_train.__all__) <= set(dir(rosa_train))
    assert set(rosa_train._MODULE_OF) == set(rosa_train.__all__)


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rosa_train.nothing
