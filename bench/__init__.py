"""Benchmarks of rosa_kernels: cases declared once, every kernel checked before it is timed.

``python -m bench list`` shows what there is; docs/benchmark-method.md says how it is measured.
"""
