// SDDMM's tiles by wgmma. These instructions exist only on compute capability 9.0 (sm_90a).
#include "cuda/sddmm_wgmma.cuh"

namespace rosa::cuda {
namespace {

template <class T>
void launch_as(const TileArgs& args, Stream stream, bool early) {
  launch<sddmm_wgmma_kernel<T>>(
      Grid{dim3(static_cast<unsigned>(args.work.blocks)), dim3(WgmmaTile::kThreads),
           WgmmaTile::kSharedBytes, stream, early},
      args);
}

}  // namespace

void launch_wgmma(const TileArgs& args, DType dtype, Stream stream, bool early) {
  dtype == DType::kBFloat16 ? launch_as<Bf16>(args, stream, early)
                            : launch_as<Half>(args, stream, early);
}

}  // namespace rosa::cuda
