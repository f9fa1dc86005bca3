// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/tensor_weight.h"

#include <cstring>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "src/io/affine.h"
#include "src/io/dequantize.h"
#include "src/io/result.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

using Bytes = std::vector<std::byte>;

void check_shape(const io::TensorInfo& t, const std::string& name, std::vector<uint64_t> expected) {
  if (t.shape == expected) return;
  throw Error(
      ErrorCode::invalid_input,
      fmt::format(
          "[{}] must be {} but is {}",
          name,
          io::format_shape(expected),
          io::format_shape(t.shape)));
}

std::optional<WeightFormat> plain_format(io::TensorType type) {
  switch (type) {
    case io::TensorType::f32:
      return WeightFormat::f32;
    case io::TensorType::f16:
      return WeightFormat::f16;
    case io::TensorType::bf16:
      return WeightFormat::bf16;
    default:
      return std::nullopt;
  }
}

/// The tensor's rows with q/k order undone; null when nothing had to move.
std::shared_ptr<Bytes> unpermuted(const io::TensorInfo& t, int heads) {
  if (heads <= 0) return nullptr;
  auto bytes = std::make_shared<Bytes>(t.nbytes);
  io::unwrap(io::unpermute_rows(
      t.data,
      t.shape[0],
      t.nbytes / std::max<uint64_t>(t.shape[0], 1),
      static_cast<uint64_t>(heads),
      bytes->data()));
  return bytes;
}

Weight affine_weight(
    const io::TensorInfo& t, const std::byte* source, const io::AffineSpec& spec, WeightParams p) {
  p.format = spec.bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
  p.group_size = static_cast<uint32_t>(spec.group_size);
  p.scales_dtype = spec.f32_scales ? DType::f32 : DType::f16;
  const size_t data_bytes = spec.packed_words_per_row(p.k) * 4 * p.n;
  const size_t scale_bytes = spec.groups_per_row(p.k) * spec.scale_bytes() * p.n;
  auto bytes = std::make_shared<Bytes>(data_bytes + 2 * scale_bytes);
  auto* data = bytes->data();
  io::unwrap(io::to_affine(
      t.type,
      source,
      p.n,
      p.k,
      reinterpret_cast<uint32_t*>(data),
      data + data_bytes,
      data + data_bytes + scale_bytes));
  return Weight::view(p, bytes, data, data + data_bytes, data + data_bytes + scale_bytes);
}

Weight dequantized_weight(
    const io::TensorInfo& t, const std::byte* source, const WeightParams& p, mx::Dtype dtype) {
  auto buffer = mx::allocator::malloc(static_cast<size_t>(p.n) * p.k * sizeof(float));
  io::dequantize_blocks(
      t.type, source, t.element_count(), static_cast<float*>(buffer.buffer().raw_ptr()));
  mx::array dense(std::move(buffer), {static_cast<int>(p.n), static_cast<int>(p.k)}, mx::float32);
  return Weight::dense(mx::astype(dense, dtype));
}

}  // namespace

Weight tensor_weight(
    const io::TensorInfo& t,
    const std::string& name,
    int out,
    int in,
    mx::Dtype dense_dtype,
    int heads) {
  check_shape(t, name, {static_cast<uint64_t>(out), static_cast<uint64_t>(in)});
  WeightParams p;
  p.n = static_cast<uint32_t>(out);
  p.k = static_cast<uint32_t>(in);
  auto moved = unpermuted(t, heads);
  const std::byte* source = moved ? moved->data() : t.data;
  if (const auto format = plain_format(t.type)) {
    p.format = *format;
    if (moved) return Weight::view(p, moved, source);
    if (t.is_aligned() && t.file) return Weight::view(p, t.file, source);
    auto copy = std::make_shared<Bytes>(source, source + t.nbytes);
    const auto* data = copy->data();
    return Weight::view(p, std::move(copy), data);
  }
  if (!io::is_quantized(t.type)) {
    throw Error(
        ErrorCode::unsupported,
        fmt::format(
            "[{}] a weight of type {} is not supported", name, io::tensor_type_name(t.type)));
  }
  if (const auto spec = io::affine_spec(t.type)) return affine_weight(t, source, *spec, p);
  return dequantized_weight(t, source, p, dense_dtype);
}

mx::array tensor_vector(const io::TensorInfo& t, const std::string& name, int size, int heads) {
  check_shape(t, name, {static_cast<uint64_t>(size)});
  if (!plain_format(t.type)) {
    throw Error(
        ErrorCode::unsupported,
        fmt::format(
            "[{}] a vector of type {} is not supported", name, io::tensor_type_name(t.type)));
  }
  auto moved = unpermuted(t, heads);
  auto buffer = mx::allocator::malloc(static_cast<size_t>(size) * sizeof(float));
  io::dequantize_blocks(
      t.type,
      moved ? moved->data() : t.data,
      static_cast<uint64_t>(size),
      static_cast<float*>(buffer.buffer().raw_ptr()));
  return mx::array(std::move(buffer), {size}, mx::float32);
}

}  // namespace metal_lora
