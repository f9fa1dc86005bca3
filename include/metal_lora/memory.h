// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <sys/resource.h>

#include <cstddef>

namespace metal_lora {

/// Largest resident size of this process so far, bytes: what the machine must have had. Pages of
/// mapped model files count once they were touched.
inline size_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return static_cast<size_t>(usage.ru_maxrss);
#else
  return static_cast<size_t>(usage.ru_maxrss) * 1024;
#endif
}

}  // namespace metal_lora
