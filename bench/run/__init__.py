"""Suites on devices: every contender checked, then timed; rows written as they come."""
