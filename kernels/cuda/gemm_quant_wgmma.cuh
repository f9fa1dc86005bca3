// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What gemm_quant_sm90.cuh needs of Hopper beyond wgmma.cuh: wgmma with an operand in registers,
// prefetches, stores across and reads of a neighbour's shared memory.
#pragma once

#include <type_traits>

#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::quant {

using namespace sm90;

#define METAL_LORA_F8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define METAL_LORA_F16(i) METAL_LORA_F8(i), METAL_LORA_F8(i + 8)
#define METAL_LORA_F32(i) METAL_LORA_F16(i), METAL_LORA_F16(i + 16)
#define METAL_LORA_F64(i) METAL_LORA_F32(i), METAL_LORA_F32(i + 32)
#define METAL_LORA_F128(i) METAL_LORA_F64(i), METAL_LORA_F64(i + 64)
#define METAL_LORA_D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define METAL_LORA_D32 \
  METAL_LORA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define METAL_LORA_D64                                                                    \
  METAL_LORA_D32                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define METAL_LORA_D128                                                                   \
  METAL_LORA_D64                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84," \
  "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
  "%122,%123,%124,%125,%126,%127"
#define METAL_LORA_WGMMA(n, type, list, a0, a1, a2, a3, b, p, ...)                       \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p                               \
               ", 0;\n"                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list \
               "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", add, 1, 1, 0;\n}"     \
               : __VA_ARGS__                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(accumulate))
#define METAL_LORA_WGMMA_TYPES(n, list, a0, a1, a2, a3, b, p, ...)        \
  if constexpr (std::is_same_v<T, bf16>) {                                \
    METAL_LORA_WGMMA(n, "bf16", list, a0, a1, a2, a3, b, p, __VA_ARGS__); \
  } else {                                                                \
    METAL_LORA_WGMMA(n, "f16", list, a0, a1, a2, a3, b, p, __VA_ARGS__);  \
  }

/// d [64, 2·kCount] (+)= a [64, 16], in registers · right [2·kCount, 16]ᵀ in shared memory.
template <typename T, uint32_t kCount>
__device__ __forceinline__ void wgmma_registers(
    float (&d)[kCount], const uint32_t* a, uint64_t right, int accumulate) {
  static_assert(kCount == 16 || kCount == 32 || kCount == 64 || kCount == 128);
  if constexpr (kCount == 16) {
    METAL_LORA_WGMMA_TYPES(32, METAL_LORA_D16, 16, 17, 18, 19, 20, 21, METAL_LORA_F16(0))
  } else if constexpr (kCount == 32) {
    METAL_LORA_WGMMA_TYPES(64, METAL_LORA_D32, 32, 33, 34, 35, 36, 37, METAL_LORA_F32(0))
  } else if constexpr (kCount == 64) {
    METAL_LORA_WGMMA_TYPES(128, METAL_LORA_D64, 64, 65, 66, 67, 68, 69, METAL_LORA_F64(0))
  } else {
    METAL_LORA_WGMMA_TYPES(256, METAL_LORA_D128, 128, 129, 130, 131, 132, 133, METAL_LORA_F128(0))
  }
}
#undef METAL_LORA_WGMMA_TYPES
#undef METAL_LORA_WGMMA
#undef METAL_LORA_D128
#undef METAL_LORA_D64
#undef METAL_LORA_D32
#undef METAL_LORA_D16
#undef METAL_LORA_F128
#undef METAL_LORA_F64
#undef METAL_LORA_F32
#undef METAL_LORA_F16
#undef METAL_LORA_F8

/// A box to L2 alone. Harmless before the kernels ahead are done: L2 is where they write.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map),
               "r"(column),
               "r"(row)
               : "memory");
}

/// Two 8x8 matrices across: what a fragment calls a column becomes a row in memory.
__device__ __forceinline__ void store_across_x2(uint32_t shared, uint32_t a, uint32_t b) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(a), "r"(b)
      : "memory");
}
__device__ __forceinline__ float4 load_cluster16(uint32_t shared, uint32_t block) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared), "r"(block)
      : "memory");
  return v;
}
__device__ __forceinline__ void store_shared8(uint32_t shared, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t shared, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "f"(v[0]),
               "f"(v[1]),
               "f"(v[2]),
               "f"(v[3])
               : "memory");
}

}  // namespace metal_lora::cuda::quant
