"""Clocks, memory, the machine's description, result files, and console output."""
