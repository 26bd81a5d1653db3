// Every CUDA entry. Shapes and dtypes are those of ops.h, without float64; arrays live on `device`.
//
// An entry sets the device for its own launches, launches on `stream`, allocates nothing and never
// waits for the device. Errors are exceptions: std::invalid_argument for arguments,
// std::runtime_error, in CUDA's words, for what the device refuses.
#pragma once

#include <cstdint>
#include <string>

#include "rosa/tile_plan.h"
#include "rosa/views.h"

namespace rosa::cuda {

using Stream = void*;  // a cudaStream_t

enum class SddmmVariant : int {
  kGather = 0,  // one warp per 32 nonzeros, any dtype
  kTile = 1,    // heavy tiles by mma.sync, the rest gathered; 16-bit dtypes
  kWgmma = 2,   // heavy tiles by wgmma, for compute capability 9.0 exactly
};
enum class SpmmVariant : int {
  kGather = 0,
  kTile = 1,  // heavy tiles written out as dense ones: a zero times Inf or NaN shows
};

struct DeviceProperties {
  int multiprocessors;
  int capability_major, capability_minor;
  int64_t l2_bytes;
  int64_t shared_bytes;  // the most one block may have
  int64_t panel_bytes;   // the most scratch for packed operands; longer ones are packed in chunks
  bool early_launch;     // whether kernels of one call may begin before the one ahead has ended
};

// Why no CUDA kernel can run here (no driver, no device), or "".
std::string unavailable();
// Why none can run on this device (no code for its architecture in this build), or "".
std::string unsupported(int device);
DeviceProperties properties(int device);
// Whether the build holds the kernels for compute capability 9.0 alone.
bool has_wgmma();

// Shared memory that a block of a kernel of tiles needs on this device, which refuses the kernel if
// it has less (DeviceProperties::shared_bytes); `tile_cols` is that of the plan. 0 for kGather,
// which makes do with what there is.
int64_t sddmm_shared_bytes(SddmmVariant variant, int tile_cols, int device);
int64_t spmm_shared_bytes(SpmmVariant variant);

// Scratch of a call in bytes, any alignment. `plan` may be empty for kGather.
int64_t sddmm_workspace_bytes(SddmmVariant variant, const CsrView& pattern, const PlanView& plan,
                              const MatrixView& a, const MatrixView& b, int device);
void sddmm(SddmmVariant variant, const CsrView& pattern, const PlanView& plan, const MatrixView& a,
           const MatrixView& b, const VectorView& out, void* workspace, int device, Stream stream);

int64_t spmm_workspace_bytes(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
                             const MatrixView& b, const MatrixView& c, int device);
void spmm(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
          const VectorView& values, const MatrixView& b, const MatrixView& c, void* workspace,
          int device, Stream stream);

// These three also take a slab of a pattern's rows: crow_indices then points at the slab's first
// row, whose entry need not be 0, col_indices at those of the whole pattern, nnz counts the slab's
// entries (crow_indices[rows] - crow_indices[0]), and values and w begin with the slab.
void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int device, Stream stream);
void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int device,
                Stream stream);
// w[i_t, j_t] = values[t]: what csr_gather read goes back bit by bit.
void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values, int device,
                  Stream stream);

}  // namespace rosa::cuda
