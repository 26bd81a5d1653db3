"""Reads a file of records, and makes the batches of each step from it."""
