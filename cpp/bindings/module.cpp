// The only pybind11 file: addresses, sizes, strides and dtypes become views. No maths, no
// allocation.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "rosa/ops.h"

namespace py = pybind11;
using rosa::CsrView;
using rosa::DType;
using rosa::MatrixView;
using rosa::VectorView;
using rosa::cpu::Isa;

namespace {

int64_t integer(const py::tuple& t, size_t i) { return t[i].cast<int64_t>(); }

void* address(const py::tuple& t, size_t i) {
  return reinterpret_cast<void*>(t[i].cast<uintptr_t>());
}

// (crow address, col address, rows, cols, nnz)
CsrView csr(const py::tuple& t) {
  return {static_cast<const int32_t*>(address(t, 0)), static_cast<const int32_t*>(address(t, 1)),
          integer(t, 2), integer(t, 3), integer(t, 4)};
}

// (address, dtype, rows, cols, row stride, col stride)
MatrixView matrix(const py::tuple& t) {
  return {address(t, 0), static_cast<DType>(integer(t, 1)),
          integer(t, 2), integer(t, 3),
          integer(t, 4), integer(t, 5)};
}

// (address, dtype, size, stride)
VectorView vector(const py::tuple& t) {
  return {address(t, 0), static_cast<DType>(integer(t, 1)), integer(t, 2), integer(t, 3)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Unsafe native entries: call them through rosa_kernels.backends.native only.";

  m.def("isa_available", [](int isa) { return rosa::cpu::isa_available(static_cast<Isa>(isa)); });

  m.def("sddmm_workspace_bytes",
        [](const py::tuple& pattern, int64_t k, int dtype, int threads, int isa) {
          return rosa::cpu::sddmm_workspace_bytes(csr(pattern), k, static_cast<DType>(dtype),
                                                  threads, static_cast<Isa>(isa));
        });
  m.def("spmm_workspace_bytes",
        [](const py::tuple& pattern, int64_t k, int dtype, int threads, int isa) {
          return rosa::cpu::spmm_workspace_bytes(csr(pattern), k, static_cast<DType>(dtype),
                                                 threads, static_cast<Isa>(isa));
        });
  m.def("sddmm", [](const py::tuple& pattern, const py::tuple& a, const py::tuple& b,
                    const py::tuple& out, uintptr_t workspace, int threads, int isa) {
    const CsrView p = csr(pattern);
    const MatrixView va = matrix(a), vb = matrix(b);
    const VectorView vo = vector(out);
    py::gil_scoped_release release;
    rosa::cpu::sddmm(p, va, vb, vo, reinterpret_cast<void*>(workspace), threads,
                     static_cast<Isa>(isa));
  });
  m.def("spmm", [](const py::tuple& pattern, const py::tuple& values, const py::tuple& b,
                   const py::tuple& c, uintptr_t workspace, int threads, int isa) {
    const CsrView p = csr(pattern);
    const VectorView vv = vector(values);
    const MatrixView vb = matrix(b), vc = matrix(c);
    py::gil_scoped_release release;
    rosa::cpu::spmm(p, vv, vb, vc, reinterpret_cast<void*>(workspace), threads,
                    static_cast<Isa>(isa));
  });
  m.def("csr_add_", [](const py::tuple& w, const py::tuple& pattern, const py::tuple& values,
                       double alpha, int threads) {
    const MatrixView vw = matrix(w);
    const CsrView p = csr(pattern);
    const VectorView vv = vector(values);
    py::gil_scoped_release release;
    rosa::cpu::csr_add_(vw, p, vv, alpha, threads);
  });
  m.def("csr_gather",
        [](const py::tuple& w, const py::tuple& pattern, const py::tuple& out, int threads) {
          const MatrixView vw = matrix(w);
          const CsrView p = csr(pattern);
          const VectorView vo = vector(out);
          py::gil_scoped_release release;
          rosa::cpu::csr_gather(vw, p, vo, threads);
        });
  m.def("csr_transpose",
        [](const py::tuple& pattern, uintptr_t crow_t, uintptr_t col_t, uintptr_t permutation) {
          const CsrView p = csr(pattern);
          py::gil_scoped_release release;
          rosa::cpu::csr_transpose(p, reinterpret_cast<int32_t*>(crow_t),
                                   reinterpret_cast<int32_t*>(col_t),
                                   reinterpret_cast<int32_t*>(permutation));
        });
}
