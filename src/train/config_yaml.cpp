// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>

#include "metal_lora/train.h"
#include "src/io/mapped_file.h"
#include "src/train/config_fields.h"

namespace metal_lora {
namespace {

using train::parse_boolean;
using train::parse_integer;
using train::parse_number;
using train::RawValue;

constexpr size_t kMaxConfigBytes = size_t{1} << 20;

/// mlx-lm's keys that this program does not have, and why.
struct RefusedKey {
  std::string_view key, hint;
};
constexpr RefusedKey kRefusedKeys[] = {
    {"hf_dataset", "put train.jsonl, valid.jsonl and test.jsonl into a folder and set data"},
    {"trust_remote_code", "code from a model folder is never run"},
    {"config", "a configuration file cannot name another"},
    {"wandb", "metrics for other tools: --json gives one object a line"},
};

/// QLoRA's words, and ours for them.
constexpr RefusedKey kQloraKeys[] = {
    {"bnb_4bit_quant_type", "this program's key is quantize: nf4"},
    {"bnb_4bit_use_double_quant", "this program's key is double_quant: true or false"},
    {"load_in_4bit", "this program's key is quantize: nf4 (bitsandbytes') or 4 (MLX's)"},
    {"load_in_8bit", "this program's key is quantize: 8"},
};

class YamlReader {
 public:
  YamlReader(TrainingConfig& config, std::string where)
      : config_(config), where_(std::move(where)) {}

  void read(const YAML::Node& root) {
    if (root.IsNull()) return;
    expect_map(root, "");
    for (const auto& entry : root) read_key(key_of(entry.first), entry.first, entry.second);
  }

 private:
  std::string at(const YAML::Node& node, std::string_view key) const {
    std::string place = fmt::format("{}:{}", where_, node.Mark().line + 1);
    return key.empty() ? place : fmt::format("{}, {}", place, key);
  }

  [[noreturn]] void fail(
      const YAML::Node& node,
      std::string_view key,
      const std::string& what,
      const std::string& hint = {}) const {
    throw Error(ErrorCode::invalid_input, fmt::format("[{}] {}", at(node, key), what), hint);
  }

  void expect_map(const YAML::Node& node, std::string_view key) const {
    if (!node.IsMap()) fail(node, key, "must be a mapping of keys to values");
  }

  std::string key_of(const YAML::Node& node) const {
    if (!node.IsScalar()) fail(node, "", "a key must be a word");
    return node.Scalar();
  }

  void read_key(const std::string& key, const YAML::Node& at_key, const YAML::Node& value) {
    if (!seen_.insert(key).second) fail(at_key, key, "is given twice");
    for (const auto& row : kRefusedKeys) {
      if (key != row.key) continue;
      if (value.IsNull() || (value.IsScalar() && value.Scalar() == "false")) return;
      throw Error(
          ErrorCode::unsupported,
          fmt::format("[{}] is not supported", at(at_key, key)),
          std::string(row.hint));
    }
    if (key == "optimizer_config") return read_optimizers(value);
    if (key == "lr_schedule") return read_lr_schedule(value);
    if (key == "lora_parameters") {
      if (value.IsNull()) return;
      expect_map(value, key);
      for (const auto& entry : value) {
        read_leaf(key + "." + key_of(entry.first), entry.first, entry.second);
      }
      return;
    }
    read_leaf(key, at_key, value);
  }

  void read_leaf(const std::string& key, const YAML::Node& at_key, const YAML::Node& value) {
    const train::Field* field = train::find_field(key);
    if (!field) unknown(key, at_key, known_keys());
    RawValue raw;
    raw.is_null = value.IsNull();
    raw.is_list = value.IsSequence();
    if (value.IsMap()) fail(value, key, "must be a value but is a mapping");
    if (value.IsScalar()) {
      raw.items.push_back(value.Scalar());
      // A single key is a list of one.
      raw.is_list =
          std::holds_alternative<std::vector<std::string> TrainingConfig::*>(field->member);
    }
    for (const auto& item : value) {
      if (!item.IsScalar()) fail(item, key, "must be a list of plain values");
      raw.items.push_back(item.Scalar());
    }
    train::assign(config_, *field, raw, at(at_key, key));
  }

  static std::vector<std::string> known_keys() {
    std::vector<std::string> known = {"optimizer_config", "lr_schedule", "lora_parameters"};
    for (const auto& field : train::fields()) known.emplace_back(field.key);
    return known;
  }

  [[noreturn]] void unknown(
      const std::string& key, const YAML::Node& node, const std::vector<std::string>& known) const {
    for (const auto& row : kQloraKeys) {
      if (key == row.key) fail(node, key, "is no key of this program", std::string(row.hint));
    }
    const std::string near = train::nearest_key(key, known);
    fail(
        node,
        key,
        "is no key of this program",
        near.empty() ? "docs/training.md lists the keys" : fmt::format("did you mean {}?", near));
  }

  /// `prefix`.`setting` is unknown beside the settings `known`.
  [[noreturn]] void unknown_setting(
      const std::string& prefix,
      const std::string& setting,
      const YAML::Node& node,
      std::vector<std::string> known) const {
    for (auto& name : known) name = prefix + "." + name;
    unknown(prefix + "." + setting, node, known);
  }

