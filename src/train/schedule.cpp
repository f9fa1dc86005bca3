// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <vector>

namespace metal_lora::train {
namespace {

[[noreturn]] void wrong(const std::string& where, const std::string& expected, double got) {
  throw Error(
      ErrorCode::invalid_input, fmt::format("[{}] must be {} but is {}", where, expected, got));
}

/// Argument `index` as a number of steps ≥ 1.
int64_t steps_argument(
    const std::vector<double>& arguments, size_t index, const std::string& where) {
  const double value = arguments[index];
  if (value < 1 || value != std::floor(value) || value > 9e15) {
    wrong(fmt::format("{}.arguments[{}]", where, index), "a whole number of steps >= 1", value);
  }
  return static_cast<int64_t>(value);
}

Schedule linear(double init, double end, int64_t steps) {
  return [=](int64_t step) {
    return static_cast<double>(std::min(step, steps)) *
               ((end - init) / static_cast<double>(steps)) +
           init;
  };
}

Schedule cosine(double init, int64_t steps, double end) {
  return [=](int64_t step) {
    const double s = static_cast<double>(std::min(step, steps));
    const double decay = 0.5 * (1.0 + std::cos(std::numbers::pi / static_cast<double>(steps) * s));
    return end + decay * (init - end);
  };
}

Schedule join(std::vector<Schedule> schedules, std::vector<int64_t> boundaries) {
  return [schedules = std::move(schedules), boundaries = std::move(boundaries)](int64_t step) {
    size_t active = 0;
    for (size_t i = 0; i < boundaries.size(); ++i) {
      if (step >= boundaries[i]) active = i + 1;
    }
    return schedules[active](active == 0 ? step : step - boundaries[active - 1]);
  };
}

void check_count(const ScheduleConfig& config, size_t low, size_t high, const std::string& where) {
  const size_t count = config.arguments.size();
  if (count >= low && count <= high) return;
  const std::string expected =
      low == high ? std::to_string(low) : fmt::format("{} to {}", low, high);
  throw Error(
      ErrorCode::invalid_input,
      fmt::format(
          "[{}.arguments] must be {} numbers for {} but is {}",
          where,
          expected,
          config.name,
          count));
}

Schedule make_joined(const ScheduleConfig& config, const std::string& where) {
  if (config.schedules.empty() || config.boundaries.size() + 1 != config.schedules.size()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}.boundaries] must be one fewer than schedules ({}) but is {}",
            where,
            config.schedules.size(),
            config.boundaries.size()));
  }
  if (!std::is_sorted(config.boundaries.begin(), config.boundaries.end())) {
    throw Error(ErrorCode::invalid_input, fmt::format("[{}.boundaries] must ascend", where));
  }
  std::vector<Schedule> parts;
  for (size_t i = 0; i < config.schedules.size(); ++i) {
    parts.push_back(make_schedule(config.schedules[i], fmt::format("{}.schedules[{}]", where, i)));
  }
  return join(std::move(parts), config.boundaries);
}

Schedule make_plain(const ScheduleConfig& config, const std::string& where) {
  const auto& a = config.arguments;
  if (config.name == "constant") {
    check_count(config, 1, 1, where);
    return [value = a[0]](int64_t) { return value; };
  }
  if (config.name == "cosine_decay") {
    check_count(config, 2, 3, where);
    return cosine(a[0], steps_argument(a, 1, where), a.size() == 3 ? a[2] : 0.0);
  }
  if (config.name == "linear_schedule") {
    check_count(config, 3, 3, where);
    return linear(a[0], a[1], steps_argument(a, 2, where));
  }
  if (config.name == "exponential_decay") {
    check_count(config, 2, 2, where);
    return [init = a[0], rate = a[1]](int64_t step) {
      return init * std::pow(rate, static_cast<double>(step));
    };
  }
  if (config.name == "step_decay") {
    check_count(config, 3, 3, where);
    return [init = a[0], rate = a[1], size = steps_argument(a, 2, where)](int64_t step) {
      return init * std::pow(rate, static_cast<double>(step / size));
    };
  }
  if (config.name == "join_schedules") return make_joined(config, where);
  throw Error(
      ErrorCode::invalid_input,
      fmt::format(
          "[{}.name] must be cosine_decay, linear_schedule, exponential_decay, step_decay, "
          "join_schedules or constant but is \"{}\"",
          where,
          config.name));
}

}  // namespace

Schedule make_schedule(const ScheduleConfig& config, const std::string& where) {
  Schedule plain = make_plain(config, where);
  if (config.warmup < 0) {
    wrong(where + ".warmup", "a number of steps >= 0", static_cast<double>(config.warmup));
  }
  if (config.warmup == 0) return plain;
  // mlx-lm warms up to the schedule's first value and hands over one step after reaching it.
  const double peak = plain(0);
  return join(
      {linear(config.warmup_init, peak, config.warmup), std::move(plain)}, {config.warmup + 1});
}

ScheduleConfig resolve_schedule(const TrainingConfig& config) {
  ScheduleConfig schedule = config.lr_schedule.value_or(ScheduleConfig{});
  if (schedule.name.empty()) schedule.name = "constant";
  if (!schedule.arguments.empty() || schedule.name == "join_schedules") return schedule;
  const double rate = config.learning_rate;
  const double remaining =
      static_cast<double>(std::max<int64_t>(1, config.iters - schedule.warmup));
  if (schedule.name == "constant") schedule.arguments = {rate};
  if (schedule.name == "cosine_decay") schedule.arguments = {rate, remaining};
  if (schedule.name == "linear_schedule") schedule.arguments = {rate, 0.0, remaining};
  return schedule;
}

}  // namespace metal_lora::train
