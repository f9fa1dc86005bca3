// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "metal_lora/weight.h"
#include "src/io/tensor.h"

namespace metal_lora {

/// A tensor of a file as a weight [out, in]: plain types stay mapped (copied when unaligned), block
/// types become INT4 or INT8 exactly where they map onto them, and dense in `dense_dtype` otherwise.
/// heads > 0: undoes llama.cpp's interleaved-rope row order of q and k. `name` is for errors.
Weight tensor_weight(
    const io::TensorInfo& tensor, const std::string& name, int out, int in, mlx::core::Dtype dense_dtype, int heads = 0);

/// A tensor with `size` elements as an f32 vector; heads as above.
mlx::core::array tensor_vector(const io::TensorInfo& tensor, const std::string& name, int size, int heads = 0);

}  // namespace metal_lora
