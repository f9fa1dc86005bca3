// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <vector>

#include "src/io/json.h"

namespace metal_lora {

struct RopeFrequencies {
  std::vector<float> inv_freq;  ///< [head_dim/2]
  float factor = 1.0f;          ///< on cos and sin (YaRN)
};

/// theta^(-2i/d), scaled as `scaling` says: absent, or {rope_type | type: default, linear, llama3,
/// yarn, …} as in Hugging Face configs. Others are refused by name.
RopeFrequencies rope_frequencies(
    double theta, int head_dim, int max_position_embeddings, const io::Json* scaling, const std::string& path);

}  // namespace metal_lora
