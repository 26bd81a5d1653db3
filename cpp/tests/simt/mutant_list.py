"""The faults that mutants.py plants."""

from __future__ import annotations

from dataclasses import dataclass

# The message of a failed check, or of an exception that no test expects.
ANY_FAILURE = r"\.(?:cpp|h|cu|cuh):\d+: |what\(\): "
OUT_OF_BOUNDS = r"AddressSanitizer: "


@dataclass(frozen=True)
class Mutant:
    """One fault in a kernel.

    Args:
        name: The kernel and the fault.
        file: Path below cpp/src.
        original: Text that occurs exactly once in the file.
        replacement: The text that replaces it.
        test: The test that must fail, in cpp/tests/simt.
        why: What goes wrong in the kernel.
        sanitizer: The sanitizer to build with: "" or "address".
        seen_as: A pattern that the test's stderr must match.
    """

    name: str
    file: str
    original: str
    replacement: str
    test: str
    why: str
    sanitizer: str = ""
    seen_as: str = ANY_FAILURE


def out_of_bounds(
    name: str, file: str, original: str, replacement: str, test: str, why: str
) -> Mutant:
    """A fault that AddressSanitizer must find."""
    return Mutant(name, file, original, replacement, test, why, "address", OUT_OF_BOUNDS)


PLATFORM, SPMM_LAUNCH = "cuda/platform.h", "cuda/spmm.cu"
TILE, WGMMA, PACK = "cuda/sddmm_tile.cuh", "cuda/sddmm_wgmma.cuh", "cuda/pack.cuh"
GATHER, FINALIZE = "cuda/sddmm_gather.cuh", "cuda/sddmm_finalize.cuh"
SPMM_GATHER, SPMM_STAGED = "cuda/spmm_gather.cuh", "cuda/spmm_staged.cuh"
SPMM_TILE, ENTRIES = "cuda/spmm_tile.cuh", "cuda/csr_entries.cuh"
SPUTNIK_SDDMM = "cuda/baselines/sputnik_style_sddmm.cuh"
SPUTNIK_SPMM = "cuda/baselines/sputnik_style_spmm.cuh"
SDDMM_TEST, WGMMA_TEST = "test_cuda_sddmm", "test_cuda_sddmm_wgmma"
SPMM_TEST, BASELINES_TEST = "test_cuda_spmm", "test_cuda_baselines"

