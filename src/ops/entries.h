// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// One function unpacks an op's arguments for the CPU's and for CUDA's entry, whose signatures
// agree:
//   const auto call = [p](auto views, auto entry, const KernelArgs& args) { entry(p, args.in[0],
//   …); }; launch({…, .cpu = on_cpu(call, cpu::rope), .cuda = METAL_LORA_ON_CUDA(call, rope)});
#pragma once

#include <mlx/ops.h>

#include "src/launch/launch.h"
#include "src/ops/weight_view.h"

namespace metal_lora::ops {

/// A small array (a bias) that a kernel reads beside its inputs: row-contiguous on the active
/// backend, and evaluated where the kernel takes its pointer.
mlx::core::array kernel_array(const mlx::core::array& a);

/// The types and pointers of the CPU's entries.
struct CpuViews {
  using LoraView = cpu::LoraView;
  using LoraBranch = cpu::LoraBranch;
  using LoraBankView = cpu::LoraBankView;
  static cpu::WeightView weight(const Weight& w) { return weight_view(w); }
  /// Of an evaluated array.
  static const float* floats(const mlx::core::array& a) { return a.data<float>(); }
};

template <class Call, class Entry>
std::function<void(const KernelArgs&)> on_cpu(Call call, Entry entry) {
  return [call = std::move(call), entry](const KernelArgs& args) { call(CpuViews{}, entry, args); };
}

#ifdef METAL_LORA_CUDA
/// The same of CUDA's, by device pointers.
struct CudaViews {
  using LoraView = cuda::LoraView;
  using LoraBranch = cuda::LoraBranch;
  using LoraBankView = cuda::LoraBankView;
  static cuda::WeightView weight(const Weight& w) { return cuda_view(w); }
  static const float* floats(const mlx::core::array& a) {
    return static_cast<const float*>(device_pointer(a));
  }
};

#define METAL_LORA_ON_CUDA(call, entry)                                                   \
  CudaFunction([call](const cuda::Context& context, const KernelArgs& args) {             \
    call(                                                                                 \
        CudaViews{}, [&context](auto... a) { return cuda::entry(context, a...); }, args); \
  })
#else
#define METAL_LORA_ON_CUDA(call, entry) (static_cast<void>(call), CudaFunction())
#endif

}  // namespace metal_lora::ops
