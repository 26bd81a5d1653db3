"""Benchmarks of rosa_kernels: cases declared once, every kernel checked before it is timed.

``python -m bench list`` shows what there is; docs/benchmark-method.md says how it is measured.
The wheel installs this folder as ``rosa_bench``, so its imports are relative. A room imports what
lies below it, which tests/test_layering.py holds::

    __main__
    cli                   the commands: what they print and write
    plot      run         figures, from rows alone / suites on devices: checked, timed, written
    report    suites      tables and ratios, from rows alone / the cases
    contenders  layer     our kernels and the peers / a layer or a model in training
    measuring   masks     clocks, memory, result files, tables of strings / sparsity patterns

In a checkout, ``rows/`` holds measured rows.
"""
