// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

namespace metal_lora::train {
namespace {

ScheduleConfig config_of(const nlohmann::json& json) {
  ScheduleConfig out;
  out.name = json.at("name");
  out.arguments = json.value("arguments", std::vector<double>{});
  out.warmup = json.value("warmup", int64_t{0});
  out.warmup_init = json.value("warmup_init", 0.0);
  out.boundaries = json.value("boundaries", std::vector<int64_t>{});
  if (json.contains("schedules")) {
    for (const auto& part : json["schedules"]) out.schedules.push_back(config_of(part));
  }
  return out;
}

TEST(Schedule, EqualsMlx) {
  std::ifstream file(METAL_LORA_SOURCE_DIR "/tests/golden/schedules.json");
  for (const auto& golden : nlohmann::json::parse(file)) {
    const Schedule schedule = make_schedule(config_of(golden));
    const auto steps = golden.at("steps").get<std::vector<int64_t>>();
    const auto values = golden.at("values").get<std::vector<double>>();
    // MLX evaluates in f32: a few roundings of terms no larger than the peak; its cosine works on
    // an angle up to pi that is itself rounded. Decays multiply by a rate rounded once, whose error
    // grows with the power.
    double peak = 0.0;
    for (const double value : values) peak = std::max(peak, std::abs(value));
    for (size_t i = 0; i < steps.size(); ++i) {
      const double eps = std::numeric_limits<float>::epsilon();
      const double tolerance =
          8 * eps * peak + eps * std::abs(values[i]) * static_cast<double>(steps[i]);
      EXPECT_NEAR(schedule(steps[i]), values[i], tolerance)
          << golden.at("name") << " at step " << steps[i];
    }
  }
}

TEST(Schedule, OpenArgumentsComeFromTheConfiguration) {
  TrainingConfig config;
  config.learning_rate = 0.5;
  config.iters = 110;
  EXPECT_EQ(make_schedule(resolve_schedule(config))(77), 0.5);

  config.lr_schedule = ScheduleConfig{};
  config.lr_schedule->warmup = 10;
  const Schedule warm = make_schedule(resolve_schedule(config));
  EXPECT_EQ(warm(0), 0.0);
  EXPECT_DOUBLE_EQ(warm(5), 0.25);
  EXPECT_EQ(warm(60), 0.5);

  config.lr_schedule->name = "cosine_decay";
  const Schedule cosine = make_schedule(resolve_schedule(config));
  EXPECT_EQ(cosine(11), 0.5);
  EXPECT_NEAR(cosine(11 + 50), 0.25, 1e-15);
  EXPECT_NEAR(cosine(11 + 100), 0.0, 1e-15);
}

}  // namespace
}  // namespace metal_lora::train
