// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/elementwise.h"

#include "kernels/cpu/isa.h"

namespace metal_lora::cpu {

extern const Elementwise elementwise_scalar;
#if defined(__x86_64__)
extern const Elementwise elementwise_avx2;
extern const Elementwise elementwise_avx512;
extern const Elementwise elementwise_avx512_bf16;
#endif

const Elementwise& elementwise() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512_bf16:
      return elementwise_avx512_bf16;
    case Isa::avx512:
      return elementwise_avx512;
    case Isa::avx2:
      return elementwise_avx2;
    default:
      break;
  }
#endif
  // On AArch64 the baseline has NEON: this set is the NEON one.
  return elementwise_scalar;
}

void convert_range(size_t count, DType x_dtype, const void* x, DType y_dtype, void* y) {
  elementwise().convert(count, x_dtype, x, y_dtype, y);
}

void rms_norm_row(
    uint32_t dims,
    float eps,
    const float* x,
    DType weight_dtype,
    const void* weight,
    DType y_dtype,
    void* y) {
  elementwise().rms_norm(dims, eps, x, weight_dtype, weight, y_dtype, y);
}

void rope_head(
    uint32_t head_dim,
    const float* cos_sin,
    bool inverse,
    DType x_dtype,
    const void* x,
    DType y_dtype,
    void* y) {
  elementwise().rope_head(head_dim, cos_sin, inverse, x_dtype, x, y_dtype, y);
}

void swiglu_range(
    size_t count, DType x_dtype, const void* gate, const void* up, DType y_dtype, void* y) {
  elementwise().swiglu(count, x_dtype, gate, up, y_dtype, y);
}

void attend_keys(
    uint32_t heads,
    uint32_t head_dim,
    float scale,
    const float* q,
    DType kv_dtype,
    const void* k,
    size_t k_stride,
    const void* v,
    size_t v_stride,
    uint32_t keys,
    SoftmaxState* state,
    float* acc) {
  elementwise().attend_keys(
      heads, head_dim, scale, q, kv_dtype, k, k_stride, v, v_stride, keys, state, acc);
}

float combine_attention(
    uint32_t head_dim,
    uint32_t parts,
    const SoftmaxState* states,
    size_t state_stride,
    const float* accs,
    size_t acc_stride,
    DType y_dtype,
    void* y) {
  return elementwise().combine_attention(
      head_dim, parts, states, state_stride, accs, acc_stride, y_dtype, y);
}

}  // namespace metal_lora::cpu
