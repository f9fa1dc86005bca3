// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// What one kernel call of a sequence takes, from a fixed region; reset() before the next, which
/// the stream orders behind it.
class StageScratch final : public Scratch {
 public:
  /// More than the region holds comes from `beyond`; null: it is an error.
  StageScratch(char* base, size_t bytes, Scratch* beyond)
      : base_(base), bytes_(bytes), beyond_(beyond) {}
  void* take(size_t bytes) override {
    const size_t size = (bytes + 255) / 256 * 256;
    if (used_ + size > bytes_) {
      if (beyond_ == nullptr) throw CudaError("[scratch] a kernel wants more than there is");
      return beyond_->take(bytes);
    }
    void* p = base_ + used_;
    used_ += size;
    return p;
  }
  void reset() { used_ = 0; }

 private:
  char* base_;
  size_t bytes_;
  Scratch* beyond_;
  size_t used_ = 0;
};

}  // namespace metal_lora::cuda
