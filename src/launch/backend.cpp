// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/backend.h"

#include <cstdlib>
#include <string>

#include <mlx/backend/metal/metal.h>

#include "metal_lora/error.h"
#include "src/launch/mlx_cuda.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

Backend best() {
  if (mx::metal::is_available()) return Backend::metal;
  return mlx_cuda::availability().available ? Backend::cuda : Backend::cpu;
}

Backend choose() {
  const char* wanted = std::getenv("METAL_LORA_BACKEND");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (auto backend : {Backend::cpu, Backend::metal, Backend::cuda, Backend::emulator}) {
    if (backend_name(backend) != wanted) continue;
    if (backend == Backend::metal && !mx::metal::is_available()) {
      throw Error(
          ErrorCode::unsupported,
          "[METAL_LORA_BACKEND] metal needs an Apple GPU, and MLX finds none",
          "METAL_LORA_BACKEND=emulator runs the same kernels on a CPU, slowly");
    }
#ifdef METAL_LORA_EMULATOR
    constexpr bool kHasEmulator = true;
#else
    constexpr bool kHasEmulator = false;
#endif
    if (backend == Backend::cuda && !mlx_cuda::availability().available) {
      const auto& missing = mlx_cuda::availability();
      throw Error(
          ErrorCode::unsupported,
          "[METAL_LORA_BACKEND] cuda cannot run here: " + missing.why,
          missing.hint);
    }
    if (backend == Backend::emulator && !kHasEmulator) {
      throw Error(
          ErrorCode::unsupported,
          std::string("[METAL_LORA_BACKEND] this build has no emulator, got ") + wanted,
          "unset METAL_LORA_BACKEND");
    }
    return backend;
  }
  throw Error(
      ErrorCode::invalid_input,
      "[METAL_LORA_BACKEND] must be cpu, metal, cuda or emulator, got " + std::string(wanted));
}

constexpr int kNotOverridden = -1;
thread_local int overridden = kNotOverridden;

}  // namespace

Backend active_backend() {
  if (overridden != kNotOverridden) return static_cast<Backend>(overridden);
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

bool runs_metal_kernels(Backend backend) {
  return backend == Backend::metal || backend == Backend::emulator;
}

mx::Stream backend_stream(Backend backend) {
  if (backend != Backend::metal && backend != Backend::cuda) {
    return mx::default_stream(mx::Device::cpu);
  }
  // MLX gives out streams of devices that it finds only.
  return mx::is_available(mx::Device::gpu) ? mx::default_stream(mx::Device::gpu)
                                           : mx::Stream(0, mx::Device::gpu);
}

void set_default_device_for(Backend backend) {
  mx::set_default_device(backend_stream(backend).device);
}

BackendScope::BackendScope(Backend backend) : previous_(overridden) {
  overridden = static_cast<int>(backend);
}

BackendScope::~BackendScope() {
  overridden = previous_;
}

}  // namespace metal_lora
