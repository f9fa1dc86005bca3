// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <cstring>

#include <mlx/ops.h>

#include "kernels/cpu/transformer_kernels.h"
#include "metal_lora/ops.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/mlx_ops.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/kv_cache.h"
#include "kernels/cuda/transformer_kernels.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

AttentionParams checked_params(
    const char* op,
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    int window) {
  check_shape(op, "q", q, {-1, -1, -1});
  check_shape(op, "k", k, {-1, -1, q.shape(2)});
  check_shape(op, "v", v, {k.shape(0), k.shape(1), k.shape(2)});
  check_dtype(op, "k", k, q.dtype());
  check_dtype(op, "v", v, q.dtype());
  if (k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) {
    refuse(
        op,
        "q_heads",
        fmt::format("a multiple of kv_heads {}", k.shape(1)),
        std::to_string(q.shape(1)));
  }
  if (window < 0) refuse(op, "window", "0 or more", std::to_string(window));
  AttentionParams p;
  p.q_tokens = static_cast<uint32_t>(q.shape(0));
  p.kv_tokens = static_cast<uint32_t>(k.shape(0));
  p.q_heads = static_cast<uint32_t>(q.shape(1));
  p.kv_heads = static_cast<uint32_t>(k.shape(1));
  p.head_dim = static_cast<uint32_t>(q.shape(2));
  p.window = static_cast<uint32_t>(window);
  p.scale = scale;
  p.dtype = to_kernel(q.dtype());
  p.q_stride = p.o_stride = static_cast<size_t>(p.q_heads) * p.head_dim;
  p.k_stride = p.v_stride = static_cast<size_t>(p.kv_heads) * p.head_dim;
  return p;
}

const int32_t* ints(const void* p) {
  return static_cast<const int32_t*>(p);
}

/// q, k, v, segment_start -> their gradients, from out, logsumexp and dout.
Arrays backward(
    const AttentionParams& p, const Arrays& primals, const mx::array& dout, const Arrays& outputs) {
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    entry(
        p,
        args.in[0],
        args.in[1],
        args.in[2],
        ints(args.in[3]),
        args.in[4],
        static_cast<const float*>(args.in[5]),
        args.in[6],
        args.out[0],
        args.out[1],
        args.out[2]);
  };
  return launch(
      {.kernel = "attention_backward",
       .inputs = {primals[0], primals[1], primals[2], primals[3], outputs[0], outputs[1], dout},
       .outputs =
           {{primals[0].shape(), primals[0].dtype()},
            {primals[1].shape(), primals[1].dtype()},
            {primals[2].shape(), primals[2].dtype()}},
       .cpu = on_cpu(call, cpu::attention_backward),
       .cuda = METAL_LORA_ON_CUDA(call, attention_backward)});
}

