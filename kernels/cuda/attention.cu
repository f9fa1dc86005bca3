// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Which attention kernel takes a call.
//
//   f32, or 16-bit rows not aligned to 16 bytes   attention_plain.cu    FFMA
//   at most kDecodeTokens queries                 attention_decode.cu   mma.sync, keys split
//   forward                                       attention_forward.cu  mma.sync
//   backward, head_dim <= 128                     attention_backward.cu mma.sync
#include <algorithm>
#include <string>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kDecodeTokens = 16;

void check_params(const AttentionParams& p) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("[attention] " + what);
  };
  if (p.head_dim == 0 || p.head_dim > 256) {
    fail("head_dim must be 1 ... 256 but is " + std::to_string(p.head_dim));
  }
  if (p.kv_heads == 0 || p.q_heads % p.kv_heads != 0) {
    fail(
        "q_heads must be a multiple of kv_heads but they are " + std::to_string(p.q_heads) +
        " and " + std::to_string(p.kv_heads));
  }
}

attention::Arguments arguments_of(
    const AttentionParams& p, const void* q, const void* k, const void* v, const int32_t* starts) {
  attention::Arguments a;
  a.p = p;
  a.p.window = std::min<uint32_t>(p.window, INT32_MAX);
  a.q = q;
  a.k = k;
  a.v = v;
  a.segment_start = starts;
  return a;
}

bool aligned(const void* p, size_t stride) {
  return is_aligned(p) && stride % 8 == 0;
}
bool fits_tiles(const attention::Arguments& a) {
  const AttentionParams& p = a.p;
  return p.dtype != DType::f32 && p.head_dim % 8 == 0 && aligned(a.q, p.q_stride) &&
         aligned(a.k, p.k_stride) && aligned(a.v, p.v_stride) && aligned(a.out, p.o_stride);
}

}  // namespace

void attention_forward(
    const Context& context,
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    void* out,
    float* logsumexp,
    const int32_t* kv_offset) {
  check_params(p);
  if (p.q_tokens == 0 || p.q_heads == 0) return;
  attention::Arguments a = arguments_of(p, q, k, v, segment_start);
  a.out = out;
  a.logsumexp = logsumexp;
  a.kv_offset = kv_offset;
  if (!fits_tiles(a)) return attention::forward_plain(context, a);
  if (p.q_tokens <= kDecodeTokens) return attention::forward_decode(context, a);
  if (attention::forward_sm90(context, a)) return;
  attention::forward_tiled(context, a);
}

void attention_backward(
    const Context& context,
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    const void* out,
    const float* logsumexp,
    const void* dout,
    void* dq,
    void* dk,
    void* dv,
    const float* rope) {
  check_params(p);
  if (rope && p.q_tokens != p.kv_tokens) {
    throw std::invalid_argument(
        "[attention_backward] with rope kv_tokens must be " + std::to_string(p.q_tokens) +
        " but is " + std::to_string(p.kv_tokens));
  }
  if ((p.q_tokens == 0 && p.kv_tokens == 0) || p.q_heads == 0) return;
  attention::Arguments a = arguments_of(p, q, k, v, segment_start);
  a.out = const_cast<void*>(out);
  a.logsumexp = const_cast<float*>(logsumexp);
  a.dout = dout;
  a.dq = dq;
  a.dk = dk;
  a.dv = dv;
  a.rope = rope;
  const bool tiled = fits_tiles(a) && p.head_dim <= 128 && aligned(dout, p.o_stride) &&
                     aligned(dq, p.q_stride) && aligned(dk, p.k_stride) && aligned(dv, p.v_stride);
  if (!tiled) attention::backward_plain(context, a);
  const bool turned = tiled && attention::backward_tiled(context, a);
  if (!rope || turned) return;
  RopePairParams back;
  back.tokens = p.q_tokens;
  back.q_heads = p.q_heads;
  back.kv_heads = p.kv_heads;
  back.head_dim = p.head_dim;
  back.q_stride = a.p.q_stride;
  back.k_stride = a.p.k_stride;
  back.dtype = p.dtype;
  back.inverse = true;
  rope_pair(context, back, dq, dk, rope);
}

}  // namespace metal_lora::cuda
