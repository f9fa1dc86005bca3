// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What several commands share: the options that name a model and an adapter, and loading them.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "metal_lora/adapter.h"
#include "metal_lora/generate.h"
#include "metal_lora/model.h"
#include "src/cli/console.h"
#include "src/text/chat_template.h"
#include "src/text/tokenizer.h"

namespace metal_lora::cli {

struct ModelOptions {
  std::string model;
  std::string adapter_path;
  std::string dtype;
  Quantization quantize = Quantization::none;
  int quantize_group_size = 64;
  bool double_quant = true;

  void add_to(CLI::App& app, const std::string& default_dtype);
  LoadOptions load_options() const;
};

/// "float32", "bfloat16", "float16" (and f32, bf16, f16). Error invalid_input for others.
mlx::core::Dtype parse_dtype(const std::string& name);
/// Of a written model's dense tensors when `name` is empty: bfloat16, or float16 beside quantised
/// weights, whose scales are float16, so that MLX computes in one dtype.
mlx::core::Dtype target_dtype(const std::string& name, int quantize_bits);

/// --quantize and --quantize-group-size of a model to write.
struct TargetQuantization {
  std::string format;
  int group_size = 64;

  void add_to(CLI::App& app, const std::string& help, const std::string& group_flags);
  /// 0 (none), 4 or 8. Error unsupported for nf4, which no model folder can hold; invalid_input for
  /// other text.
  int bits() const;
};

struct Session {
  std::shared_ptr<const Model> model;
  text::Tokenizer tokenizer;
  std::optional<text::ChatTemplate> chat_template;
  AdapterWeights adapter;
  AdapterInfo adapter_info;

  /// Loads what the options name, with a progress line.
  static Session load(Console& console, const ModelOptions& options);

  /// Token ids of a prompt as it stands.
  std::vector<int32_t> encode(const std::string& prompt) const;
  /// Token ids of a conversation, in the model's chat template, up to where the answer begins.
  std::vector<int32_t> encode_chat(const nlohmann::ordered_json& messages) const;
};

struct SamplingFlags {
  GenerateOptions options;
  std::vector<std::string> logit_bias;  ///< "id:bias"

  /// --max-tokens, --temp, --top-k … for generate and chat.
  void add_to(CLI::App& app);
  GenerateOptions resolve() const;
};

/// One row of a result line: {"text", "tokens", "prompt_tokens", …}.
nlohmann::ordered_json to_json(const GenerationResult& result);

}  // namespace metal_lora::cli
