// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/version.h"

#include <fstream>
#include <thread>

#include <fmt/format.h>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "metal_lora/train.h"

namespace metal_lora::cli {
namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

}  // namespace

std::string version_line() {
  return fmt::format(
      "metal-lora {} ({}, MLX {}, {})",
      METAL_LORA_VERSION,
      METAL_LORA_COMMIT,
      METAL_LORA_MLX_VERSION,
      cpu::isa_name(cpu::active_isa()));
}

nlohmann::ordered_json build_and_machine() {
  return {
      {"version", METAL_LORA_VERSION},
      {"commit", METAL_LORA_COMMIT},
      {"compiler", __VERSION__},
      {"build_type", METAL_LORA_BUILD_TYPE},
      {"mlx", METAL_LORA_MLX_VERSION},
      {"processor", processor_name()},
      {"cores", std::thread::hardware_concurrency()},
      {"threads", cpu::thread_count()},
      {"isa", cpu::isa_name(cpu::active_isa())},
      {"isa_detected", cpu::isa_name(cpu::detected_isa())},
      {"memory_bytes", memory_limit_bytes()}};
}

}  // namespace metal_lora::cli