SDDMM_MUTANTS = [
    Mutant(
        "tile: missing barrier before a stage is read",
        TILE,
        "      __syncthreads();\n      if (block + Shape::kStages - 1 < piece.end) load(",
        "      if (block + Shape::kStages - 1 < piece.end) load(",
        SDDMM_TEST,
        "a warp reads what another one copies, or refills what another one reads",
    ),
    Mutant(
        "tile: early refill",
        TILE,
        "      copy_async_wait<Shape::kStages - 2>();\n",
        "      if (block + Shape::kStages - 1 < piece.end) load(block + Shape::kStages - 1);\n"
        "      copy_async_wait<Shape::kStages - 2>();\n",
        SDDMM_TEST,
        "the stage that is refilled is still being read",
    ),
    Mutant(
        "tile: waits for too few copies",
        TILE,
        "copy_async_wait<Shape::kStages - 2>();",
        "copy_async_wait<Shape::kStages - 1>();",
        SDDMM_TEST,
        "the stage to be read has not landed",
    ),
    Mutant(
        "tile: missing drain",
        TILE,
        "    copy_async_wait<0>();\n    __syncthreads();",
        "    copy_async_wait<0>();\n",
        SDDMM_TEST,
        "sums overwrite stages that another warp still reads",
    ),
    Mutant(
        "tile: missing barrier before sampling",
        TILE,
        "    __syncthreads();\n    sample_tile<",
        "    sample_tile<",
        SDDMM_TEST,
        "sums of other warps are read before they are written",
    ),
    Mutant(
        "tile: missing barrier between tiles",
        TILE,
        "sampled, threadIdx.x);\n    __syncthreads();",
        "sampled, threadIdx.x);\n",
        SDDMM_TEST,
        "copies of the next tile overwrite sums that are still read",
    ),
    Mutant(
        "tile: wrong swizzle",
        TILE,
        "((step * 2 + half_a) ^ (line_a % 8))",
        "((step * 2 + half_a) ^ (line_a % 4))",
        SDDMM_TEST,
        "lines 4 to 7 of eight are read in the wrong order",
    ),
    Mutant(
        "tile: slices left as they were",
        TILE,
        "int32_t slice = piece.slice + 1;",
        "int32_t slice = piece.slice + 2;",
        SDDMM_TEST,
        "a slice that nobody wrote is added",
    ),
    Mutant(
        "tile: pieces overwrite each other",
        TILE,
        "piece.accumulate = piece.end < args.blocks;\n  if (piece.accumulate) {",
        "piece.accumulate = false;\n  if (piece.end < args.blocks) {",
        WGMMA_TEST,
        "only the last piece of a long sum is kept",
    ),
    Mutant(
        "wgmma: barriers not fenced",
        WGMMA,
        "    fence_proxy_async();\n",
        "",
        WGMMA_TEST,
        "bulk copies may count their bytes on barriers that are not initialised yet",
    ),
    Mutant(
        "wgmma: empty stage not awaited",
        WGMMA,
        "      mbarrier_wait(&shared.empty[place.stage], place.round ^ 1);\n",
        "",
        WGMMA_TEST,
        "the stage that is refilled is still being read",
    ),
    Mutant(
        "wgmma: full stage not awaited",
        WGMMA,
        "    mbarrier_wait(&shared.full[place.stage], place.round);\n",
        "",
        WGMMA_TEST,
        "the stage to be read has not landed",
    ),
    Mutant(
        "wgmma: rounds not counted",
        WGMMA,
        "      round ^= 1;\n",
        "",
        WGMMA_TEST,
        "from the second round on, waits end at once or never",
    ),
    Mutant(
        "wgmma: stage given back too early",
        WGMMA,
        "    wgmma_wait<1>();\n",
        "    wgmma_wait<2>();\n",
        WGMMA_TEST,
        "the products of the stage before may still read it",
    ),
    Mutant(
        "wgmma: stage given back before its own products",
        WGMMA,
        "if (elected && i > 0) mbarrier_arrive(&shared.empty[before]);\n    before = place.stage;",
        "before = place.stage;\n    if (elected && i + 1 < blocks) "
        "mbarrier_arrive(&shared.empty[before]);",
        WGMMA_TEST,
        "the products just issued still read the stage",
    ),
    Mutant(
        "wgmma: too few bytes announced",
        WGMMA,
        "mbarrier_expect_bytes(full, WgmmaTile::kStageBytes);",
        "mbarrier_expect_bytes(full, WgmmaTile::kBytesA);",
        WGMMA_TEST,
        "a phase ends when part of the stage has landed",
    ),
    Mutant(
        "wgmma: missing fence",
        WGMMA,
        "    wgmma_fence();\n",
        "",
        WGMMA_TEST,
        "accumulators are not handed over to the wgmma",
    ),
    Mutant(
        "wgmma: products not awaited",
        WGMMA,
        "  wgmma_wait<0>();\n",
        "",
        WGMMA_TEST,
        "sums are read before they are written",
    ),
    Mutant(
        "wgmma: wrong column step",
        WGMMA,
        "swizzled_descriptor(b + step * 2 * kSegmentBytes)",
        "swizzled_descriptor(b + step * kSegmentBytes)",
        WGMMA_TEST,
        "products of different tokens are added",
    ),
    Mutant(
        "wgmma: missing barrier before sampling",
        WGMMA,
        "    named_barrier_sync(kBarrier, kThreads);\n    for (int32_t first",
        "    for (int32_t first",
        WGMMA_TEST,
        "sums of other warps are read before they are written",
    ),
    Mutant(
        "wgmma: missing barrier between quarters",
        WGMMA,
        "++quarter) {\n    named_barrier_sync(kBarrier, kThreads);",
        "++quarter) {\n",
        WGMMA_TEST,
        "a quarter is overwritten while it is read",
    ),
    Mutant(
        "wgmma: missing barrier after mbarrier_init",
        WGMMA,
        "  __syncthreads();\n  let_next",
        "  let_next",
        WGMMA_TEST,
        "barriers are used before they are initialised",
    ),
    Mutant(
        "pack: missing barrier",
        PACK,
        "  __syncthreads();\n  transpose_to_lines(",
        "  transpose_to_lines(",
        SDDMM_TEST,
        "the tile is transposed before it is loaded",
    ),
    Mutant(
        "pack: wrong last row",
        PACK,
        "if (index < side.size) p =",
        "if (index < side.size - 1) p =",
        SDDMM_TEST,
        "the operand's last row is not packed",
    ),
    Mutant(
        "pack: wrong tail of the tokens",
        PACK,
        "const int64_t count = token < tokens ?",
        "const int64_t count = token <= tokens ?",
        SDDMM_TEST,
        "a token past the chunk's end is packed, in both operands",
        "address",
        rf"{OUT_OF_BOUNDS}|{ANY_FAILURE}",
    ),
    Mutant(
        "pack: wrong swizzle",
        PACK,
        "                                  (s ^ (p & 7)) * kSegmentBytes);",
        "                                  (s ^ (p & 3)) * kSegmentBytes);",
        SDDMM_TEST,
        "half of the lines are packed in another order than they are read in",
    ),
    out_of_bounds(
        "pack: reads past a row",
        PACK,
        "if (vector && count >= kWords) return",
        "if (vector && count > 0) return",
        SDDMM_TEST,
        "the last vector of the operand reaches past its end",
    ),
    out_of_bounds(
        "pack: writes before the panel",
        PACK,
        "    if (p >= 0)\n      *panel_segment(side, block, p, half * 4",
        "    *panel_segment(side, block, p, half * 4",
        SDDMM_TEST,
        "rows without a position go to position -1",
    ),
    Mutant(
        "gather: wrong tail of the tokens",
        GATHER,
        "lane % kSegments < segments)",
        "lane % kSegments <= segments)",
        SDDMM_TEST,
        "a segment past the last one is read",
        "address",
        rf"{OUT_OF_BOUNDS}|{ANY_FAILURE}",
    ),
    out_of_bounds(
        "gather: writes past the last nonzero",
        GATHER,
        "  if (lane >= count) return;\n",
        "  if (lane > count) return;\n",
        SDDMM_TEST,
        "one lane too many stores its sum",
    ),
    Mutant(
        "gather: wrong row of a nonzero",
        GATHER,
        "if (crow[middle] <= t) {",
        "if (crow[middle] < t) {",
        SDDMM_TEST,
        "a row's first nonzero is taken for the row before's",
    ),
    Mutant(
        "gather: wrong lanes exchange",
        GATHER,
        "__shfl_xor_sync(kAll, odd ? x : y, 8)",
        "__shfl_xor_sync(kAll, odd ? x : y, 4)",
        SDDMM_TEST,
        "sums of different nonzeros are added",
    ),
    out_of_bounds(
        "finalize: one nonzero too many",
        FINALIZE,
        "if (e >= heavy.count + light.count) return;",
        "if (e > heavy.count + light.count) return;",
        SDDMM_TEST,
        "reads and writes past the ends",
    ),
    Mutant(
        "finalize: does not wait for the kernel ahead",
        FINALIZE,
        "  wait_for_kernel_ahead();\n",
        "",
        SDDMM_TEST,
        "sums are read before the kernel ahead has written them",
    ),
    Mutant(
        "finalize: forgets a slice",
        FINALIZE,
        "for (int32_t s = 1; s < slices; ++s)",
        "for (int32_t s = 1; s < slices - 1; ++s)",
        SDDMM_TEST,
        "the last slice is not added",
    ),
]

