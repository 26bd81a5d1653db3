// The only file that uses pybind11. It turns addresses, sizes, strides and dtypes into views. It
// neither computes nor allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>

#include "rosa/ops.h"
#include "rosa/tile_plan.h"
#if ROSA_HAS_CUDA
#include "rosa/baselines.h"
#include "rosa/cuda.h"
#endif

// The tests build this file a second time, around the emulated CUDA kernels.
#ifndef ROSA_MODULE_NAME
#define ROSA_MODULE_NAME _C
#endif

namespace py = pybind11;
using rosa::CsrView;
using rosa::DType;
using rosa::MatrixView;
using rosa::PlanView;
using rosa::TilePlan;
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

void def_tile_plan(py::module_& m) {
  // Module-local, because the tests load two modules that define this class.
  py::class_<TilePlan>(m, "TilePlan", py::module_local())
      .def_readonly("header", &TilePlan::header)
      .def_property_readonly("blob_size", [](const TilePlan& plan) { return plan.blob.size(); })
      .def("copy_blob", [](const TilePlan& plan, uintptr_t to) {
        std::memcpy(reinterpret_cast<void*>(to), plan.blob.data(),
                    plan.blob.size() * sizeof(int32_t));
      });
  m.def("tile_plan", [](const py::tuple& pattern, int tile_rows, int tile_cols, double heavy_fill) {
    const CsrView p = csr(pattern);
    py::gil_scoped_release release;
    return rosa::make_tile_plan(p, tile_rows, tile_cols, heavy_fill);
  });
}

#if ROSA_HAS_CUDA

using rosa::cuda::SddmmVariant;
using rosa::cuda::SpmmVariant;
using rosa::cuda::Stream;

// (header address, header size, blob address, blob size), or () for no plan
PlanView plan_of(const py::tuple& t) {
  if (t.empty()) return {};
  return rosa::plan_view(static_cast<const int64_t*>(address(t, 0)), integer(t, 1),
                         static_cast<const int32_t*>(address(t, 2)), integer(t, 3));
}

