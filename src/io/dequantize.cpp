// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/dequantize.h"

#include <fmt/format.h>

#include "src/io/float16.h"
#include "src/io/quant_blocks.h"
#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

template <class T>
void convert(const std::byte* source, uint64_t elements, float* out) {
  for (uint64_t i = 0; i < elements; ++i) {
    out[i] = static_cast<float>(load_le<T>(source + i * sizeof(T)));
  }
}

template <float (*kToFloat)(uint16_t)>
void convert_half(const std::byte* source, uint64_t elements, float* out) {
  for (uint64_t i = 0; i < elements; ++i) out[i] = kToFloat(load_le<uint16_t>(source + 2 * i));
}

// Level times scale is exact in f32 (at most 8 + 17 bits), so a compiler that fuses it with the
// addition gives the same bits.
template <TensorType kType>
void dequantize_groups(const std::byte* source, uint64_t elements, float* out) {
  using Format = QuantFormat<kType>;
  const TensorTypeTraits& traits = tensor_type_traits(kType);
  LevelGroup group{};
  for (uint64_t b = 0; b < elements / traits.block_elements; ++b) {
    for (int g = 0; g < Format::kGroups; ++g) {
      read_group<kType>(source, g, group);
      for (int j = 0; j < 32; ++j) {
        const float level = static_cast<float>(static_cast<int>(group.levels[j]) - Format::kZero);
        if constexpr (Format::kZero > 0) {
          out[j] = level * group.scale;
        } else {
          out[j] = level * group.scale + group.bias;
        }
      }
      out += 32;
    }
    source += traits.block_bytes;
  }
}

// Q6_K: 256 weights of 6 bits in two halves, a signed 8-bit scale for each 16, one f16.
void dequantize_q6_k(const std::byte* block, float* out) {
  const float scale = f16_to_f32(load_le<uint16_t>(block + 208));
  const auto byte = [&](size_t i) { return std::to_integer<uint8_t>(block[i]); };
  for (int half = 0; half < 2; ++half) {
    const size_t low = static_cast<size_t>(half) * 64;
    const size_t high = 128 + static_cast<size_t>(half) * 32;
    const size_t scales = 192 + static_cast<size_t>(half) * 8;
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int l = 0; l < 32; ++l) {
        const uint8_t nibbles = byte(low + static_cast<size_t>((quarter % 2) * 32 + l));
        const int low_bits = quarter < 2 ? nibbles & 15 : nibbles >> 4;
        const int high_bits = (byte(high + static_cast<size_t>(l)) >> (2 * quarter)) & 3;
        const auto group_scale =
            static_cast<int8_t>(byte(scales + static_cast<size_t>(2 * quarter + l / 16)));
        const int level = (low_bits | (high_bits << 4)) - 32;
        out[half * 128 + quarter * 32 + l] =
            scale * static_cast<float>(group_scale) * static_cast<float>(level);
      }
    }
  }
}

}  // namespace

void dequantize_blocks(TensorType type, const std::byte* source, uint64_t elements, float* out) {
  switch (type) {
    case TensorType::f64:
      return convert<double>(source, elements, out);
    case TensorType::f32:
      if (elements > 0) std::memcpy(out, source, elements * sizeof(float));
      return;
    case TensorType::f16:
      return convert_half<f16_to_f32>(source, elements, out);
    case TensorType::bf16:
      return convert_half<bf16_to_f32>(source, elements, out);
    case TensorType::i8:
      return convert<int8_t>(source, elements, out);
    case TensorType::i16:
      return convert<int16_t>(source, elements, out);
    case TensorType::i32:
      return convert<int32_t>(source, elements, out);
    case TensorType::i64:
      return convert<int64_t>(source, elements, out);
    case TensorType::u8:
    case TensorType::boolean:
      return convert<uint8_t>(source, elements, out);
    case TensorType::u16:
      return convert<uint16_t>(source, elements, out);
    case TensorType::u32:
      return convert<uint32_t>(source, elements, out);
    case TensorType::u64:
      return convert<uint64_t>(source, elements, out);
    case TensorType::q4_0:
      return dequantize_groups<TensorType::q4_0>(source, elements, out);
    case TensorType::q4_1:
      return dequantize_groups<TensorType::q4_1>(source, elements, out);
    case TensorType::q5_0:
      return dequantize_groups<TensorType::q5_0>(source, elements, out);
    case TensorType::q5_1:
      return dequantize_groups<TensorType::q5_1>(source, elements, out);
    case TensorType::q8_0:
      return dequantize_groups<TensorType::q8_0>(source, elements, out);
    case TensorType::q4_k:
      return dequantize_groups<TensorType::q4_k>(source, elements, out);
    case TensorType::q5_k:
      return dequantize_groups<TensorType::q5_k>(source, elements, out);
    case TensorType::q6_k:
      for (uint64_t b = 0; b < elements / 256; ++b) {
        dequantize_q6_k(source + b * 210, out + b * 256);
      }
      return;
  }
}

Result<void> dequantize_rows(
    const TensorInfo& tensor, uint64_t first_row, uint64_t rows, float* out) {
  if (!(CheckedSize(first_row) + rows).at_most(tensor.row_count())) {
    return Failure{
        ErrorCode::invalid_input,
        tensor.file ? tensor.file->path() : std::string(),
        {},
        quote_text(tensor.name),
        fmt::format("read within its {} rows", tensor.row_count()),
        fmt::format("asked for {} rows from {}", rows, first_row),
        ""};
  }
  dequantize_blocks(
      tensor.type, tensor.data + first_row * tensor.row_bytes(), rows * tensor.row_elements(), out);
  return {};
}

}  // namespace metal_lora::io
