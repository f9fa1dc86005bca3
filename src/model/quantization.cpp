// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <array>

#include <fmt/format.h>

#include "kernels/nf4.h"
#include "metal_lora/error.h"
#include "metal_lora/model.h"

namespace metal_lora {
namespace {

/// By Quantization.
constexpr std::array<std::string_view, 4> kNames = {"0", "4", "8", "nf4"};

[[noreturn]] void refuse(const char* option, const std::string& expected, const std::string& got) {
  throw Error(
      ErrorCode::invalid_input, fmt::format("[{}] must be {} but is {}", option, expected, got));
}

}  // namespace

std::string_view quantization_name(Quantization quantization) {
  return kNames[static_cast<size_t>(quantization)];
}

std::optional<Quantization> parse_quantization(std::string_view name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == name) return static_cast<Quantization>(i);
  }
  return std::nullopt;
}

void LoadOptions::validate() const {
  const int group = quantize_group;
  if (group != 32 && group != 64 && group != 128) {
    refuse("quantize_group_size", "32, 64 or 128", std::to_string(group));
  }
  if (quantize == Quantization::nf4 && group != static_cast<int>(kNf4Block)) {
    refuse(
        "quantize_group_size",
        fmt::format("{} with quantize nf4", kNf4Block),
        std::to_string(group));
  }
  if (!double_quant && quantize != Quantization::nf4) {
    refuse(
        "double_quant",
        "turned off with quantize nf4 only",
        fmt::format("off with quantize {}", quantization_name(quantize)));
  }
}

}  // namespace metal_lora
