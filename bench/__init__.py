"""Benchmarks of rosa_kernels: every kernel is checked before it is timed.

``python -m bench list`` shows the suites. docs/benchmark-method.md explains how they are measured.
The wheel installs this folder as ``rosa_bench``, so its imports are relative. A folder imports only
from the folders below it; tests/test_layering.py checks this::

    __main__
    cli                   the commands: what they print and write
    plot      run         plot: figures from rows; run: checks and times suites, writes rows
    report    suites      report: tables and ratios from rows; suites: the cases
    contenders  layer     contenders: our kernels and the peers; layer: layers in training
    measuring   masks     measuring: clocks, memory, result files; masks: sparsity patterns

In a checkout, ``rows/`` holds measured rows.
"""
