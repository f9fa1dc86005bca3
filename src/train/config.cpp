// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>

#include "metal_lora/adapter.h"
#include "metal_lora/train.h"
#include "src/train/config_fields.h"
#include "src/train/schedule.h"

namespace metal_lora {
namespace {

using train::Field;

[[noreturn]] void refuse(
    std::string_view key,
    std::string_view expected,
    const std::string& got,
    const std::string& hint = {}) {
  throw Error(
      ErrorCode::invalid_input, fmt::format("[{}] must be {} but is {}", key, expected, got), hint);
}

void at_least(std::string_view key, int64_t value, int64_t low) {
  if (value < low) refuse(key, fmt::format(">= {}", low), std::to_string(value));
}

/// −1 (all) or at least `low`.
void count_or_all(std::string_view key, int value, int low) {
  if (value != -1 && value < low) {
    refuse(key, fmt::format(">= {}, or -1 for all,", low), std::to_string(value));
  }
}

struct ToJson {
  const TrainingConfig& config;
  using Json = nlohmann::ordered_json;

  template <class T>
  Json operator()(T TrainingConfig::*member) const {
    return config.*member;
  }
  Json operator()(std::optional<double> TrainingConfig::*member) const {
    const auto& value = config.*member;
    return value ? Json(*value) : Json(nullptr);
  }
  Json operator()(std::string TrainingConfig::*member) const {
    const auto& value = config.*member;
    return value.empty() ? Json(nullptr) : Json(value);
  }
  Json operator()(std::vector<std::string> TrainingConfig::*member) const {
    const auto& value = config.*member;
    return value.empty() ? Json(nullptr) : Json(value);
  }
  /// 4 and 8 are numbers, as in YAML.
  Json operator()(Quantization TrainingConfig::*member) const {
    switch (config.*member) {
      case Quantization::none:
        return 0;
      case Quantization::int4:
        return 4;
      case Quantization::int8:
        return 8;
      case Quantization::nf4:
        break;
    }
    return quantization_name(config.*member);
  }
};

struct TypeOf {
  OptionType operator()(std::string TrainingConfig::*) const { return OptionType::text; }
  OptionType operator()(bool TrainingConfig::*) const { return OptionType::boolean; }
  OptionType operator()(int TrainingConfig::*) const { return OptionType::integer; }
  OptionType operator()(int64_t TrainingConfig::*) const { return OptionType::integer; }
  OptionType operator()(uint64_t TrainingConfig::*) const { return OptionType::size; }
  OptionType operator()(double TrainingConfig::*) const { return OptionType::number; }
  OptionType operator()(std::optional<double> TrainingConfig::*) const {
    return OptionType::number;
  }
  OptionType operator()(std::vector<std::string> TrainingConfig::*) const {
    return OptionType::list;
  }
  OptionType operator()(Quantization TrainingConfig::*) const { return OptionType::text; }
};

nlohmann::ordered_json schedule_json(const ScheduleConfig& schedule) {
  nlohmann::ordered_json out = {{"name", schedule.name}, {"arguments", schedule.arguments}};
  if (schedule.warmup != 0) {
    out["warmup"] = schedule.warmup;
    out["warmup_init"] = schedule.warmup_init;
  }
  if (schedule.name == "join_schedules") {
    out["schedules"] = nlohmann::ordered_json::array();
    for (const auto& part : schedule.schedules) out["schedules"].push_back(schedule_json(part));
    out["boundaries"] = schedule.boundaries;
  }
  return out;
}

nlohmann::ordered_json optimizer_json(const std::string& name, const OptimizerConfig& settings) {
  nlohmann::ordered_json out;
  out["weight_decay"] = settings.weight_decay;
  if (name == "sgd") {
    out["momentum"] = settings.momentum;
    out["dampening"] = settings.dampening;
    out["nesterov"] = settings.nesterov;
  } else {
    out["betas"] = {settings.beta1, settings.beta2};
    out["eps"] = settings.eps;
    out["bias_correction"] = settings.bias_correction;
  }
  return out;
}

std::vector<std::string> split_list(std::string_view text) {
  std::vector<std::string> items;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    std::string_view item = text.substr(0, comma);
    while (item.starts_with(' ')) item.remove_prefix(1);
    while (item.ends_with(' ')) item.remove_suffix(1);
    if (!item.empty()) items.emplace_back(item);
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return items;
}

/// Keys of lr_schedule that flags can set; the fields table has no optional struct members.
struct ScheduleOption {
  std::string_view key, flags;
  OptionType type;
  std::string_view help;
};
constexpr ScheduleOption kScheduleOptions[] = {
    {"lr_schedule.name",
     "--lr-schedule",
     OptionType::text,
     "cosine_decay, linear_schedule, exponential_decay, step_decay or constant"},
    {"lr_schedule.arguments",
     "--lr-schedule-arguments",
     OptionType::list,
     "As in MLX, e.g. 1e-3,100,1e-5; default: from --learning-rate to 0 over --iters"},
    {"lr_schedule.warmup", "--warmup", OptionType::integer, "Steps of linear warm-up"},
    {"lr_schedule.warmup_init", "--warmup-init", OptionType::number, "Learning rate at step 0"},
};

bool set_schedule(TrainingConfig& config, std::string_view key, std::string_view value) {
  const std::string where = "--" + std::string(key);
  if (!key.starts_with("lr_schedule.")) return false;
  ScheduleConfig schedule = config.lr_schedule.value_or(ScheduleConfig{});
  if (key == "lr_schedule.name") {
    schedule.name = value;
  } else if (key == "lr_schedule.arguments") {
    schedule.arguments.clear();
    for (const auto& item : split_list(value)) {
      schedule.arguments.push_back(train::parse_number(item, where));
    }
  } else if (key == "lr_schedule.warmup") {
    schedule.warmup = train::parse_integer(std::string(value), where);
  } else if (key == "lr_schedule.warmup_init") {
    schedule.warmup_init = train::parse_number(std::string(value), where);
  } else {
    return false;
  }
  config.lr_schedule = schedule;
  config.given.insert("lr_schedule");
  return true;
}

void validate_lora(const TrainingConfig& c) {
  if (c.lora_rank < 1 || c.lora_rank > kMaxAdapterRank) {
    refuse(
        "lora_parameters.rank",
        fmt::format("between 1 and {}", kMaxAdapterRank),
        std::to_string(c.lora_rank));
  }
  if (!(c.lora_dropout >= 0.0 && c.lora_dropout < 1.0)) {
    refuse("lora_parameters.dropout", "in [0, 1)", fmt::format("{}", c.lora_dropout));
  }
  const bool scale_given = c.given.contains("lora_parameters.scale");
  if (c.lora_alpha && scale_given) {
    refuse(
        "lora_parameters.alpha",
        "absent where scale is given",
        fmt::format("{}", *c.lora_alpha),
        "scale multiplies directly (mlx-lm); alpha is divided by the rank (PEFT): give one");
  }
  if (c.lora_rslora && !c.lora_alpha) {
    refuse(
        "lora_parameters.rslora",
        "used with alpha",
        "given alone",
        "rsLoRA means scale = alpha/sqrt(rank): set lora_parameters.alpha");
  }
}

void validate_optimizer(const TrainingConfig& c) {
  if (c.optimizer != "adam" && c.optimizer != "adamw" && c.optimizer != "sgd") {
    const bool known = c.optimizer == "muon" || c.optimizer == "adafactor";
    throw Error(
        known ? ErrorCode::unsupported : ErrorCode::invalid_input,
        fmt::format("[optimizer] must be adam, adamw or sgd but is \"{}\"", c.optimizer));
  }
  const OptimizerConfig o = c.optimizer_settings();
  const auto unit = [](std::string_view key, double value) {
    if (!(value >= 0.0 && value < 1.0)) refuse(key, "in [0, 1)", fmt::format("{}", value));
  };
  unit("optimizer_config.betas[0]", o.beta1);
  unit("optimizer_config.betas[1]", o.beta2);
  if (!(o.eps >= 0.0)) refuse("optimizer_config.eps", ">= 0", fmt::format("{}", o.eps));
  if (!(o.weight_decay >= 0.0)) {
    refuse("weight_decay", ">= 0", fmt::format("{}", o.weight_decay));
  }
  if (o.momentum < 0.0 || (o.nesterov && (o.momentum <= 0.0 || o.dampening != 0.0))) {
    refuse(
        "optimizer_config.sgd.nesterov",
        "used with a momentum and no dampening",
        fmt::format("momentum {}, dampening {}", o.momentum, o.dampening));
  }
  if (!(c.learning_rate >= 0.0)) {
    refuse("learning_rate", ">= 0", fmt::format("{}", c.learning_rate));
  }
  if (!(c.grad_clip >= 0.0)) refuse("grad_clip", ">= 0", fmt::format("{}", c.grad_clip));
  train::make_schedule(train::resolve_schedule(c));
}

}  // namespace

const std::vector<TrainingOption>& training_options() {
  static const std::vector<TrainingOption> options = [] {
    std::vector<TrainingOption> out;
    const TrainingConfig defaults;
    for (const Field& field : train::fields()) {
      if (field.flags.empty()) continue;
      const auto value = std::visit(ToJson{defaults}, field.member);
      std::string text;
      if (value.is_string()) {
        text = value.get<std::string>();
      } else if (!value.is_null()) {
        text = value.dump();
      }
      out.push_back({field.key, field.flags, std::visit(TypeOf{}, field.member), text, field.help});
    }
    for (const auto& row : kScheduleOptions)
      out.push_back({row.key, row.flags, row.type, "", row.help});
    return out;
  }();
  return options;
}

void TrainingConfig::set(std::string_view key, std::string_view value) {
  if (set_schedule(*this, key, value)) return;
  const Field* field = train::find_field(key);
  if (!field) {
    throw Error(ErrorCode::internal, fmt::format("[config] \"{}\" is no configuration key", key));
  }
  const std::string flag(field->flags.substr(0, field->flags.find(',')));
  train::RawValue raw;
  raw.is_list = std::holds_alternative<std::vector<std::string> TrainingConfig::*>(field->member);
  raw.items = raw.is_list ? split_list(value) : std::vector<std::string>{std::string(value)};
  train::assign(*this, *field, raw, flag.empty() ? std::string(key) : flag);
}

void TrainingConfig::validate() const {
  if (fine_tune_type != "lora") {
    throw Error(
        ErrorCode::unsupported,
        fmt::format("[fine_tune_type] must be \"lora\" but is \"{}\"", fine_tune_type));
  }
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") {
    refuse("dtype", "float32, bfloat16 or float16", fmt::format("\"{}\"", dtype));
  }
  load_options().validate();
  if (report_to != "html" && report_to != "none") {
    throw Error(
        ErrorCode::unsupported,
        fmt::format("[report_to] must be \"html\" or \"none\" but is \"{}\"", report_to),
        "metrics for other tools: --json gives one object a line");
  }
  count_or_all("num_layers", num_layers, 1);
  count_or_all("val_batches", val_batches, 1);
  count_or_all("test_batches", test_batches, 1);
  at_least("iters", iters, 1);
  at_least("batch_size", batch_size, 1);
  at_least("grad_accumulation_steps", grad_accumulation_steps, 1);
  at_least("steps_per_report", steps_per_report, 1);
  at_least("steps_per_eval", steps_per_eval, 1);
  at_least("save_every", save_every, 1);
  at_least("max_seq_length", max_seq_length, 2);
  at_least("early_stop_patience", early_stop_patience, 0);
  if (adapter_path.empty()) refuse("adapter_path", "a folder", "empty");
  if (resume && !resume_adapter_file.empty()) {
    refuse(
        "resume_adapter_file",
        "absent with resume",
        fmt::format("\"{}\"", resume_adapter_file),
        "resume takes weights and optimizer from adapter_path/state");
  }
  validate_lora(*this);
  validate_optimizer(*this);
}

