// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The one table of configuration keys. YAML, flags, JSON and --help are all made from it.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "metal_lora/train.h"

namespace metal_lora::train {

using Member = std::variant<
    std::string TrainingConfig::*,
    bool TrainingConfig::*,
    int TrainingConfig::*,
    int64_t TrainingConfig::*,
    uint64_t TrainingConfig::*,  ///< bytes: "1.5GB"
    double TrainingConfig::*,
    std::optional<double> TrainingConfig::*,
    Quantization TrainingConfig::*,
    std::vector<std::string> TrainingConfig::*>;

struct Field {
  std::string_view key;    ///< dotted where YAML nests
  std::string_view flags;  ///< empty: YAML only
  Member member;
  std::string_view help;
};
const std::vector<Field>& fields();
const Field* find_field(std::string_view key);

/// A value as written, before its key says what it must be.
struct RawValue {
  std::vector<std::string> items;
  bool is_list = false;
  bool is_null = false;
};
/// `where` is "file:12" or "--flag"; throws Error invalid_input naming it, what the key needs and
/// what it got.
void assign(
    TrainingConfig& config, const Field& field, const RawValue& value, const std::string& where);

double parse_number(const std::string& text, const std::string& where);
int64_t parse_integer(const std::string& text, const std::string& where);
bool parse_boolean(const std::string& text, const std::string& where);

/// The known key with the least edit distance to `key`, for hints; empty when none is close.
std::string nearest_key(std::string_view key, const std::vector<std::string>& known);

}  // namespace metal_lora::train
