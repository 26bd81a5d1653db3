#include "cpu/isa/sddmm.h"
#include "cpu/isa/spmm.h"

namespace rosa::cpu {

extern const Kernels kPortableKernels = {spmm_worker<8>, sddmm_worker<8>};

}  // namespace rosa::cpu
