// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Metal kernels on the emulator. Built where the emulator is (Linux).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#ifdef METAL_LORA_EMULATOR
#include <metal_emulator/emulator.h>

#include "src/launch/metal.h"

namespace metal_lora {

/// The names that MLX's preamble would define and its generated signatures use.
std::string_view mlx_preamble();

/// One dispatch that the emulator ran.
struct EmulatedDispatch {
  std::string kernel;                     ///< Entry::name
  std::string why;                        ///< Plan::why
  std::vector<std::string> buffer_names;  ///< by buffer index
  metal_emulator::Report report;
};
/// While it lives, the emulator's dispatches of all threads are noted, oldest first.
class EmulatorLog {
 public:
  EmulatorLog();
  ~EmulatorLog();
  EmulatorLog(const EmulatorLog&) = delete;
  EmulatorLog& operator=(const EmulatorLog&) = delete;
  std::vector<EmulatedDispatch> take();
};

/// A node that runs what MLX recorded for one dispatch; inputs end with the plan's `p`. Findings of
/// the emulator throw when it is evaluated.
Arrays emulated_node(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs);

}  // namespace metal_lora
#endif
