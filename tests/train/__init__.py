"""Tests of rosa_train.

This folder is a package so that its conftest.py is the module `train.conftest`. A second module
named `conftest` would hide tests/conftest.py, which the tests in tests/ops import by that name.
"""