  std::vector<double> numbers(const YAML::Node& node, const std::string& key) const {
    if (!node.IsSequence()) fail(node, key, "must be a list of numbers");
    std::vector<double> out;
    for (const auto& item : node) out.push_back(parse_number(scalar(item, key), at(item, key)));
    return out;
  }

  std::string scalar(const YAML::Node& node, const std::string& key) const {
    if (!node.IsScalar()) fail(node, key, "must be a single value");
    return node.Scalar();
  }

  void read_optimizers(const YAML::Node& node) {
    if (node.IsNull()) return;
    expect_map(node, "optimizer_config");
    for (const auto& entry : node) {
      const std::string name = key_of(entry.first);
      const std::string key = "optimizer_config." + name;
      static const std::vector<std::string> kNames = {"adam", "adamw", "sgd", "muon", "adafactor"};
      if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
        unknown(
            key,
            entry.first,
            {"optimizer_config.adam", "optimizer_config.adamw", "optimizer_config.sgd"});
      }
      if (entry.second.IsNull()) continue;
      expect_map(entry.second, key);
      // Settings of optimizers that this program lacks do not matter unless one is chosen, which
      // validate() refuses.
      if (name == "muon" || name == "adafactor") continue;
      config_.optimizer_config[name] = read_optimizer(name, key, entry.second);
    }
  }

  OptimizerConfig read_optimizer(
      const std::string& name, const std::string& prefix, const YAML::Node& node) const {
    OptimizerConfig out;
    if (name == "adamw") out.weight_decay = 0.01;
    for (const auto& entry : node) {
      const std::string setting = key_of(entry.first);
      const std::string key = prefix + "." + setting;
      const auto number = [&] {
        return parse_number(scalar(entry.second, key), at(entry.first, key));
      };
      const auto boolean = [&] {
        return parse_boolean(scalar(entry.second, key), at(entry.first, key));
      };
      const bool sgd = name == "sgd";
      if (setting == "betas" && !sgd) {
        const auto betas = numbers(entry.second, key);
        if (betas.size() != 2) fail(entry.first, key, "must be two numbers");
        out.beta1 = betas[0];
        out.beta2 = betas[1];
      } else if (setting == "eps" && !sgd) {
        out.eps = number();
      } else if (setting == "bias_correction" && !sgd) {
        out.bias_correction = boolean();
      } else if (setting == "weight_decay" && name != "adam") {
        out.weight_decay = number();
      } else if (setting == "momentum" && sgd) {
        out.momentum = number();
      } else if (setting == "dampening" && sgd) {
        out.dampening = number();
      } else if (setting == "nesterov" && sgd) {
        out.nesterov = boolean();
      } else {
        const std::vector<std::string> known =
            sgd ? std::vector<std::string>{"momentum", "dampening", "nesterov", "weight_decay"}
                : std::vector<std::string>{"betas", "eps", "bias_correction", "weight_decay"};
        unknown_setting(prefix, setting, entry.first, known);
      }
    }
    return out;
  }

  void read_lr_schedule(const YAML::Node& node) {
    if (node.IsNull()) return;
    config_.lr_schedule = read_schedule(node, "lr_schedule");
    config_.given.insert("lr_schedule");
  }

  ScheduleConfig read_schedule(
      const YAML::Node& node, const std::string& prefix, int depth = 0) const {
    // An anchor may contain itself.
    if (depth > 4) fail(node, prefix, "nests schedules too deeply");
    expect_map(node, prefix);
    ScheduleConfig out;
    for (const auto& entry : node) {
      const std::string name = key_of(entry.first);
      const std::string key = prefix + "." + name;
      const std::string place = at(entry.first, key);
      if (name == "name") {
        out.name = scalar(entry.second, key);
      } else if (name == "arguments") {
        out.arguments = numbers(entry.second, key);
      } else if (name == "warmup") {
        out.warmup = parse_integer(scalar(entry.second, key), place);
      } else if (name == "warmup_init") {
        out.warmup_init = parse_number(scalar(entry.second, key), place);
      } else if (name == "boundaries") {
        for (const auto& item : entry.second) {
          out.boundaries.push_back(parse_integer(scalar(item, key), place));
        }
      } else if (name == "schedules") {
        if (!entry.second.IsSequence()) fail(entry.first, key, "must be a list of schedules");
        for (const auto& item : entry.second) {
          out.schedules.push_back(read_schedule(item, key, depth + 1));
        }
      } else {
        unknown_setting(
            prefix,
            name,
            entry.first,
            {"name", "arguments", "warmup", "warmup_init", "schedules", "boundaries"});
      }
    }
    return out;
  }

  TrainingConfig& config_;
  std::string where_;
  std::set<std::string> seen_;
};

}  // namespace

TrainingConfig TrainingConfig::from_yaml(const std::filesystem::path& file) {
  const auto mapped = io::unwrap(io::MappedFile::open(file.string()));
  const auto bytes = mapped->bytes();
  return from_yaml_text(
      std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), file.string());
}

TrainingConfig TrainingConfig::from_yaml_text(const std::string& text, const std::string& where) {
  if (text.size() > kMaxConfigBytes) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be at most {} bytes but is {}", where, kMaxConfigBytes, text.size()));
  }
  TrainingConfig config;
  try {
    const YAML::Node root = YAML::Load(text);
    YamlReader(config, where).read(root);
  } catch (const YAML::Exception& error) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}:{}] is not YAML: {}", where, error.mark.line + 1, error.msg));
  }
  return config;
}

}  // namespace metal_lora
