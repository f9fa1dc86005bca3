// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Sixteen f32 lanes on whatever the including file is compiled for: one zmm, two ymm, four NEON
// registers or plain loops. Each instruction set gets its own namespace, so that a linker never
// merges an inline function built for AVX-512 into code that runs without it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/gemv_convert.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512BF16__)
#define METAL_LORA_SIMD_NS simd_avx512_bf16
#include "kernels/cpu/gemv_simd_avx512.h"
#elif defined(__AVX512F__)
#define METAL_LORA_SIMD_NS simd_avx512
#include "kernels/cpu/gemv_simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define METAL_LORA_SIMD_NS simd_avx2
#include "kernels/cpu/gemv_simd_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define METAL_LORA_SIMD_NS simd_neon
#include "kernels/cpu/gemv_simd_neon.h"
#else
#define METAL_LORA_SIMD_NS simd_scalar
#include "kernels/cpu/gemv_simd_scalar.h"
#endif

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

/// Asks for a cache line that is read once. The hint keeps streamed weights out of the outer
/// caches, so that adapters and the key/value cache stay there between tokens.
inline void prefetch_once(const void* p) {
#if defined(__AVX2__)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA);
#elif defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#else
  (void)p;
#endif
}

/// exp(x) to 2 ulp over the f32 range (Cephes' expf: range reduction by ln2 in two parts, degree
/// 6). Below -87.3 it gives 0, which is what a softmax and a sigmoid want of it.
inline V16 exp(V16 x) {
  const V16 lowest = broadcast(-87.3f);
  const V16 clamped = min(max(x, lowest), broadcast(88.0f));
  const V16 n = round(mul(clamped, broadcast(1.44269504088896341f)));
  V16 r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  V16 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), broadcast(1.0f));
  return zero_below(scale_pow2(p, n), x, lowest);
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
