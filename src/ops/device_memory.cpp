// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/device_memory.h"

#include "metal_lora/ops.h"
#include "src/launch/backend.h"

namespace metal_lora::ops {

std::optional<DeviceMemory> device_memory() {
  if (active_backend() != Backend::cuda) return std::nullopt;
  const auto stats = device_memory_stats();
  return DeviceMemory{stats.total_bytes, stats.peak_bytes};
}

}  // namespace metal_lora::ops
