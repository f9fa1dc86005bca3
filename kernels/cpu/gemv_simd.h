// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Sixteen f32 lanes on whatever the including file is compiled for: one zmm, two ymm, four NEON
// registers or plain loops. Each instruction set gets its own namespace, so that a linker never
// merges an inline function built for AVX-512 into code that runs without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/gemv_convert.h"
#include "kernels/nf4.h"

// A file that wants the plain loops whatever the compiler may use defines METAL_LORA_SIMD_PLAIN.
#if !defined(METAL_LORA_SIMD_PLAIN)
#if defined(__AVX2__)
// GCC 12 warns of its own intrinsics' deliberately undefined registers (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#if defined(METAL_LORA_SIMD_PLAIN)
#define METAL_LORA_SIMD_NS simd_scalar
#include "kernels/cpu/gemv_simd_scalar.h"
#elif defined(__AVX512BF16__)
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
#if defined(__AVX2__) && !defined(METAL_LORA_SIMD_PLAIN)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA);
#elif defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#else
  (void)p;
#endif
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