#ifdef METAL_LORA_CUDA
/// The position stays on the device, where it is moved into the cache.
CudaFunction cached_attention_cuda(AttentionParams p, int capacity, int layer) {
  p.kv_tokens = static_cast<uint32_t>(capacity);
  return [=](const cuda::Context& context, const KernelArgs& args) {
    const size_t row_bytes = p.k_stride * (p.dtype == DType::f32 ? 4 : 2);
    const size_t half_bytes = row_bytes * p.kv_tokens;
    auto* keys = static_cast<std::byte*>(args.out[1]) + 2 * half_bytes * layer;
    auto* values = keys + half_bytes;
    auto* at = static_cast<int32_t*>(context.scratch->take(sizeof(int32_t)));
    cuda::write_kv_cache(
        context,
        p.q_tokens,
        p.kv_tokens,
        row_bytes,
        ints(args.in[4]),
        args.in[1],
        args.in[2],
        keys,
        values,
        at);
    cuda::attention_forward(
        context, p, args.in[0], keys, values, nullptr, args.out[0], nullptr, at);
  };
}
#else
CudaFunction cached_attention_cuda(const AttentionParams&, int, int) {
  return {};
}
#endif

}  // namespace

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& segment_start,
    float scale,
    int window) {
  constexpr const char* kOp = "attention";
  const AttentionParams p = checked_params(kOp, q, k, v, scale, window);
  if (k.shape(0) != q.shape(0)) refuse(kOp, "k", "as many tokens as q", shape_text(k));
  check_shape(kOp, "segment_start", segment_start, {q.shape(0)});
  check_dtype(kOp, "segment_start", segment_start, mx::int32);
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    auto* logsumexp = static_cast<float*>(args.out[1]);
    entry(p, args.in[0], args.in[1], args.in[2], ints(args.in[3]), args.out[0], logsumexp);
  };
  return launch(
      {.kernel = kOp,
       .inputs = {q, k, v, segment_start},
       .outputs = {{q.shape(), q.dtype()}, {{q.shape(1), q.shape(0)}, mx::float32}},
       .cpu = on_cpu(call, cpu::attention_forward),
       .cuda = METAL_LORA_ON_CUDA(call, attention_forward),
       .mlx =
           [scale, window](const Arrays& in, mx::StreamOrDevice s) {
             return Arrays{with_mlx::attention(in, scale, window, s)};
           },
       .vjp =
           [p](const Arrays& primals,
               const Arrays& cotangents,
               const std::vector<int>& argnums,
               const Arrays& outputs) {
             auto grads = backward(p, primals, cotangents[0], outputs);
             Arrays result;
             for (int i : argnums) {
               if (i > 2)
                 refuse("attention", "the differentiated input", "q, k or v", "segment_start");
               result.push_back(grads[i]);
             }
             return result;
           },
       .reference =
           [scale, window](const Arrays& in) {
             auto out = reference::attention(in[0], in[1], in[2], in[3], scale, window);
             return Arrays{out, mx::zeros({in[0].shape(1), in[0].shape(0)})};
           }})[0];
}

std::pair<mx::array, mx::array> cached_attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& cache,
    int layer,
    const mx::array& position,
    float scale,
    int window) {
  constexpr const char* kOp = "cached_attention";
  const AttentionParams params = checked_params(kOp, q, k, v, scale, window);
  check_shape(kOp, "cache", cache, {-1, 2, -1, k.shape(1), k.shape(2)});
  check_dtype(kOp, "cache", cache, q.dtype());
  check_shape(kOp, "position", position, {});
  check_dtype(kOp, "position", position, mx::int32);
  const int tokens = q.shape(0), capacity = cache.shape(2);
  if (k.shape(0) != tokens) refuse(kOp, "k", "as many tokens as q", shape_text(k));
  if (layer < 0 || layer >= cache.shape(0))
    refuse(kOp, "layer", "in the cache", std::to_string(layer));
  if (tokens > capacity) {
    refuse(kOp, "tokens", fmt::format("at most {}", capacity), std::to_string(tokens));
  }
  const size_t token_bytes = params.k_stride * cache.itemsize();
  const size_t half_bytes = token_bytes * capacity;
  auto outputs = launch(
      {.kernel = kOp,
       .inputs = {q, k, v, cache, position},
       .outputs =
           {{q.shape(), q.dtype()},
            {.shape = cache.shape(),
             .dtype = cache.dtype(),
             .in_place_of = 3,
             .outlives_graph = true}},
       .cpu =
           [=](const KernelArgs& args) {
             const int at = *ints(args.in[4]);
             if (at < 0 || at > capacity - tokens) {
               refuse(
                   kOp,
                   "position + tokens",
                   fmt::format("at most {}", capacity),
                   fmt::format("{} + {}", at, tokens));
             }
             AttentionParams p = params;
             p.kv_offset = static_cast<uint32_t>(at);
             p.kv_tokens = static_cast<uint32_t>(at + tokens);
             auto* keys = static_cast<std::byte*>(args.out[1]) + 2 * half_bytes * layer;
             auto* values = keys + half_bytes;
             std::memcpy(keys + token_bytes * at, args.in[1], token_bytes * tokens);
             std::memcpy(values + token_bytes * at, args.in[2], token_bytes * tokens);
             cpu::attention_forward(p, args.in[0], keys, values, nullptr, args.out[0], nullptr);
           },
       .cuda = cached_attention_cuda(params, capacity, layer),
       .mlx =
           [=](const Arrays& in, mx::StreamOrDevice s) {
             return with_mlx::cached_attention(in, layer, scale, window, s);
           },
       .may_throw = true});
  return {outputs[0], outputs[1]};
}

}  // namespace metal_lora::ops
