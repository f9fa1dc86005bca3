// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// SwiGLU (Shazeer, arXiv:2002.05202): silu(gate)·up, forward and backward, gate and up apart or
// side by side in each row. Bandwidth-bound: 16 bytes a thread and array where they align. On
// Hopper a training step does without: gemm_sm90_end.cuh.
#include "kernels/cuda/swiglu.cuh"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr int kBlock = 256;

/// rows of `columns`; gate, up and their gradients at `stride` between rows, y, dy and act dense.
template <typename T>
struct Swiglu {
  size_t rows;
  uint32_t columns;
  size_t stride;
  const T* gate;
  const T* up;
  const T* dy;
  T* y;  ///< forward: out; backward: silu(gate)·up again, or null
  T* dgate;
  T* dup;
};

template <typename T, int kWidth, bool kBackward>
__global__ void __launch_bounds__(kBlock) swiglu_kernel(const Swiglu<T> a) {
  allow_dependents();
  wait_for_previous();
  struct alignas(kWidth * sizeof(T)) Part {
    T v[kWidth];
  };
  const uint32_t parts = a.columns / kWidth;
  const size_t at = blockIdx.x * size_t{kBlock} + threadIdx.x;
  const size_t row = at / parts;
  const auto column = static_cast<uint32_t>(at - row * parts) * kWidth;
  if (row >= a.rows) return;
  const size_t wide = row * a.stride + column, dense = row * a.columns + column;
  const Part gate = *reinterpret_cast<const Part*>(a.gate + wide);
  const Part up = *reinterpret_cast<const Part*>(a.up + wide);
  Part y;
  if constexpr (kBackward) {
    const Part dy = *reinterpret_cast<const Part*>(a.dy + dense);
    Part dgate, dup;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const SwigluGradient one(to_float(gate.v[j]), to_float(up.v[j]), to_float(dy.v[j]));
      y.v[j] = from_float<T>(one.act);
      dup.v[j] = from_float<T>(one.up);
      dgate.v[j] = from_float<T>(one.gate);
    }
    *reinterpret_cast<Part*>(a.dgate + wide) = dgate;
    *reinterpret_cast<Part*>(a.dup + wide) = dup;
    if (a.y == nullptr) return;
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      y.v[j] = from_float<T>(swiglu(to_float(gate.v[j]), to_float(up.v[j])));
    }
  }
  *reinterpret_cast<Part*>(a.y + dense) = y;
}

template <bool kBackward, typename T>
void run(const Context& context, const Swiglu<T>& a) {
  constexpr int kWide = 16 / sizeof(T);
  if (a.rows == 0 || a.columns == 0) return;
  bool wide = a.columns % kWide == 0 && a.stride % kWide == 0;
  for (const void* p :
       {static_cast<const void*>(a.gate),
        static_cast<const void*>(a.up),
        static_cast<const void*>(a.dy),
        static_cast<const void*>(a.y),
        static_cast<const void*>(a.dgate),
        static_cast<const void*>(a.dup)}) {
    wide = wide && is_aligned(p);
  }
  const size_t threads = a.rows * (a.columns / (wide ? kWide : 1));
  launch_pdl(
      wide ? swiglu_kernel<T, kWide, kBackward> : swiglu_kernel<T, 1, kBackward>,
      dim3(static_cast<unsigned>((threads + kBlock - 1) / kBlock)),
      dim3(kBlock),
      0,
      context.stream,
      a);
}

/// A flat array as rows that 16 bytes divide, where its length allows.
template <typename T>
Swiglu<T> flat(size_t count) {
  constexpr uint32_t kRow = 1024;
  Swiglu<T> a{};
  const bool whole = count % kRow == 0;
  a.rows = whole ? count / kRow : count;
  a.columns = whole ? kRow : 1;
  a.stride = a.columns;
  return a;
}

}  // namespace

void swiglu_forward(
    const Context& context, size_t count, DType dtype, const void* gate, const void* up, void* y) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    auto a = flat<T>(count);
    a.gate = static_cast<const T*>(gate);
    a.up = static_cast<const T*>(up);
    a.y = static_cast<T*>(y);
    run<false>(context, a);
  });
}

void swiglu_backward(
    const Context& context,
    size_t count,
    DType dtype,
    const void* gate,
    const void* up,
    const void* dy,
    void* dgate,
    void* dup) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    auto a = flat<T>(count);
    a.gate = static_cast<const T*>(gate);
    a.up = static_cast<const T*>(up);
    a.dy = static_cast<const T*>(dy);
    a.dgate = static_cast<T*>(dgate);
    a.dup = static_cast<T*>(dup);
    run<true>(context, a);
  });
}

void swiglu_pair_forward(
    const Context& context,
    uint32_t tokens,
    uint32_t ffn,
    DType dtype,
    const void* gate_up,
    void* act) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    Swiglu<T> a{};
    a.rows = tokens;
    a.columns = ffn;
    a.stride = 2 * size_t{ffn};
    a.gate = static_cast<const T*>(gate_up);
    a.up = a.gate + ffn;
    a.y = static_cast<T*>(act);
    run<false>(context, a);
  });
}

void swiglu_pair_backward(
    const Context& context,
    uint32_t tokens,
    uint32_t ffn,
    DType dtype,
    void* gate_up,
    const void* d_act,
    void* act) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    Swiglu<T> a{};
    a.rows = tokens;
    a.columns = ffn;
    a.stride = 2 * size_t{ffn};
    a.gate = a.dgate = static_cast<T*>(gate_up);
    a.up = a.dup = static_cast<T*>(gate_up) + ffn;
    a.dy = static_cast<const T*>(d_act);
    a.y = static_cast<T*>(act);
    run<true>(context, a);
  });
}

}  // namespace metal_lora::cuda
