"""Draws the figures of runs, and compares several methods."""
