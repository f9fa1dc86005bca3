// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

#include <mlx/stream.h>

namespace metal_lora {

enum class Backend { cpu, metal, cuda, emulator };

/// METAL_LORA_BACKEND=cpu|metal|cuda|emulator, else the best that this build has kernels for.
/// Error unsupported when the one asked for is not in this build or finds no device. The variable
/// is read once.
Backend active_backend();
std::string_view backend_name(Backend backend);
/// Where the backend's graph nodes are built. The emulator's are CPU nodes. Metal's exist on a
/// machine without a GPU too: there they can be exported but not evaluated.
mlx::core::Stream backend_stream(Backend backend);
/// Makes MLX build there too what names no stream: a CPU node that waits for a GPU ancestor of the
/// same graph would wait for ever. For programs, at their start.
void set_default_device_for(Backend backend);
/// The backend runs the Metal kernels, on a GPU or on the emulator.
bool runs_metal_kernels(Backend backend);

/// While it lives, this thread's ops are built for another backend: exporting a Metal step on a
/// machine without one, counting the emulator's dispatches in a benchmark, comparing two in a test.
class BackendScope {
 public:
  explicit BackendScope(Backend backend);
  ~BackendScope();
  BackendScope(const BackendScope&) = delete;
  BackendScope& operator=(const BackendScope&) = delete;

 private:
  int previous_;
};

}  // namespace metal_lora
