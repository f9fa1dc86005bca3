// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/config_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace metal_lora::train {
namespace {

using C = TrainingConfig;

std::vector<Field> make_fields() {
  return {
      {"model", "--model,-m", &C::model, "Base model: a .gguf file or a Hugging Face folder"},
      {"train", "", &C::train, "Train (false: only test)"},
      {"data", "--data", &C::data, "Folder with train.jsonl, valid.jsonl and test.jsonl"},
      {"fine_tune_type", "--fine-tune-type", &C::fine_tune_type, "Kind of adapter: lora"},
      {"adapter_path", "--adapter-path", &C::adapter_path, "Folder the adapter is written to"},
      {"resume_adapter_file",
       "--resume-adapter-file",
       &C::resume_adapter_file,
       "Start from these adapter weights (mlx-lm's or PEFT's), with a fresh optimizer"},
      {"resume", "--resume", &C::resume, "Go on exactly where the run in --adapter-path stopped"},
      {"iters", "--iters", &C::iters, "Optimizer steps"},
      {"batch_size", "--batch-size", &C::batch_size, "Samples in a micro-batch"},
      {"grad_accumulation_steps",
       "--grad-accumulation-steps",
       &C::grad_accumulation_steps,
       "Micro-batches in a step; memory is that of one"},
      {"learning_rate", "--learning-rate", &C::learning_rate, "Learning rate without a schedule"},
      {"optimizer", "--optimizer", &C::optimizer, "adam, adamw or sgd"},
      {"weight_decay", "--weight-decay", &C::weight_decay, "Wins over optimizer_config's"},
      {"grad_clip", "--grad-clip", &C::grad_clip, "Limit of the gradient's global norm; 0: none"},
      {"num_layers", "--num-layers", &C::num_layers, "Adapt the last N layers; -1: all"},
      {"lora_parameters.rank", "--rank,--lora-rank", &C::lora_rank, "Rank of the adapter"},
      {"lora_parameters.scale",
       "--scale,--lora-scale",
       &C::lora_scale,
       "Multiplier of the adapter's product"},
      {"lora_parameters.alpha",
       "--alpha,--lora-alpha",
       &C::lora_alpha,
       "Instead of scale: scale = alpha/rank (alpha/sqrt(rank) with --rslora)"},
      {"lora_parameters.rslora",
       "--rslora",
       &C::lora_rslora,
       "Rank-stabilised scaling: alpha/sqrt(rank)"},
      {"lora_parameters.dropout",
       "--dropout,--lora-dropout",
       &C::lora_dropout,
       "Dropout on the adapter's input"},
      {"lora_parameters.keys",
       "--keys,--lora-keys",
       &C::lora_keys,
       "Linears to adapt, e.g. self_attn.q_proj,mlp.up_proj; default: all seven"},
      {"max_seq_length", "--max-seq-length", &C::max_seq_length, "Longest sample, in tokens"},
      {"mask_prompt", "--mask-prompt", &C::mask_prompt, "Learn the answers only"},
      {"packing", "--packing", &C::packing, "Fill streams of max_seq_length with whole samples"},
      {"seed", "--seed", &C::seed, "Seed of initial weights, data order and dropout"},
      {"dtype", "--dtype", &C::dtype, "Activations: float32, bfloat16 or float16"},
      {"quantize",
       "--quantize",
       &C::quantize,
       "Quantise the frozen base: 4 or 8 bits, or nf4 (QLoRA's 4 bits); 0: keep"},
      {"quantize_group_size",
       "--quantize-group-size",
       &C::quantize_group_size,
       "Weights that share a scale: 32, 64 or 128; nf4: 64"},
      {"double_quant",
       "--double-quant",
       &C::double_quant,
       "Of nf4: its scales in 8 bits too, as QLoRA has them (the default)"},
      {"grad_checkpoint",
       "--grad-checkpoint",
       &C::grad_checkpoint,
       "Recompute layers in the backward pass: less memory, about a third more work"},
      {"max_memory", "--max-memory", &C::max_memory, "Refuse to start above this, e.g. 1GB"},
      {"steps_per_report", "--steps-per-report", &C::steps_per_report, "Steps between reports"},
      {"steps_per_eval", "--steps-per-eval", &C::steps_per_eval, "Steps between validations"},
      {"val_batches", "--val-batches", &C::val_batches, "Batches of a validation; -1: all"},
      {"early_stop_patience",
       "--early-stop-patience",
       &C::early_stop_patience,
       "Stop after N validations without improvement; 0: never"},
      {"save_every", "--save-every", &C::save_every, "Steps between checkpoints"},
      {"test", "--test", &C::test, "Measure the loss on test.jsonl at the end"},
      {"test_batches", "--test-batches", &C::test_batches, "Batches of that; -1: all"},
      {"report_to", "--report-to", &C::report_to, "html (report.html beside the adapter) or none"},
      {"project_name", "--project-name", &C::project_name, "Title of the report"},
  };
}

[[noreturn]] void wrong(
    const std::string& where, std::string_view expected, const std::string& got) {
  throw Error(
      ErrorCode::invalid_input, fmt::format("[{}] must be {} but is \"{}\"", where, expected, got));
}

template <class T>
T checked_int(const std::string& text, const std::string& where) {
  const int64_t value = parse_integer(text, where);
  if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
    wrong(where, "a 32-bit whole number", text);
  }
  return static_cast<T>(value);
}

