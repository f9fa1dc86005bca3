// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The last step of LoRA as four dispatches: y = x·Wᵀ, u = x·Aᵀ, z = u·Bᵀ (lora_gemv and lora_gemm
// without an adapter), then y + s·z here. Only `bench --counters` runs it: it is what fusing is
// compared with.

// @region add_scaled :
namespace metal_lora {

template <typename T, typename PY, typename PZ>
inline void add_scaled(PY y, PZ z, device T* out, float scale, uint count, uint i) {
  if (i < count) {
    out[i] = T(float(y[i]) + scale * float(z[i]));
  }
}

}  // namespace metal_lora
