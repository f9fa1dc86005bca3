// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The warp's matrix unit and asynchronous copies of compute capability 8.0 and later, one PTX
// instruction a function: mma.sync m16n8k16, ldmatrix, cp.async. Hopper's own are in wgmma.cuh.
//
// Fragments of d [16, 8] += a [16, 16]·b [16, 8], lane = 4·g + q:
//   a[0]: row g, columns 2q, 2q+1;  a[1]: row g+8;  a[2]: row g, columns 2q+8, +9;  a[3]: both
//   b[0]: rows (k) 2q, 2q+1 of column g;  b[1]: rows 2q+8, +9
//   d[0], d[1]: row g, columns 2q, 2q+1;  d[2], d[3]: row g+8
// load_x4 of row-major a [16, 16] gives a[0 … 3] when lane i points at row i%16, column 8·(i/16);
// of row-major b^T [8·n, k] or, with load_x4_across, of row-major b [k, n] it gives b.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace metal_lora::cuda::mma {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- cp.async: kBytes (4, 8 or 16, both addresses aligned so) to shared memory, of which the
// first `bytes` are read and the rest are zeros. 16 bytes pass L1 by. ----

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to),
                 "l"(from),
                 "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/// Until at most kLeft of this thread's newest groups are under way.
template <int kLeft>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements; lanes 8i … 8i+7 point at the rows of matrix i,
// 16 bytes each, aligned. `across` transposes each. ----

__device__ __forceinline__ void load_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_x4_across(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_x2_across(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// ---- mma.sync, f32 sums ----

/// d [16, 8] += a [16, 16]·b [16, 8], T bf16 or f16.
template <typename T>
__device__ __forceinline__ void multiply(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// {low, high} rounded to T in one register, as fragments and two columns of a row hold them.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

}  // namespace metal_lora::cuda::mma
