// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace metal_lora::cpu {
namespace {

#if defined(__x86_64__)

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool has(uint32_t bits, int bit) {
  return ((bits >> bit) & 1u) != 0;
}

// Which register files the operating system saves on a context switch (XCR0).
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Bit numbers: Intel SDM vol. 2A, CPUID; XCR0 in vol. 1, 13.3.
Isa detect() {
  const CpuidLeaf leaf1 = cpuid(1, 0);
  constexpr int kFma = 12, kOsxsave = 27, kAvx = 28, kF16c = 29;
  if (!has(leaf1.ecx, kOsxsave) || !has(leaf1.ecx, kAvx)) return Isa::scalar;
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6;
  const uint64_t state = saved_state();
  const CpuidLeaf leaf7 = cpuid(7, 0);
  constexpr int kAvx2 = 5;
  if ((state & kYmmState) != kYmmState || !has(leaf7.ebx, kAvx2) || !has(leaf1.ecx, kFma) ||
      !has(leaf1.ecx, kF16c)) {
    return Isa::scalar;
  }
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31;
  if ((state & kZmmState) != kZmmState || !has(leaf7.ebx, kF) || !has(leaf7.ebx, kDq) ||
      !has(leaf7.ebx, kBw) || !has(leaf7.ebx, kVl)) {
    return Isa::avx2;
  }
  constexpr int kVbmi = 1, kVnni = 11, kBf16 = 5;  // ecx, ecx, eax of leaf 7.1
  const CpuidLeaf leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : CpuidLeaf{};
  if (!has(leaf7.ecx, kVbmi) || !has(leaf7.ecx, kVnni) || !has(leaf7_1.eax, kBf16)) {
    return Isa::avx512;
  }
  return Isa::avx512_bf16;
}

#elif defined(__aarch64__)

Isa detect() {
  return Isa::neon;
}  // Advanced SIMD is part of the AArch64 baseline

#else

Isa detect() {
  return Isa::scalar;
}

#endif

Isa initial_isa() {
  if (const char* name = std::getenv("METAL_LORA_CPU_ISA")) {
    const std::optional<Isa> wanted = isa_from_name(name);
    if (wanted && isa_supported(*wanted)) return *wanted;
  }
  return detected_isa();
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  return active().load(std::memory_order_relaxed);
}

bool set_active_isa(Isa isa) {
  if (!isa_supported(isa)) return false;
  active().store(isa, std::memory_order_relaxed);
  return true;
}

bool isa_supported(Isa isa) {
  if (isa == Isa::scalar) return true;
  const Isa best = detected_isa();
  if (best == Isa::neon || isa == Isa::neon) return best == isa;
  return static_cast<uint32_t>(isa) <= static_cast<uint32_t>(best);
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::neon:
      return "neon";
    case Isa::scalar:
      break;
  }
  return "scalar";
}

std::optional<Isa> isa_from_name(std::string_view name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (isa_name(isa) == name) return isa;
  }
  return std::nullopt;
}

}  // namespace metal_lora::cpu
