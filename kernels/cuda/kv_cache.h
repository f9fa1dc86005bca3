// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// Writes k and v [tokens, row_bytes] to the rows from *position of one layer's two halves
/// [capacity, row_bytes]. *written = the position, moved so that the rows lie in the cache: a
/// kernel cannot refuse. tokens ≤ capacity; row_bytes is even.
void write_kv_cache(
    const Context& context,
    uint32_t tokens,
    uint32_t capacity,
    size_t row_bytes,
    const int32_t* position,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache,
    int32_t* written);

}  // namespace metal_lora::cuda
