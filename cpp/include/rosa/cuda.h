// Every CUDA entry point. Shapes and dtypes are those of ops.h, without float64. Arrays live on
// `device`.
//
// An entry point sets the device for its launches and launches on `stream`. It allocates nothing
// and never waits for the device. Errors are exceptions: std::invalid_argument for arguments, and
// std::runtime_error with CUDA's message for what the device refuses.
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
  // Heavy tiles are multiplied as dense ones. Inf or NaN in b reaches rows that do not refer to it.
  kTile = 1,
};

struct DeviceProperties {
  int multiprocessors;
  int capability_major, capability_minor;
  int64_t l2_bytes;
  int64_t shared_bytes;  // the maximum for one block
  int64_t panel_bytes;   // maximum scratch for packed operands; longer ones are packed in chunks
  bool early_launch;     // whether a kernel of a call may begin before the previous one ended
};

// The reason why no CUDA kernel can run on this machine (no driver or no device), or "" if one can.
std::string unavailable();
// The reason why no kernel can run on this device (no code for its architecture in this build), or
// "".
std::string unsupported(int device);
DeviceProperties properties(int device);
// Whether this build holds the kernels that need exactly compute capability 9.0.
bool has_wgmma();

// Shared memory in bytes that a block of a tile kernel needs on this device. A device with less
// (DeviceProperties::shared_bytes) refuses the kernel. `tile_cols` is the plan's. The result is 0
// for kGather, which adapts to the shared memory of the device.
int64_t sddmm_shared_bytes(SddmmVariant variant, int tile_cols, int device);
int64_t spmm_shared_bytes(SpmmVariant variant);

// Scratch of a call in bytes. The buffer may have any alignment. `plan` may be empty for kGather.
int64_t sddmm_workspace_bytes(SddmmVariant variant, const CsrView& pattern, const PlanView& plan,
                              const MatrixView& a, const MatrixView& b, int device);
void sddmm(SddmmVariant variant, const CsrView& pattern, const PlanView& plan, const MatrixView& a,
           const MatrixView& b, const VectorView& out, void* workspace, int device, Stream stream);

int64_t spmm_workspace_bytes(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
                             const MatrixView& b, const MatrixView& c, int device);
void spmm(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
          const VectorView& values, const MatrixView& b, const MatrixView& c, void* workspace,
          int device, Stream stream);

// The next three ops also accept a slab of a pattern's rows. crow_indices then points at the slab's
// first row, whose entry need not be 0. col_indices points at the columns of the whole pattern. nnz
// counts the slab's entries: crow_indices[rows] - crow_indices[0]. values and w begin with the
// slab.
void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int device, Stream stream);
void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int device,
                Stream stream);
// w[i_t, j_t] = values[t]. Values that csr_gather read are restored bit by bit.
void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values, int device,
                  Stream stream);

}  // namespace rosa::cuda
