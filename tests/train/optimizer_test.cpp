// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/optimizer.h"

#include <gtest/gtest.h>
#include <mlx/ops.h>

#include <cmath>
#include <limits>
#include <vector>

#include "src/train/rng.h"

namespace metal_lora::train {
namespace {

namespace mx = mlx::core;

constexpr int kCount = 33;
constexpr int kSteps = 12;

std::vector<float> values(uint64_t key, float scale) {
  std::vector<float> out(kCount);
  for (size_t i = 0; i < out.size(); ++i) out[i] = (2 * random_unit(key, i) - 1) * scale;
  return out;
}

mx::array array_of(const std::vector<float>& v) {
  return mx::array(v.data(), {kCount}, mx::float32);
}

/// The papers' formulas in f64.
struct Truth {
  std::vector<double> param, m, v;

  explicit Truth(const std::vector<float>& start)
      : param(start.begin(), start.end()), m(start.size(), 0.0), v(start.size(), 0.0) {}

  std::vector<double> clipped(const std::vector<float>& grad, double scale, double limit) const {
    std::vector<double> g(grad.begin(), grad.end());
    double norm = 0.0;
    for (double& x : g) {
      x *= scale;
      norm += x * x;
    }
    norm = std::sqrt(norm);
    if (limit > 0 && norm > limit) {
      for (double& x : g) x *= limit / norm;
    }
    return g;
  }
  void adam(const std::vector<double>& g, const OptimizerConfig& o, double rate, int step) {
    for (size_t i = 0; i < g.size(); ++i) {
      m[i] = o.beta1 * m[i] + (1 - o.beta1) * g[i];
      v[i] = o.beta2 * v[i] + (1 - o.beta2) * g[i] * g[i];
      const double c1 = o.bias_correction ? 1 - std::pow(o.beta1, step) : 1.0;
      const double c2 = o.bias_correction ? 1 - std::pow(o.beta2, step) : 1.0;
      param[i] -= rate * o.weight_decay * param[i];
      param[i] -= rate * (m[i] / c1) / (std::sqrt(v[i] / c2) + o.eps);
    }
  }
  void sgd(const std::vector<double>& g, const OptimizerConfig& o, double rate) {
    for (size_t i = 0; i < g.size(); ++i) {
      const double d = g[i] + o.weight_decay * param[i];
      double update = d;
      if (o.momentum > 0) {
        m[i] = o.momentum * m[i] + (1 - o.dampening) * d;
        update = o.nesterov ? d + o.momentum * m[i] : m[i];
      }
      param[i] -= rate * update;
    }
  }
};

void compare(const std::string& name, const OptimizerConfig& settings, double clip) {
  const auto start = values(1, 1.0f);
  Optimizer optimizer(name, settings, clip, array_of(start));
  Truth truth(start);
  const double rate = 0.01, scale = 0.25;
  for (int step = 1; step <= kSteps; ++step) {
    const auto grad = values(100 + static_cast<uint64_t>(step), 3.0f);
    const auto result = optimizer.step(array_of(grad), scale, rate);
    EXPECT_FALSE(result.skipped);
    const auto g = truth.clipped(grad, scale, clip);
    if (name == "sgd") {
      truth.sgd(g, settings, rate);
    } else {
      truth.adam(g, settings, rate, step);
    }
  }
  EXPECT_EQ(optimizer.updates(), kSteps);
  // Parameters are of size 1: each step rounds them once and an update of at most a few rates by
  // some twenty roundings; the moments' own errors stay relative.
  const double eps = std::numeric_limits<float>::epsilon();
  for (size_t i = 0; i < kCount; ++i) {
    EXPECT_NEAR(optimizer.param().data<float>()[i], truth.param[i], kSteps * (2 * eps + 20 * eps))
        << name << " element " << i;
  }
}

TEST(Optimizer, AdamWIsThePapers) {
  OptimizerConfig settings;
  settings.weight_decay = 0.1;
  compare("adamw", settings, 0.0);
  compare("adamw", settings, 0.5);
}

TEST(Optimizer, AdamWithAndWithoutBiasCorrection) {
  OptimizerConfig settings;
  compare("adam", settings, 0.0);
  settings.bias_correction = false;
  compare("adam", settings, 0.0);
}

TEST(Optimizer, SgdWithItsOptions) {
  OptimizerConfig settings;
  compare("sgd", settings, 0.0);
  settings.momentum = 0.9;
  compare("sgd", settings, 0.5);
  settings.weight_decay = 0.1;
  settings.dampening = 0.2;
  compare("sgd", settings, 0.0);
  settings.dampening = 0.0;
  settings.nesterov = true;
  compare("sgd", settings, 0.0);
}

TEST(Optimizer, ReportsTheNormBeforeClipping) {
  for (const char* name : {"adamw", "sgd"}) {
    Optimizer optimizer(name, {}, 0.1, mx::zeros({4}, mx::float32));
    const std::vector<float> grad = {6, 0, 8, 0};
    const auto result = optimizer.step(mx::array(grad.data(), {4}, mx::float32), 0.5, 0.1);
    EXPECT_NEAR(result.grad_norm, 5.0, 1e-5) << name;
  }
}

TEST(Optimizer, NonFiniteGradientsChangeNothing) {
  for (const char* name : {"adamw", "adam", "sgd"}) {
    OptimizerConfig settings;
    settings.momentum = 0.9;
    Optimizer optimizer(name, settings, 1.0, array_of(values(1, 1.0f)));
    optimizer.step(array_of(values(2, 1.0f)), 1.0, 0.01);
    const std::vector<float> param(
        optimizer.param().data<float>(), optimizer.param().data<float>() + kCount);
    const std::vector<float> m(
        optimizer.first_moment().data<float>(), optimizer.first_moment().data<float>() + kCount);
    for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      auto grad = values(3, 1.0f);
      grad[kCount - 1] = bad;
      EXPECT_TRUE(optimizer.step(array_of(grad), 1.0, 0.01).skipped) << name << " " << bad;
    }
    EXPECT_EQ(optimizer.updates(), 1);
    for (size_t i = 0; i < kCount; ++i) {
      EXPECT_EQ(optimizer.param().data<float>()[i], param[i]);
      EXPECT_EQ(optimizer.first_moment().data<float>()[i], m[i]);
    }
  }
}

}  // namespace
}  // namespace metal_lora::train
