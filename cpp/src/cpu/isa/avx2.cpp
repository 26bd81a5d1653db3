#include "cpu/isa/sddmm.h"
#include "cpu/isa/spmm.h"

namespace rosa::cpu {

extern const Kernels kAvx2Kernels = {spmm_worker<8>, sddmm_worker<8>};

}  // namespace rosa::cpu
