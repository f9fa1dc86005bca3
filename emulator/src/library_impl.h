// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <vector>

#include "metal_emulator/emulator.h"
#include "src/runtime/abi.h"

namespace metal_emulator {

struct Library::Impl {
  Impl() = default;
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const abi::Library* table = nullptr;
  std::filesystem::path path;  ///< of the shared library, for line tables
  void* handle = nullptr;      ///< dlopen's
  std::vector<KernelInfo> kernels;
  std::vector<FunctionConstantInfo> function_constants;
};

}  // namespace metal_emulator