void def_cuda(py::module_& m) {
  m.def("cuda_unavailable", rosa::cuda::unavailable);
  m.def("cuda_unsupported", rosa::cuda::unsupported);
  m.def("cuda_has_wgmma", rosa::cuda::has_wgmma);
  m.def("cuda_properties", [](int device) {
    const rosa::cuda::DeviceProperties p = rosa::cuda::properties(device);
    return py::make_tuple(p.multiprocessors, p.capability_major, p.capability_minor, p.l2_bytes,
                          p.shared_bytes);
  });

  m.def("cuda_sddmm_shared_bytes", [](int variant, int tile_cols, int device) {
    return rosa::cuda::sddmm_shared_bytes(static_cast<SddmmVariant>(variant), tile_cols, device);
  });
  m.def("cuda_spmm_shared_bytes", [](int variant) {
    return rosa::cuda::spmm_shared_bytes(static_cast<SpmmVariant>(variant));
  });
  m.def("cuda_sddmm_workspace_bytes",
        [](int variant, const py::tuple& pattern, const py::tuple& plan, const py::tuple& a,
           const py::tuple& b, int device) {
          return rosa::cuda::sddmm_workspace_bytes(static_cast<SddmmVariant>(variant), csr(pattern),
                                                   plan_of(plan), matrix(a), matrix(b), device);
        });
  m.def("cuda_spmm_workspace_bytes",
        [](int variant, const py::tuple& pattern, const py::tuple& plan, const py::tuple& b,
           const py::tuple& c, int device) {
          return rosa::cuda::spmm_workspace_bytes(static_cast<SpmmVariant>(variant), csr(pattern),
                                                  plan_of(plan), matrix(b), matrix(c), device);
        });
  m.def("cuda_sddmm", [](int variant, const py::tuple& pattern, const py::tuple& plan,
                         const py::tuple& a, const py::tuple& b, const py::tuple& out,
                         uintptr_t workspace, int device, uintptr_t stream) {
    const CsrView p = csr(pattern);
    const PlanView vp = plan_of(plan);
    const MatrixView va = matrix(a), vb = matrix(b);
    const VectorView vo = vector(out);
    py::gil_scoped_release release;
    rosa::cuda::sddmm(static_cast<SddmmVariant>(variant), p, vp, va, vb, vo,
                      reinterpret_cast<void*>(workspace), device, reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_spmm", [](int variant, const py::tuple& pattern, const py::tuple& plan,
                        const py::tuple& values, const py::tuple& b, const py::tuple& c,
                        uintptr_t workspace, int device, uintptr_t stream) {
    const CsrView p = csr(pattern);
    const PlanView vp = plan_of(plan);
    const VectorView vv = vector(values);
    const MatrixView vb = matrix(b), vc = matrix(c);
    py::gil_scoped_release release;
    rosa::cuda::spmm(static_cast<SpmmVariant>(variant), p, vp, vv, vb, vc,
                     reinterpret_cast<void*>(workspace), device, reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_csr_add_", [](const py::tuple& w, const py::tuple& pattern, const py::tuple& values,
                            double alpha, int device, uintptr_t stream) {
    const MatrixView vw = matrix(w);
    const CsrView p = csr(pattern);
    const VectorView vv = vector(values);
    py::gil_scoped_release release;
    rosa::cuda::csr_add_(vw, p, vv, alpha, device, reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_csr_gather", [](const py::tuple& w, const py::tuple& pattern, const py::tuple& out,
                              int device, uintptr_t stream) {
    const MatrixView vw = matrix(w);
    const CsrView p = csr(pattern);
    const VectorView vo = vector(out);
    py::gil_scoped_release release;
    rosa::cuda::csr_gather(vw, p, vo, device, reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_csr_scatter_", [](const py::tuple& w, const py::tuple& pattern,
                                const py::tuple& values, int device, uintptr_t stream) {
    const MatrixView vw = matrix(w);
    const CsrView p = csr(pattern);
    const VectorView vv = vector(values);
    py::gil_scoped_release release;
    rosa::cuda::csr_scatter_(vw, p, vv, device, reinterpret_cast<Stream>(stream));
  });
}

// Functions that only the benchmarks call.
void def_cuda_baselines(py::module_& m) {
  m.def("cuda_sputnik_style_sddmm", [](const py::tuple& pattern, uintptr_t row_swizzle,
                                       int64_t grid_rows, int64_t grid_entries, const py::tuple& a,
                                       const py::tuple& b, const py::tuple& out, int device,
                                       uintptr_t stream) {
    const CsrView p = csr(pattern);
    const MatrixView va = matrix(a), vb = matrix(b);
    const VectorView vo = vector(out);
    py::gil_scoped_release release;
    rosa::cuda::baselines::sputnik_style_sddmm(p, reinterpret_cast<const int32_t*>(row_swizzle),
                                               grid_rows, grid_entries, va, vb, vo, device,
                                               reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_sputnik_style_spmm", [](const py::tuple& pattern, uintptr_t row_swizzle,
                                      const py::tuple& values, const py::tuple& b,
                                      const py::tuple& c, int device, uintptr_t stream) {
    const CsrView p = csr(pattern);
    const VectorView vv = vector(values);
    const MatrixView vb = matrix(b), vc = matrix(c);
    py::gil_scoped_release release;
    rosa::cuda::baselines::sputnik_style_spmm(p, reinterpret_cast<const int32_t*>(row_swizzle), vv,
                                              vb, vc, device, reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_read_bandwidth", [](uintptr_t data, int64_t bytes, int passes, int blocks,
                                  uintptr_t sink, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    rosa::cuda::baselines::read_bandwidth(reinterpret_cast<const void*>(data), bytes, passes,
                                          blocks, reinterpret_cast<void*>(sink), device,
                                          reinterpret_cast<Stream>(stream));
  });
  m.def("cuda_launch_empty", [](int count, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    rosa::cuda::baselines::launch_empty(count, device, reinterpret_cast<Stream>(stream));
  });
}

#endif  // ROSA_HAS_CUDA

}  // namespace

PYBIND11_MODULE(ROSA_MODULE_NAME, m) {
  m.doc() = "Unsafe native entries: call them through rosa_kernels.backends.native only.";

  def_tile_plan(m);
#if ROSA_HAS_CUDA
  def_cuda(m);
  def_cuda_baselines(m);
#endif

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
  m.def("csr_scatter_",
        [](const py::tuple& w, const py::tuple& pattern, const py::tuple& values, int threads) {
          const MatrixView vw = matrix(w);
          const CsrView p = csr(pattern);
          const VectorView vv = vector(values);
          py::gil_scoped_release release;
          rosa::cpu::csr_scatter_(vw, p, vv, threads);
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
