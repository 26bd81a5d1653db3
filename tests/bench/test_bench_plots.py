"""Plots are drawn from result rows. The rows of these tests are synthetic."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree

import pytest

from bench.report.rows import Ratio, ratios_to_peers

pytest.importorskip("matplotlib")

from bench_rows import a_row, gpu_rows
from conftest import sweep
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bench import __main__ as cli
from bench import plot
from bench.measuring import results
from bench.plot import heatmap, layer, style
from bench.plot import rows as plot_rows
from bench.suites import cases


def test_plots_need_only_rows(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    rows = [a_row(op="roof", kernel="copy", case="roof/copy", m=None, n=None)]
    for op, density in itertools.product(("sddmm", "spmm"), (0.001, 0.01, 0.05)):
        for kernel, ms in (("auto", 200 * density), ("dense", 100.0), ("spops", 1000 * density)):
            case = {"op": op, "density": density, "case": f"{op}{density}"}
            rows.append(a_row(**case, kernel=kernel, ms=ms, workspace_bytes=10**5))
    for mask in ("real:14.q_proj", "uniform"):
        case = {"mask": mask, "m": 576, "n": 576, "density": 0.006, "case": mask}
        rows += [a_row(**case), a_row(**case, kernel="spops", ms=0.5)]
    results.append(path, rows)
    assert cli.main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    for name in (
        "time_vs_density_4096x4096_k2048_float32",
        "memory_vs_density_4096x4096_k2048_float32",
        "speedup_heatmap_float32",
        "real_vs_uniform_float32",
    ):
        assert {f"{name}.png", f"{name}.svg"} <= names
        svg = tmp_path / "plots" / f"{name}.svg"
        assert str(svg) in out
        assert svg.stat().st_size < 300_000
        text = " ".join(xml.etree.ElementTree.parse(svg).getroot().itertext())
        assert "Test CPU, 2 threads, torch 2.13.0, 2026-01-02" in text
    assert cli.main(["report", str(path)]) == 0
    assert "a peer is faster" in capsys.readouterr().out.lower()


@sweep(width=[5.0, 7.5, 12.0], name=["CPU", "A processor of many words, " * 6])
def test_notes_stay_within_the_figure(width, name):
    with style.context():
        fig = style.figure(width, 4.0, "Title", f"{'a long note, ' * 6}", a_row(device_name=name))
        text = " ".join(text.get_text() for text in fig.texts)
        machine = " ".join(f"{name}, 2 threads, torch 2.13.0, 2026-01-02".split())
        assert text.rstrip(".").endswith(machine)
        boxes = [text.get_window_extent() for text in fig.texts]
        assert max(box.x1 for box in boxes) <= fig.bbox.width
        for above, below in itertools.pairwise(boxes):
            assert above.y0 >= below.y1 - 2
        top_of_panels = fig.get_layout_engine().get()["rect"][3] * fig.bbox.height
        assert min(box.y0 for box in boxes) > top_of_panels


@sweep(
    case=[
        (2.0, 0.01, "2.0", False),
        (2.0, 0.2, "~2.0", False),
        (1.3, 0.2, "~1.3", True),
        (1.1, 0.1, "1.1", True),
        (0.5, 0.01, "0.50", False),
        (9.96, 0.01, "10", False),
    ]
)
def test_heat_map_cells_show_their_noise(case):
    value, spread, text, hollow = case
    ours, peer = (
        a_row(ms=ms) | {"p20_s": ms / 1e3 * (1 - spread), "p80_s": ms / 1e3 * (1 + spread)}
        for ms in (1.0, value)
    )
    axes = Figure().subplots()
    heatmap._cell(axes, 0, 0, [Ratio(ours, peer)], TwoSlopeNorm(0.0, -4.0, 4.0))
    assert [found.get_text() for found in axes.texts] == [text]
    assert (axes.patches[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)) == hollow


def test_bars_within_noise_are_hollow():
    group = {
        "lora": a_row(ms=1.0),
        "rosa": a_row(ms=1.03),  # p20 to p80 of a_row are 4 % wide
        "full": a_row(ms=1.3),
    }
    axes = Figure().subplots()
    layer._panel(axes, group, [*group], "time", lambda row: row["median_s"], timed=True)
    hollow = [bar.get_facecolor() == (1.0, 1.0, 1.0, 1.0) for bar in axes.patches]
    assert hollow == [False, True, False]


def test_gpu_rows_get_plots_of_their_own(tmp_path):
    tokens = cases.suite("tokens", device="cuda")[:26]
    density = [case for case in cases.suite("density", device="cuda")[:40] if case.m == 4096]
    kept = [*tokens, *density, *cases.suite("rosa", device="cuda")[:4]]
    written = {path.name for path in plot.draw_all(gpu_rows(kept), tmp_path)}
    for name in (
        "speedup_over_dense_bfloat16_cuda",
        "spmm_over_tokens_4096x4096_0.6pc_bfloat16_cuda",
        "sddmm_over_tokens_4096x4096_0.6pc_bfloat16_cuda",
        "own_kernels_4096x4096_k8192_bfloat16_cuda",
        "time_vs_density_4096x4096_k8192_bfloat16_cuda",
        "memory_vs_density_4096x4096_k8192_bfloat16_cuda",
        "real_vs_uniform_bfloat16_cuda",
        "speedup_heatmap_bfloat16_cuda",
    ):
        assert {f"{name}.png", f"{name}.svg"} <= written
        svg = xml.etree.ElementTree.parse(tmp_path / f"{name}.svg")
        text = " ".join(svg.getroot().itertext())
        assert "Synthetic GPU, torch 2.13.0, 2026-01-02" in text
        assert "threads" not in text


def test_each_device_of_a_run_is_drawn_separately(tmp_path):
    densities = (0.001, 0.01, 0.05)
    rows = [
        a_row(density=density, device=device, case=f"{device}{density}", kernel=kernel, ms=1.0)
        for density in densities
        for device in ("cpu", "cuda")
        for kernel in ("auto", "dense")
    ]
    written = {path.name for path in plot.draw_all(rows, tmp_path)}
    assert "time_vs_density_4096x4096_k2048_float32.png" in written
    assert "time_vs_density_4096x4096_k2048_float32_cuda.png" in written


def test_only_the_fastest_of_a_family_is_drawn():
    rows = [
        a_row(kernel="auto"),
        a_row(kernel="cusparse", ms=3.0),
        a_row(kernel="cusparse-alg2", ms=2.0),
        a_row(kernel="cusparse-alg2", ms=1.0, charge="op"),
    ]
    kept = plot_rows.fastest_of_families(rows)
    assert [(row["kernel"], row["median_s"]) for row in kept if row["charge"] != "op"] == [
        ("auto", 0.001),
        ("cusparse", 0.002),
    ]


def test_problems_share_lines_beyond_a_limit():
    suite = cases.suite("density", device="cuda")
    found = ratios_to_peers(gpu_rows(suite), "from_token_major")
    every, _ = plot_rows.lines(found, most=10**6)
    few, line_of = plot_rows.lines(found, most=80)
    assert len(every) > 400
    assert len(few) <= 80
    assert {line_of(ratio.ours) for ratio in found} == set(few)
