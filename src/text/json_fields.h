// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include "metal_lora/error.h"
#include "src/io/json.h"

namespace metal_lora::text {

// Members of tokenizer.json objects whose kind is known only after "type" was read. `where` is the
// path of the object, "tokenizer.json: decoder".

[[noreturn]] inline void wrong_field(
    const std::string& where, const char* key, const char* expected, const io::Json* got) {
  throw Error(
      ErrorCode::invalid_input,
      "[" + where + "." + key + "] must be " + expected + " but is " + io::describe_json(got));
}

[[noreturn]] inline void refuse(const std::string& where, const std::string& what) {
  throw Error(
      ErrorCode::unsupported,
      "[" + where + "] must be a kind this program knows but is \"" + what.substr(0, 100) + "\"");
}

/// The member, or null where it is absent.
inline const io::Json& field(const io::Json& json, const char* key, const std::string& where) {
  static const io::Json null;
  if (!json.is_object()) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + where + "] must be an object but is " + io::describe_json(&json));
  }
  const auto it = json.find(key);
  return it == json.end() ? null : *it;
}

inline std::string string_field(const io::Json& json, const char* key, const std::string& where) {
  const io::Json& value = field(json, key, where);
  if (!value.is_string()) wrong_field(where, key, "a string", &value);
  return value.get<std::string>();
}

inline bool bool_field(
    const io::Json& json, const char* key, bool absent, const std::string& where) {
  const io::Json& value = field(json, key, where);
  if (value.is_null()) return absent;
  if (!value.is_boolean()) wrong_field(where, key, "true or false", &value);
  return value.get<bool>();
}

inline const io::Json& array_field(
    const io::Json& json, const char* key, const std::string& where) {
  const io::Json& value = field(json, key, where);
  if (!value.is_array()) wrong_field(where, key, "an array", &value);
  return value;
}

inline int64_t int_field(
    const io::Json& json, const char* key, int64_t low, int64_t high, const std::string& where) {
  const io::Json& value = field(json, key, where);
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) ||
      value.get<int64_t>() < low || value.get<int64_t>() > high) {
    const std::string range =
        "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    wrong_field(where, key, range.c_str(), &value);
  }
  return value.get<int64_t>();
}

}  // namespace metal_lora::text
