// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

#include "metal_lora/adapter.h"
#include "metal_lora/train.h"

namespace metal_lora::train {

/// Paths of the linears that the configuration adapts, in the model's order: lora_keys (mlx-lm's
/// "self_attn.q_proj", PEFT's "q_proj", a whole path, "embed_tokens") in the last num_layers
/// layers. Error invalid_input for a key that matches nothing or too many layers.
std::vector<LinearInfo> target_linears(const ModelConfig& model, const TrainingConfig& config);

/// A fresh adapter in f32: A [rank, in] uniform in ±1/√in, B [out, rank] zero. This is mlx-lm's
/// initialisation and, as √3·gain(√5)/√in = 1/√in, also PEFT's kaiming_uniform(a = √5). Values
/// depend on the seed and the module's path alone.
AdapterWeights initial_adapter(const ModelConfig& model, const TrainingConfig& config);

/// The adapter that resume_adapter_file holds, in f32. What the configuration does not set (rank,
/// keys, num_layers; scale where the file knows it) is the file's; what it sets must agree, and
/// modules that it asks for beyond the file's start fresh.
AdapterWeights adapter_from_file(const ModelConfig& model, const TrainingConfig& config);

}  // namespace metal_lora::train
