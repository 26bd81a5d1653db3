"""Attaches, switches and merges adapters, and reads and writes their files."""
