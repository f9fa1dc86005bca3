// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How lora_gemv turns stored weights into tensor-core operands. A chunk is 32 columns of 16 rows;
// thread (g, t) of a warp (g = lane / 4, t = lane % 4) makes the weights of columns 8t … 8t + 7 of
// rows g and g + 8. The tensor cores do not care which of the chunk's columns is called which, as
// long as x is in the same order: natural pairs, or pairs {i, i + 4} for 4-bit affine codes.
// Scales stay out of the products: a group's Σ v·x is scaled in f32, once for 32 … 128 columns.
#pragma once

#include "kernels/cuda/lora_gemv.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/nf4.h"

namespace metal_lora::cuda::gemv {

/// A value of any storage type as f32, and back.
__device__ __forceinline__ float load_as_float(const void* p, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}
__device__ __forceinline__ void store_from_float(void* p, DType dtype, size_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (dtype == DType::f16) {
    static_cast<f16*>(p)[i] = from_float<f16>(v);
  } else {
    static_cast<bf16*>(p)[i] = from_float<bf16>(v);
  }
}

template <uint32_t kFrom = 0>
__device__ __forceinline__ float nf4_level(uint32_t code) {
  constexpr float kLevel = kNf4Levels[kFrom];
  if constexpr (kFrom == 15) {
    return kLevel;
  } else {
    return code == kFrom ? kLevel : nf4_level<kFrom + 1>(code);
  }
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float load_shared_float(uint32_t address) {
  return __uint_as_float(load_shared4(address));
}

/// Natural pairs of 8 values -> pairs {i, i + 4}.
__device__ __forceinline__ uint4 interleave(uint4 v) {
  return make_uint4(
      __byte_perm(v.x, v.z, 0x5410),
      __byte_perm(v.x, v.z, 0x7632),
      __byte_perm(v.y, v.w, 0x5410),
      __byte_perm(v.y, v.w, 0x7632));
}

// ---- dense ----

/// What is xor'ed into the number of a row's 16-byte slots, so that reads of 16 bytes of two rows
/// and of 4 bytes of eight rows meet no bank conflict (of 8 bytes of four: two-way ones).
__device__ __forceinline__ uint32_t swizzle(uint32_t row) {
  return (row & 1) << 2 | (row >> 1 & 3);
}
/// (v & mask) | bits in one instruction: both constants in registers.
__device__ __forceinline__ uint32_t mask_or(uint32_t v, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
  return r;
}

/// A format says: bytes of a chunk in a row; chunks of a scale's group; and makes 8 weights of one
/// row (4 registers of pairs) from a stage.
template <typename T>
struct Dense {
  using Storage = T;
  static constexpr uint32_t kRowBytes = 128, kChunkBytes = 64, kGroupChunks = 0;
  static constexpr uint32_t kExtraBytes = 0, kStages = 4;
  static constexpr bool kInterleaved = false, kBiases = false, kNf4 = false, kDouble = false;
  template <uint32_t kPitch = kRowBytes>
  static __device__ __forceinline__ uint4
  weights(uint32_t stage, uint32_t row, uint32_t chunk, uint32_t t, uint32_t) {
    return load_shared16(stage + row * kPitch + (((4 * chunk + t) ^ swizzle(row)) << 4));
  }
};

// ---- affine ----

/// Eight 4-bit codes q as pairs {i, i + 4} of 1 + q/16, exactly: one shift and one logic operation a
/// pair puts them into the upper bits of a mantissa. w = scale·q + bias = 16·scale·v + (bias -
/// 16·scale).
template <typename T>
__device__ __forceinline__ uint4 int4_pairs(uint32_t w) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  constexpr uint32_t kMask = kBf16 ? 0x00780078u : 0x03c003c0u;
  constexpr uint32_t kOne = kBf16 ? 0x3f803f80u : 0x3c003c00u;
  return make_uint4(
      mask_or(kBf16 ? w << 3 : w << 6, kMask, kOne),
      mask_or(kBf16 ? w >> 1 : w << 2, kMask, kOne),
      mask_or(kBf16 ? w >> 5 : w >> 2, kMask, kOne),
      mask_or(kBf16 ? w >> 9 : w >> 6, kMask, kOne));
}
__device__ __forceinline__ float2 int4_scale_and_bias(float scale, float bias) {
  return make_float2(16.0f * scale, fmaf(-16.0f, scale, bias));
}

/// Words of a row's scales in a stage, f32 ones at most, and one more against bank conflicts.
template <class Format>
constexpr uint32_t scale_pitch() {
  return Format::kRowBytes / Format::kChunkBytes / Format::kGroupChunks + 1;
}
template <class Format>
constexpr uint32_t scale_bytes() {
  return 16 * scale_pitch<Format>() * 4;
}

template <typename T, uint32_t kGroup>
struct Int4 {
  using Storage = T;
  static constexpr uint32_t kRowBytes = 128, kChunkBytes = 16, kGroupChunks = kGroup / kChunk;
  static constexpr uint32_t kExtraBytes = 2 * 16 * (8 / kGroupChunks + 1) * 4, kStages = 3;
  static constexpr bool kInterleaved = true, kBiases = true, kNf4 = false, kDouble = false;
  static __device__ __forceinline__ uint4
  weights(uint32_t stage, uint32_t row, uint32_t chunk, uint32_t t, uint32_t) {
    const uint32_t w =
        load_shared4(stage + row * kRowBytes + ((chunk ^ swizzle(row)) << 4) + 4 * t);
    return int4_pairs<T>(w);
  }
  static __device__ __forceinline__ float2 scale_and_bias(float scale, float bias) {
    return int4_scale_and_bias(scale, bias);
  }
};

template <typename T, uint32_t kGroup>
struct Int8 {
  using Storage = T;
  static constexpr uint32_t kRowBytes = 256, kChunkBytes = 32, kGroupChunks = kGroup / kChunk;
  static constexpr uint32_t kExtraBytes = 2 * 16 * (8 / kGroupChunks + 1) * 4, kStages = 2;
  static constexpr bool kInterleaved = false, kBiases = true, kNf4 = false, kDouble = false;
  /// Codes 0 … 255 are exact in either type.
  static __device__ __forceinline__ uint32_t pair(uint32_t word, uint32_t upper) {
    if constexpr (std::is_same_v<T, bf16>) {
      const float lo =
          __uint_as_float(__byte_perm(word, 0x4b000000u, upper ? 0x7442 : 0x7440)) - 8388608.0f;
      const float hi =
          __uint_as_float(__byte_perm(word, 0x4b000000u, upper ? 0x7443 : 0x7441)) - 8388608.0f;
      const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
      return *reinterpret_cast<const uint32_t*>(&both);
    } else {
      const uint32_t biased = __byte_perm(word, 0x64006400u, upper ? 0x5352 : 0x5150);
      const __half2 both =
          __hsub2(*reinterpret_cast<const __half2*>(&biased), __float2half2_rn(1024.0f));
      return *reinterpret_cast<const uint32_t*>(&both);
    }
  }
  static __device__ __forceinline__ uint4
  weights(uint32_t stage, uint32_t row, uint32_t chunk, uint32_t t, uint32_t) {
    const uint32_t slot = (2 * chunk + t / 2) ^ swizzle(row);
    const uint2 w = load_shared8(stage + row * kRowBytes + (slot << 4) + (t & 1) * 8);
    return make_uint4(pair(w.x, 0), pair(w.x, 1), pair(w.y, 0), pair(w.y, 1));
  }
  static __device__ __forceinline__ float2 scale_and_bias(float scale, float bias) {
    return make_float2(scale, bias);
  }
};

// ---- nf4 ----

inline constexpr uint32_t kAbsmaxPitch = 5;  ///< words of a row's 4 absmax values, no conflicts
inline constexpr uint32_t kTableCopies = 16;
inline constexpr uint32_t kTableBytes = 256 * kTableCopies * 4;

/// Eight codes as natural pairs; table: the address of the lane's own copy.
template <uint32_t kCopies = kTableCopies>
__device__ __forceinline__ uint4 nf4_pairs(uint32_t w, uint32_t table) {
  static_assert(kCopies == 16 || kCopies == 32);
  constexpr uint32_t kShift = kCopies == 16 ? 6 : 7, kMask = 0xffu << kShift;
  return make_uint4(
      load_shared4(table + ((w << kShift) & kMask)),
      load_shared4(table + ((w >> (8 - kShift)) & kMask)),
      load_shared4(table + ((w >> (16 - kShift)) & kMask)),
      load_shared4(table + ((w >> (24 - kShift)) & kMask)));
}

/// A byte of codes is looked up in a table of pairs of which two lanes share a copy, in banks that
/// no others use: levels rounded to x's type, as if W had been dequantised to it, but the absmax
/// stays f32.
template <typename T, bool kDoubleQuant>
struct Nf4 {
  using Storage = T;
  static constexpr uint32_t kRowBytes = 128, kChunkBytes = 16, kGroupChunks = 2, kStages = 3;
  static constexpr uint32_t kExtraBytes = 16 * kAbsmaxPitch * 4 + (kDoubleQuant ? 16 * 2 * 4 : 0);
  static constexpr bool kInterleaved = false, kBiases = false, kNf4 = true, kDouble = kDoubleQuant;
  /// table: the address of the lane's own copy.
  static __device__ __forceinline__ uint4
  weights(uint32_t stage, uint32_t row, uint32_t chunk, uint32_t t, uint32_t table) {
    const uint32_t w =
        load_shared4(stage + row * kRowBytes + ((chunk ^ swizzle(row)) << 4) + 4 * t);
    return nf4_pairs(w, table);
  }
};

}  // namespace metal_lora::cuda::gemv