SPMM_MUTANTS = [
    Mutant(
        "launch: no permission for static and dynamic shared memory together",
        PLATFORM,
        "if (grid.shared_bytes > 0) allow",
        "if (grid.shared_bytes > 48 * 1024) allow",
        SPMM_TEST,
        "a launch of 48 KiB less the static part, up to 48 KiB, is refused",
    ),
    Mutant(
        "spmm staged: static shared memory not counted",
        SPMM_LAUNCH,
        "if (shared + kStagedStatic<T> > device.shared_bytes) continue;",
        "if (shared > device.shared_bytes) continue;",
        SPMM_TEST,
        "the launch is refused where slots alone would fit",
    ),
    Mutant(
        "spmm gather: missing barrier before the tasks",
        SPMM_GATHER,
        "  __syncthreads();\n\n  const int count = tasks",
        "  const int count = tasks",
        SPMM_TEST,
        "tasks are taken before they are all listed",
    ),
    Mutant(
        "spmm gather: missing barrier before the results leave",
        SPMM_GATHER,
        "  __syncthreads();\n\n  if (cuts > 0) {",
        "  if (cuts > 0) {",
        SPMM_TEST,
        "results of other warps are read before they are written",
    ),
    Mutant(
        "spmm gather: wrong tail of a row",
        SPMM_GATHER,
        "if (kFull || entry < count) loaded",
        "if (kFull || entry <= count) loaded",
        SPMM_TEST,
        "column 0 is read for an entry that does not exist: 0 times its Inf is NaN",
    ),
    Mutant(
        "spmm staged: missing barrier after staging",
        SPMM_STAGED,
        "    }\n  }\n  __syncthreads();\n\n  //",
        "    }\n  }\n\n  //",
        SPMM_TEST,
        "slots are read before they are filled",
    ),
    Mutant(
        "spmm staged: missing barrier between chunks",
        SPMM_STAGED,
        "store_rows(shared.out, to, rows, tokens);\n    __syncthreads();",
        "store_rows(shared.out, to, rows, tokens);\n",
        SPMM_TEST,
        "the next chunk's rows are listed over results that have not been stored",
    ),
    Mutant(
        "spmm tile: missing barrier in the main loop",
        SPMM_TILE,
        "    __syncthreads();\n    if (step + 1 < 2 * slab_count) load(",
        "    if (step + 1 < 2 * slab_count) load(",
        SPMM_TEST,
        "a warp reads what another one copies, or refills what another one reads",
    ),
    Mutant(
        "spmm tile: copies not awaited",
        SPMM_TILE,
        "    copy_async_wait<0>();\n",
        "    copy_async_wait<1>();\n",
        SPMM_TEST,
        "the step to be read has not landed",
    ),
    Mutant(
        "spmm tile: missing barrier after clearing",
        SPMM_TILE,
        "    clear_slab(slabs);\n    __syncthreads();\n",
        "    clear_slab(slabs);\n",
        SPMM_TEST,
        "one thread clears what another thread wrote into the slab",
    ),
    Mutant(
        "spmm tile: missing drain",
        SPMM_TILE,
        "    }\n  }\n  __syncthreads();",
        "    }\n  }\n",
        SPMM_TEST,
        "sums overwrite a slab that another warp still reads",
    ),
    Mutant(
        "spmm tile: wrong swizzle",
        SPMM_TILE,
        "((col % kStepCols / 8) ^ (row % 8))",
        "((col % kStepCols / 8) ^ (row % 4))",
        SPMM_TEST,
        "half of the rows of a slab are stored in another order than they are read in",
    ),
    Mutant(
        "spmm tile: columns that were never packed",
        SPMM_TILE,
        "first_col + col < args.active_cols ? 16 : 0",
        "first_col + col < args.active_cols + 1 ? 16 : 0",
        SPMM_TEST,
        "NaN in a column past the last one shows, or lies past the panel",
        "address",
        rf"{OUT_OF_BOUNDS}|{ANY_FAILURE}",
    ),
    Mutant(
        "spmm tile: wrong tail of the tokens",
        SPMM_TILE,
        "if (token + u < args.tokens) to[",
        "if (token + u <= args.tokens) to[",
        SPMM_TEST,
        "a token too many is stored",
    ),
    Mutant(
        "spmm tile: wrong last row",
        SPMM_TILE,
        "if (position >= args.active_rows) break;",
        "if (position + 1 >= args.active_rows) break;",
        SPMM_TEST,
        "the last row is not stored",
    ),
    Mutant(
        "spmm gather: missing barrier before the listing",
        SPMM_GATHER,
        "  __syncthreads();\n  list_rows(",
        "  list_rows(",
        SPMM_TEST,
        "tasks are counted before the counters are zero",
    ),
    Mutant(
        "spmm gather: missing barrier after joining",
        SPMM_GATHER,
        "    join_pieces(tasks, cuts, partial, out);\n    __syncthreads();\n",
        "    join_pieces(tasks, cuts, partial, out);\n",
        SPMM_TEST,
        "joined rows are stored before they are complete",
    ),
    Mutant(
        "spmm staged: missing barrier before the tasks",
        SPMM_STAGED,
        "    __syncthreads();\n\n    const auto& counters",
        "    const auto& counters",
        SPMM_TEST,
        "tasks are taken before they are all listed",
    ),
    Mutant(
        "spmm staged: missing barrier before the results leave",
        SPMM_STAGED,
        "    __syncthreads();\n\n    if (cuts > 0) {",
        "    if (cuts > 0) {",
        SPMM_TEST,
        "results of other warps are read before they are written",
    ),
    Mutant(
        "spmm staged: missing barrier after joining",
        SPMM_STAGED,
        "shared.partial, shared.out);\n      __syncthreads();\n",
        "shared.partial, shared.out);\n",
        SPMM_TEST,
        "joined rows are stored before they are complete",
    ),
    Mutant(
        "spmm tile: missing barrier before the light entries",
        SPMM_TILE,
        "= 0;\n  __syncthreads();\n  const int32_t begin = args.strip_light",
        "= 0;\n  const int32_t begin = args.strip_light",
        SPMM_TEST,
        "the beginning of a row's light entries is cleared after it was found",
    ),
    Mutant(
        "spmm tile: missing barrier before the rows",
        SPMM_TILE,
        "  __syncthreads();\n  finish_rows<T>",
        "  finish_rows<T>",
        SPMM_TEST,
        "sums and light entries of other warps are read before they are written",
    ),
    Mutant(
        "spmm unpermute: missing barrier",
        SPMM_TILE,
        "  __syncthreads();\n  Word* c =",
        "  Word* c =",
        SPMM_TEST,
        "the tile is transposed before it is loaded",
    ),
]

