// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/backend.h"

#include <cstdlib>
#include <string>

#include "metal_lora/error.h"

namespace metal_lora {
namespace {

Backend choose() {
  const char* wanted = std::getenv("METAL_LORA_BACKEND");
  if (wanted == nullptr || *wanted == '\0' || std::string_view(wanted) == "cpu")
    return Backend::cpu;
  for (auto other : {Backend::metal, Backend::cuda, Backend::emulator}) {
    if (backend_name(other) == wanted) {
      throw Error(
          ErrorCode::unsupported,
          "[METAL_LORA_BACKEND] this build has kernels for cpu, got " + std::string(wanted),
          "unset METAL_LORA_BACKEND");
    }
  }
  throw Error(
      ErrorCode::invalid_input,
      "[METAL_LORA_BACKEND] must be cpu, metal, cuda or emulator, got " + std::string(wanted));
}

}  // namespace

Backend active_backend() {
  static const Backend backend = choose();
  return backend;
}

std::string_view backend_name(Backend backend) {
  switch (backend) {
    case Backend::cpu:
      return "cpu";
    case Backend::metal:
      return "metal";
    case Backend::cuda:
      return "cuda";
    case Backend::emulator:
      return "emulator";
  }
  return "unknown";
}

}  // namespace metal_lora