double TrainingConfig::effective_scale() const {
  if (!lora_alpha) return lora_scale;
  return *lora_alpha / (lora_rslora ? std::sqrt(static_cast<double>(lora_rank)) : lora_rank);
}

OptimizerConfig TrainingConfig::optimizer_settings() const {
  OptimizerConfig out;
  if (optimizer == "adamw") out.weight_decay = 0.01;
  if (const auto at = optimizer_config.find(optimizer); at != optimizer_config.end()) {
    out = at->second;
  }
  if (weight_decay) out.weight_decay = *weight_decay;
  return out;
}

LoadOptions TrainingConfig::load_options() const {
  LoadOptions options;
  options.dtype = dtype == "float32"   ? mlx::core::float32
                  : dtype == "float16" ? mlx::core::float16
                                       : mlx::core::bfloat16;
  options.quantize = quantize;
  options.quantize_group = quantize_group_size;
  options.double_quant = double_quant;
  return options;
}

nlohmann::ordered_json TrainingConfig::to_json() const {
  nlohmann::ordered_json out;
  for (const Field& field : train::fields()) {
    auto* node = &out;
    std::string_view key = field.key;
    if (const size_t dot = key.find('.'); dot != std::string_view::npos) {
      node = &out[std::string(key.substr(0, dot))];
      key = key.substr(dot + 1);
    }
    (*node)[std::string(key)] = std::visit(ToJson{*this}, field.member);
  }
  out["optimizer_config"][optimizer] = optimizer_json(optimizer, optimizer_settings());
  out["lr_schedule"] =
      lr_schedule ? schedule_json(train::resolve_schedule(*this)) : nlohmann::ordered_json(nullptr);
  return out;
}

}  // namespace metal_lora
