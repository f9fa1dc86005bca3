// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/io/result.h"

namespace metal_lora {
namespace {

using std::numbers::pi;

/// Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.
void scale_llama3(std::vector<double>& inv_freq, const io::JsonObject& s) {
  const double factor = io::unwrap(s.get_number("factor", 1.0, 1e6));
  const double low = io::unwrap(s.get_number("low_freq_factor", 1e-6, 1e6));
  const double high = io::unwrap(s.get_number("high_freq_factor", 1e-6, 1e6));
  const double original = io::unwrap(s.get_number("original_max_position_embeddings", 1.0, 1e9));
  if (high <= low)
    io::throw_failure(
        s.failure("high_freq_factor", "greater than low_freq_factor", fmt::format("{}", high)));
  for (auto& f : inv_freq) {
    const double wavelength = 2.0 * pi / f;
    const double blend = std::clamp((original / wavelength - low) / (high - low), 0.0, 1.0);
    f = (1.0 - blend) * f / factor + blend * f;
  }
}

/// YaRN (Peng et al., arXiv:2309.00071). Returns the attention factor.
double scale_yarn(
    std::vector<double>& inv_freq,
    double theta,
    int head_dim,
    int max_positions,
    const io::JsonObject& s) {
  const double factor = io::unwrap(s.get_number("factor", 1.0, 1e6));
  const double beta_fast = io::unwrap(s.get_number_or("beta_fast", 32.0, 1e-6, 1e6));
  const double beta_slow = io::unwrap(s.get_number_or("beta_slow", 1.0, 1e-6, 1e6));
  const double original =
      io::unwrap(s.get_number_or("original_max_position_embeddings", max_positions, 1.0, 1e9));
  for (const char* key : {"mscale", "mscale_all_dim"}) {
    if (s.has(key)) {
      throw Error(
          ErrorCode::unsupported,
          fmt::format("[{}: rope_scaling.{}] is not supported", s.path(), key));
    }
  }
  const auto dim_of = [&](double rotations) {
    return head_dim * std::log(original / (rotations * 2.0 * pi)) / (2.0 * std::log(theta));
  };
  const double low = std::max(std::floor(dim_of(beta_fast)), 0.0);
  const double high = std::max(std::min(std::ceil(dim_of(beta_slow)), head_dim - 1.0), low + 0.001);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inv_freq[i] = inv_freq[i] / factor * ramp + inv_freq[i] * (1.0 - ramp);
  }
  return io::unwrap(
      s.get_number_or("attention_factor", factor <= 1.0 ? 1.0 : 0.1 * std::log(factor) + 1.0));
}

}  // namespace

RopeFrequencies rope_frequencies(
    double theta,
    int head_dim,
    int max_position_embeddings,
    const io::Json* scaling,
    const std::string& path) {
  std::vector<double> inv_freq(head_dim / 2);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    inv_freq[i] = std::pow(theta, -2.0 * static_cast<double>(i) / head_dim);
  }
  RopeFrequencies result;
  if (scaling != nullptr && !scaling->is_null()) {
    const auto s = io::unwrap(io::JsonObject::of(*scaling, path, "rope_scaling"));
    const auto type =
        io::unwrap(s.get_string_or("rope_type", io::unwrap(s.get_string_or("type", "default"))));
    if (type == "linear") {
      const double factor = io::unwrap(s.get_number("factor", 1e-6, 1e6));
      for (auto& f : inv_freq) f /= factor;
    } else if (type == "llama3") {
      scale_llama3(inv_freq, s);
    } else if (type == "yarn") {
      result.factor =
          static_cast<float>(scale_yarn(inv_freq, theta, head_dim, max_position_embeddings, s));
    } else if (type != "default") {
      throw Error(
          ErrorCode::unsupported,
          fmt::format(
              "[{}: rope_scaling] must be default, linear, llama3 or yarn but is {}", path, type));
    }
  }
  result.inv_freq.assign(inv_freq.begin(), inv_freq.end());
  return result;
}

}  // namespace metal_lora
