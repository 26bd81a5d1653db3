"""Runs suites on devices: checks every contender, times it, and writes its rows at once."""
