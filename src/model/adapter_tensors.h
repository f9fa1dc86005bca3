// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Bit-exact shuffles of an adapter's factors, and the names under which they are stored. They work
// on bytes: a value that came from a file goes back as it was, whatever its dtype.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include <mlx/array.h>

#include "metal_lora/adapter.h"

namespace metal_lora {

/// safetensors metadata: true ranks of modules that were padded to one rank, as a JSON object.
inline constexpr std::string_view kRanksMetadata = "metal_lora.ranks";
/// safetensors metadata: the configuration of the other format, carried along so that converting
/// back gives it again.
std::string carried_config_key(AdapterFormat format);

/// out [columns, rows] = source [rows, columns] turned, elements of 2 or 4 bytes.
void transpose_bytes(
    const std::byte* source, uint64_t rows, uint64_t columns, size_t element_bytes, std::byte* out);
/// The first rows × columns of a matrix; beyond its own extent: zeros.
mlx::core::array copy_block(const mlx::core::array& matrix, int rows, int columns);
/// Elements of an evaluated matrix that are not +0.
uint64_t count_nonzero_bytes(const mlx::core::array& matrix);
/// Index of the first NaN or infinity of a contiguous f32, f16 or bf16 array.
std::optional<uint64_t> find_non_finite(const mlx::core::array& values);

/// Sorts modules as a reader expects them: by layer, then in the order of Slot, the rest last.
std::tuple<int64_t, int, std::string> module_order(const std::string& path);

}  // namespace metal_lora