uint64_t parse_size(const std::string& text, const std::string& where) {
  struct Unit {
    std::string_view name;
    double bytes;
  };
  static constexpr Unit kUnits[] = {
      {"", 1.0},
      {"B", 1.0},
      {"KB", 1e3},
      {"MB", 1e6},
      {"GB", 1e9},
      {"TB", 1e12},
      {"KIB", 1024.0},
      {"MIB", 1048576.0},
      {"GIB", 1073741824.0},
      {"M", 1e6},
      {"G", 1e9}};
  const size_t digits = text.find_first_not_of("0123456789.eE+-");
  // "1e9" is a number, "1EB" is not a unit of this program.
  std::string number = text.substr(0, digits);
  std::string unit = digits == std::string::npos ? "" : text.substr(digits);
  std::erase(unit, ' ');
  std::transform(unit.begin(), unit.end(), unit.begin(), [](unsigned char c) {
    return static_cast<char>(std::toupper(c));
  });
  for (const auto& row : kUnits) {
    if (row.name != unit) continue;
    const double bytes = parse_number(number, where) * row.bytes;
    if (bytes >= 0 && bytes < 9e18) return static_cast<uint64_t>(bytes);
  }
  wrong(where, "a size such as 800MB or 1.5GB", text);
}

struct Assigner {
  TrainingConfig& config;
  const RawValue& value;
  const std::string& where;

  const std::string& scalar(std::string_view expected) const {
    if (value.is_list) wrong(where, expected, fmt::format("[{}]", fmt::join(value.items, ", ")));
    return value.items.front();
  }
  void operator()(std::string C::*member) const { config.*member = scalar("text"); }
  void operator()(bool C::*member) const {
    config.*member = parse_boolean(scalar("true or false"), where);
  }
  void operator()(int C::*member) const {
    config.*member = checked_int<int>(scalar("a whole number"), where);
  }
  void operator()(int64_t C::*member) const {
    config.*member = parse_integer(scalar("a whole number"), where);
  }
  void operator()(uint64_t C::*member) const {
    config.*member = parse_size(scalar("a size such as 1.5GB"), where);
  }
  void operator()(double C::*member) const {
    config.*member = parse_number(scalar("a number"), where);
  }
  void operator()(std::optional<double> C::*member) const {
    config.*member = parse_number(scalar("a number"), where);
  }
  void operator()(std::vector<std::string> C::*member) const { config.*member = value.items; }
  void operator()(Quantization C::*member) const {
    const std::string& text = scalar("0, 4, 8 or nf4");
    const auto quantization = parse_quantization(text);
    if (!quantization) wrong(where, "0, 4, 8 or nf4", text);
    config.*member = *quantization;
  }
};

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

}  // namespace

const std::vector<Field>& fields() {
  static const std::vector<Field> table = make_fields();
  return table;
}

const Field* find_field(std::string_view key) {
  const auto& table = fields();
  const auto at =
      std::find_if(table.begin(), table.end(), [&](const Field& f) { return f.key == key; });
  return at == table.end() ? nullptr : &*at;
}

void assign(
    TrainingConfig& config, const Field& field, const RawValue& value, const std::string& where) {
  if (value.is_null) return;  // mlx-lm writes null for "use the default"
  if (!value.is_list && value.items.empty()) wrong(where, "a value", "");
  std::visit(Assigner{config, value, where}, field.member);
  config.given.insert(std::string(field.key));
}

double parse_number(const std::string& text, const std::string& where) {
  double value = 0.0;
  const char* begin = text.data() + (text.starts_with('+') ? 1 : 0);
  const auto [end, code] = std::from_chars(begin, text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    wrong(where, "a finite number", text);
  }
  return value;
}

int64_t parse_integer(const std::string& text, const std::string& where) {
  int64_t value = 0;
  const char* begin = text.data() + (text.starts_with('+') ? 1 : 0);
  const auto [end, code] = std::from_chars(begin, text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size()) {
    wrong(where, "a whole number", text);
  }
  return value;
}

bool parse_boolean(const std::string& text, const std::string& where) {
  static constexpr std::string_view kTrue[] = {"true", "True", "TRUE", "yes", "on", "1"};
  static constexpr std::string_view kFalse[] = {"false", "False", "FALSE", "no", "off", "0"};
  if (std::find(std::begin(kTrue), std::end(kTrue), text) != std::end(kTrue)) return true;
  if (std::find(std::begin(kFalse), std::end(kFalse), text) != std::end(kFalse)) return false;
  wrong(where, "true or false", text);
}

std::string nearest_key(std::string_view key, const std::vector<std::string>& known) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, key.size() / 3) + 1;
  for (const auto& candidate : known) {
    const size_t distance = edit_distance(key, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace metal_lora::train
