// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// LoRA as four dispatches: y = x·Wᵀ, u = x·Aᵀ, z = u·Bᵀ, then y + s·z. The products are either the
// project's own kernels without an adapter, or plain_linear here: a simdgroup for each output, every
// operand from device memory. Only `bench --counters` runs this file: it is what fusing is compared
// with.

// @region add_scaled :
namespace metal_lora {

template <typename T, typename PY, typename PZ>
inline void add_scaled(PY y, PZ z, device T* out, float scale, uint count, uint i) {
  if (i < count) {
    out[i] = T(float(y[i]) + scale * float(z[i]));
  }
}

}  // namespace metal_lora

// @region plain_linear :
namespace metal_lora {

// One of the outputs y [m, n] = x [m, k]·Wᵀ, f32 sums; lanes take turns along k.
template <typename T, typename PX, typename PW>
inline void plain_linear(PX x, PW w, device T* y, uint n, uint k, uint output, uint lane) {
  const uint row = output / n;
  const uint column = output % n;
  float sum = 0.0f;
  for (uint i = lane; i < k; i += 32) {
    sum += float(x[row * k + i]) * float(w[column * k + i]);
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    y[output] = T(sum);
  }
}

}  // namespace metal_lora
