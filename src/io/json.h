// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/result.h"

namespace metal_lora::io {

using Json = nlohmann::json;

struct JsonLimits {
  uint64_t max_bytes = uint64_t{4} << 20;
  uint64_t max_depth = 64;  ///< open arrays and objects at once
  bool refuse_duplicate_keys = true;
};

/// RFC 8259 JSON in valid UTF-8, nothing after it, every number finite. `path` names the input in
/// failures, `base_offset` is added to the byte offsets there. Needs about 16x the text at worst.
Result<Json> parse_json(
    std::string_view text,
    const std::string& path,
    const JsonLimits& limits = {},
    uint64_t base_offset = 0);

Result<Json> read_json_file(const std::string& path, const JsonLimits& limits = {});

/// A JSON object with checked access. Failures name file, field ("text_config.rope_theta"), what
/// was expected and what is there. Does not own the object.
class JsonObject {
 public:
  /// Fails when `value` is not an object. `field` is its own name in failures, empty at the root.
  static Result<JsonObject> of(const Json& value, std::string path, std::string field = {});

  const std::string& path() const { return path_; }
  const Json& json() const { return *object_; }
  /// True when the key is there and not null.
  bool has(std::string_view key) const { return find(key) != nullptr; }

  Result<std::string> get_string(std::string_view key) const;
  Result<bool> get_bool(std::string_view key) const;
  /// An integer in [low, high]. 3.0 is not an integer.
  Result<int64_t> get_int(
      std::string_view key, int64_t low = INT64_MIN, int64_t high = INT64_MAX) const;
  /// Any number in [low, high].
  Result<double> get_number(std::string_view key, double low, double high) const;
  Result<double> get_number(std::string_view key) const;
  Result<std::vector<std::string>> get_strings(std::string_view key) const;
  Result<std::vector<int64_t>> get_ints(std::string_view key) const;
  Result<std::vector<double>> get_numbers(std::string_view key) const;
  Result<JsonObject> get_object(std::string_view key) const;

  /// The same, with a value for a key that is absent or null. Present with a wrong type fails.
  Result<std::string> get_string_or(std::string_view key, std::string absent) const;
  Result<bool> get_bool_or(std::string_view key, bool absent) const;
  Result<int64_t> get_int_or(
      std::string_view key,
      int64_t absent,
      int64_t low = INT64_MIN,
      int64_t high = INT64_MAX) const;
  Result<double> get_number_or(std::string_view key, double absent) const;
  Result<double> get_number_or(std::string_view key, double absent, double low, double high) const;

  /// A failure about one field of this object, for checks that the getters do not make.
  Failure failure(std::string_view key, std::string expected, std::string got) const;

 private:
  JsonObject(const Json& object, std::string path, std::string field)
      : object_(&object), path_(std::move(path)), field_(std::move(field)) {}
  const Json* find(std::string_view key) const;
  std::string name_of(std::string_view key) const;
  Failure wrong_type(std::string_view key, std::string expected) const;

  const Json* object_;
  std::string path_;
  std::string field_;
};

/// What a value is, for messages: "the string \"abc\"", "the number 3", "an array of 2", "missing".
std::string describe_json(const Json* value);

}  // namespace metal_lora::io
