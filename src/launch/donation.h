// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// When an output may take its input's buffer. MLX's own answer (array::is_donatable) is never yes
// for a node of several outputs, each of which holds the inputs, nor for memory that MLX did not
// allocate.
#pragma once

#include <mlx/array.h>

namespace metal_lora {

template <auto Member>
struct RevealHandles {
  friend long handles_of(const mlx::core::array& a) { return (a.*Member).use_count(); }
};
template struct RevealHandles<&mlx::core::array::array_desc_>;
/// Handles of an array that there are, those in graphs included.
long handles_of(const mlx::core::array& a);

/// Nobody but this node, of so many outputs, holds the array, and it is dense and as large as the
/// output. Its buffer may have other owners: see data_shared_ptr().use_count().
inline bool is_held_by_node_alone(
    const mlx::core::array& input, const mlx::core::array& output, size_t outputs) {
  return handles_of(input) <= static_cast<long>(outputs) && input.flags().row_contiguous &&
         input.data_size() == output.size() && input.itemsize() == output.itemsize();
}

}  // namespace metal_lora
