// The Sputnik-style SDDMM: the choice of the kernel's instance and of its grid.
#include "cuda/baselines/sputnik_style_sddmm.cuh"

#include "cuda/dispatch.h"
#include "rosa/baselines.h"

namespace rosa::cuda::baselines {
namespace {

template <class T, int kVector, int kLanes>
void launch_sddmm(const SddmmArgs<T>& args, int64_t grid_entries, Stream stream) {
  constexpr int kRows = kWarp / kLanes;
  const Grid grid = {dim3(static_cast<unsigned>((args.rows + kRows - 1) / kRows),
                          grid_y(grid_entries, kSddmmItems)),
                     dim3(kLanes, kRows), 0, stream};
  if (args.k % (kVector * kLanes) == 0) {
    launch<sputnik_style_sddmm_kernel<T, kVector, kLanes, false>>(grid, args);
  } else {
    launch<sputnik_style_sddmm_kernel<T, kVector, kLanes, true>>(grid, args);
  }
}

}  // namespace

void sputnik_style_sddmm(const CsrView& pattern, const int32_t* row_swizzle, int64_t grid_rows,
                         int64_t grid_entries, const MatrixView& a, const MatrixView& b,
                         const VectorView& out, int device, Stream stream) {
  check_rows(a, pattern.rows);
  check_rows(b, pattern.cols);
  check(a.cols == b.cols, "sputnik_style_sddmm: expected a and b to have one k");
  check(a.dtype == b.dtype && a.dtype == out.dtype,
        "sputnik_style_sddmm: expected operands and result of one dtype");
  check(out.size == pattern.nnz && (out.size <= 1 || out.stride == 1),
        "sputnik_style_sddmm: expected as many contiguous values as the pattern has nonzeros");
  check(grid_rows <= pattern.rows, "sputnik_style_sddmm: expected at most the pattern's rows");
  if (grid_rows == 0 || grid_entries == 0) return;
  const DeviceGuard guard(device);
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const SddmmArgs<T> args = {pattern.crow_indices,
                               pattern.col_indices,
                               row_swizzle,
                               grid_rows,
                               a.cols,
                               static_cast<const T*>(a.data),
                               static_cast<const T*>(b.data),
                               static_cast<T*>(out.data)};
    if (a.cols % kPerVec16<T> == 0) {
      launch_sddmm<T, kPerVec16<T>, 8>(args, grid_entries, stream);
    } else if (a.cols % 2 == 0) {
      launch_sddmm<T, 2, 16>(args, grid_entries, stream);
    } else {
      launch_sddmm<T, 1, 32>(args, grid_entries, stream);
    }
  });
}

}  // namespace rosa::cuda::baselines
