#include "cpu/isa/sddmm.h"
#include "cpu/isa/spmm.h"

namespace rosa::cpu {

extern const Kernels kAvx512Kernels = {spmm_worker<16>, sddmm_worker<16>};

}  // namespace rosa::cpu
