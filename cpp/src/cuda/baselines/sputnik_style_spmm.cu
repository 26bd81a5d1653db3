// The Sputnik-style SpMM: the choice of the kernel's instance.
#include "cuda/baselines/sputnik_style_spmm.cuh"

#include "cuda/dispatch.h"
#include "rosa/baselines.h"

namespace rosa::cuda::baselines {
namespace {

template <class T, int kVector, int kLanes, int kLoads>
void launch_spmm(const SpmmArgs<T>& args, Stream stream) {
  constexpr int kRows = kWarp / kLanes;
  const Grid grid = {dim3(static_cast<unsigned>((args.rows + kRows - 1) / kRows),
                          grid_y(args.k, kLanes * kVector * kLoads)),
                     dim3(kLanes, kRows), 0, stream};
  launch<sputnik_style_spmm_kernel<T, kVector, kLanes, kLoads>>(grid, args);
}

// Few columns take narrow tiles. Others take the widest vectors that k allows, two per lane if they
// fit.
template <class T>
void choose_spmm(const SpmmArgs<T>& args, Stream stream) {
  constexpr int kWidest = kPerVec16<T>;
  if (args.k <= 8) {
    launch_spmm<T, 1, 8, 1>(args, stream);
  } else if (args.k <= 16 && args.k % 2 == 0) {
    launch_spmm<T, 2, 8, 1>(args, stream);
  } else if (args.k % 64 == 0) {
    launch_spmm<T, kWidest, 8, 8 / kWidest>(args, stream);
  } else if (args.k % 4 == 0) {
    launch_spmm<T, 4, 8, 1>(args, stream);
  } else if (args.k % 2 == 0) {
    launch_spmm<T, 2, 16, 1>(args, stream);
  } else {
    launch_spmm<T, 1, 32, 1>(args, stream);
  }
}

}  // namespace

void sputnik_style_spmm(const CsrView& pattern, const int32_t* row_swizzle,
                        const VectorView& values, const MatrixView& b, const MatrixView& c,
                        int device, Stream stream) {
  check_rows(b, pattern.cols);
  check_rows(c, pattern.rows);
  check(b.cols == c.cols, "sputnik_style_spmm: expected b and c to have one k");
  check(b.dtype == c.dtype && b.dtype == values.dtype,
        "sputnik_style_spmm: expected operands and result of one dtype");
  check(values.size == pattern.nnz && (values.size <= 1 || values.stride == 1),
        "sputnik_style_spmm: expected as many contiguous values as the pattern has nonzeros");
  check(aligned(values.data) && aligned(pattern.col_indices),
        "sputnik_style_spmm: expected values and columns aligned to 16 bytes");
  if (c.rows == 0 || c.cols == 0) return;
  const DeviceGuard guard(device);
  with_float(b.dtype, [&](auto type) {
    using T = decltype(type);
    choose_spmm<T>(
        {pattern.crow_indices, pattern.col_indices, row_swizzle, static_cast<const T*>(values.data),
         pattern.rows, b.cols, static_cast<const T*>(b.data), static_cast<T*>(c.data)},
        stream);
  });
}

}  // namespace rosa::cuda::baselines