ENTRY_MUTANTS = [
    out_of_bounds(
        "csr_add_: one entry too many",
        ENTRIES,
        "own.valid[u] = own.entry[u] <= last;",
        "own.valid[u] = own.entry[u] <= last + 1;",
        "test_cuda_csr_add",
        "reads past the last entry",
    ),
    Mutant(
        "csr_gather: wrong row of an entry",
        ENTRIES,
        "if (int64_t{args.crow[middle]} - base <= own.entry[u]) {",
        "if (int64_t{args.crow[middle]} - base < own.entry[u]) {",
        "test_cuda_csr_gather",
        "a row's first entry is taken for the row before's",
    ),
    Mutant(
        "csr_scatter_: wrong stride of the values",
        ENTRIES,
        "if (own.valid[u]) value[u] = values[own.entry[u] * args.value_stride];",
        "if (own.valid[u]) value[u] = values[own.entry[u]];",
        "test_cuda_csr_scatter",
        "values that are not contiguous are read as if they were",
    ),
    Mutant(
        "sputnik-style spmm: missing __syncwarp",
        SPUTNIK_SPMM,
        "    offsets[item] = args.col[t + item] * args.k;\n  }\n  __syncwarp(mask);\n",
        "    offsets[item] = args.col[t + item] * args.k;\n  }\n",
        BASELINES_TEST,
        "the values that other lanes load are used before they are loaded",
    ),
    Mutant(
        "sputnik-style sddmm: missing __syncwarp",
        SPUTNIK_SDDMM,
        "  __syncwarp(mask);\n",
        "",
        BASELINES_TEST,
        "the values that other lanes load are used before they are loaded",
    ),
    Mutant(
        "sputnik-style spmm: missing __syncwarp after a tile",
        SPUTNIK_SPMM,
        "const auto stage = [&] {\n    __syncwarp(mask);",
        "const auto stage = [&] {\n",
        BASELINES_TEST,
        "a tile is overwritten while other lanes use it",
    ),
    Mutant(
        "sputnik-style spmm: missing __syncwarp before a tile",
        SPUTNIK_SPMM,
        "    }\n    __syncwarp(mask);\n  };",
        "    }\n  };",
        BASELINES_TEST,
        "a tile is used before other lanes have loaded it",
    ),
    Mutant(
        "sputnik-style spmm: missing __syncwarp before the residue",
        SPUTNIK_SPMM,
        "end - t);\n  __syncwarp(mask);\n",
        "end - t);\n",
        BASELINES_TEST,
        "the last tile is overwritten while other lanes use it",
    ),
]

MUTANTS = SDDMM_MUTANTS + SPMM_MUTANTS + ENTRY_MUTANTS
