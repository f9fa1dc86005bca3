// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace metal_lora::cpu {

/// Instruction sets that kernels are written for. On x86 each contains those before it.
/// scalar: the compiler's baseline for the architecture (SSE2 on x86-64).
/// avx2: with FMA and F16C. avx512: F, BW, VL, DQ. avx512_bf16: also BF16, VNNI and VBMI.
enum class Isa : uint32_t { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, neon = 4 };

/// The best set that both the processor and the operating system (saved registers) support.
Isa detected_isa();

/// The set that kernels dispatch on: detected_isa(), unless METAL_LORA_CPU_ISA (a name as
/// isa_name gives; ignored where this machine lacks it) or set_active_isa chose another.
/// One relaxed atomic load. Thread-safe.
Isa active_isa();

/// Chooses the set of every kernel called from now on. False, and nothing changes, where this
/// machine does not have it. For tests and benches: do not call it while kernels run.
bool set_active_isa(Isa isa);

/// Whether kernels of this set can run here.
bool isa_supported(Isa isa);

/// "scalar", "avx2", "avx512", "avx512_bf16", "neon".
std::string_view isa_name(Isa isa);
std::optional<Isa> isa_from_name(std::string_view name);

}  // namespace metal_lora::cpu
