// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/json.h"

#include <fmt/format.h>

#include <cmath>

#include "src/io/mapped_file.h"
#include "src/io/text_format.h"
#include "src/io/tracked_text.h"

namespace metal_lora::io {
namespace {

// Builds the value while it checks depth and keys, so nothing beyond the limits is ever allocated.
class BoundedBuilder : public nlohmann::json_sax<Json> {
 public:
  BoundedBuilder(
      const std::string& path,
      const JsonLimits& limits,
      const TrackedText& text,
      uint64_t base_offset)
      : limits_(limits), text_(text), base_offset_(base_offset) {
    failure_.path = path;
  }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override {
    if (!std::isfinite(value)) return fail("a finite number", "an infinite one");
    return add(value);
  }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return fail("JSON text", "binary"); }
  bool start_object(size_t) override { return open(Json::object()); }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_array() override { return close(); }

  bool key(string_t& value) override {
    Json& object = *stack_.back();
    if (limits_.refuse_duplicate_keys && object.contains(value)) {
      failure_.field = quote_text(value);
      return fail("a key that occurs once", "there twice");
    }
    slot_ = &object[value];
    return true;
  }

  bool parse_error(
      size_t position, const std::string& token, const nlohmann::json::exception& error) override {
    failure_.offset = base_offset_ + (position == 0 ? 0 : position - 1);
    // The library's text is "[json.exception.parse_error.101] parse error at …: <reason>".
    std::string reason = error.what();
    if (const size_t colon = reason.find(": "); colon != std::string::npos) {
      reason.erase(0, colon + 2);
    }
    failure_.expected = "valid JSON in UTF-8";
    failure_.got =
        fmt::format("broken near {}: {}", quote_text(token, 40), quote_text(reason, 200));
    return false;
  }

  Json& root() { return root_; }
  Failure& failure() { return failure_; }

 private:
  template <class T>
  Json* place(T&& value) {
    if (stack_.empty()) {
      root_ = Json(std::forward<T>(value));
      return &root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(Json(std::forward<T>(value)));
      return &parent.back();
    }
    *slot_ = Json(std::forward<T>(value));
    return slot_;
  }
  template <class T>
  bool add(T&& value) {
    place(std::forward<T>(value));
    return true;
  }
  bool open(Json container) {
    if (stack_.size() >= limits_.max_depth) {
      return fail(fmt::format("at most {} levels deep", limits_.max_depth), "deeper");
    }
    stack_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    stack_.pop_back();
    return true;
  }
  bool fail(std::string expected, std::string got) {
    failure_.offset = base_offset_ + text_.offset();
    failure_.expected = std::move(expected);
    failure_.got = std::move(got);
    return false;
  }

  const JsonLimits& limits_;
  const TrackedText& text_;
  uint64_t base_offset_;
  Json root_;
  // Pointers stay good: only the innermost open container grows, and nothing points into it.
  std::vector<Json*> stack_;
  Json* slot_ = nullptr;
  Failure failure_;
};

std::string limited_name(const std::string& field, std::string_view key) {
  return field.empty() ? std::string(key) : fmt::format("{}.{}", field, key);
}

}  // namespace

Result<Json> parse_json(
    std::string_view text,
    const std::string& path,
    const JsonLimits& limits,
    uint64_t base_offset) {
  Failure failure;
  failure.path = path;
  if (text.size() > limits.max_bytes) {
    failure.expected = fmt::format("at most {} bytes of JSON", limits.max_bytes);
    failure.got = std::to_string(text.size());
    return failure;
  }
  // The parser takes a NUL for the end of the text and would ignore what follows.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    failure.offset = base_offset + nul;
    failure.expected = "valid JSON in UTF-8";
    failure.got = "a NUL byte";
    return failure;
  }
  TrackedText tracked(text);
  BoundedBuilder builder(path, limits, tracked, base_offset);
  if (!Json::sax_parse(tracked.begin(), tracked.end(), &builder))
    return std::move(builder.failure());
  return std::move(builder.root());
}

Result<Json> read_json_file(const std::string& path, const JsonLimits& limits) {
  auto file = MappedFile::open(path);
  if (!file) return std::move(file).error();
  const auto bytes = (*file)->bytes();
  return parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path, limits);
}

std::string describe_json(const Json* value) {
  if (value == nullptr) return "missing";
  switch (value->type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return value->get<bool>() ? "true" : "false";
    case Json::value_t::string:
      return "the string " + quote_text(value->get_ref<const std::string&>());
    case Json::value_t::array:
      return fmt::format("an array of {}", value->size());
    case Json::value_t::object:
      return "an object";
    default:
      return "the number " + value->dump();
  }
}

Result<JsonObject> JsonObject::of(const Json& value, std::string path, std::string field) {
  if (!value.is_object()) {
    return Failure{
        ErrorCode::invalid_input,
        std::move(path),
        {},
        std::move(field),
        "a JSON object",
        describe_json(&value),
        ""};
  }
  return JsonObject(value, std::move(path), std::move(field));
}

const Json* JsonObject::find(std::string_view key) const {
  const auto found = object_->find(key);
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

std::string JsonObject::name_of(std::string_view key) const {
  return limited_name(field_, key);
}

Failure JsonObject::failure(std::string_view key, std::string expected, std::string got) const {
  return Failure{
      ErrorCode::invalid_input, path_, {}, name_of(key), std::move(expected), std::move(got), ""};
}

Failure JsonObject::wrong_type(std::string_view key, std::string expected) const {
  const auto found = object_->find(key);
  return failure(
      key, std::move(expected), describe_json(found == object_->end() ? nullptr : &*found));
}

Result<std::string> JsonObject::get_string(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_string()) return wrong_type(key, "a string");
  return value->get<std::string>();
}

Result<bool> JsonObject::get_bool(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_boolean()) return wrong_type(key, "true or false");
  return value->get<bool>();
}

namespace {

std::optional<int64_t> as_int(const Json& value, int64_t low, int64_t high) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  } else if (!value.is_number_integer()) {
    return std::nullopt;
  }
  const auto number = value.get<int64_t>();
  if (number < low || number > high) return std::nullopt;
  return number;
}

std::string int_range(int64_t low, int64_t high) {
  if (low == INT64_MIN && high == INT64_MAX) return "an integer";
  if (high == INT64_MAX) return fmt::format("an integer of at least {}", low);
  return fmt::format("an integer from {} to {}", low, high);
}

}  // namespace

Result<int64_t> JsonObject::get_int(std::string_view key, int64_t low, int64_t high) const {
  const Json* value = find(key);
  const auto number = value == nullptr ? std::nullopt : as_int(*value, low, high);
  if (!number) return wrong_type(key, int_range(low, high));
  return *number;
}

Result<double> JsonObject::get_number(std::string_view key, double low, double high) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_number()) return wrong_type(key, "a number");
  const auto number = value->get<double>();
  if (!(number >= low && number <= high)) {
    return wrong_type(key, fmt::format("a number from {} to {}", low, high));
  }
  return number;
}

Result<double> JsonObject::get_number(std::string_view key) const {
  constexpr double kMax = std::numeric_limits<double>::max();
  return get_number(key, -kMax, kMax);
}

Result<std::vector<std::string>> JsonObject::get_strings(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_array()) return wrong_type(key, "an array of strings");
  std::vector<std::string> strings;
  strings.reserve(value->size());
  for (const Json& element : *value) {
    if (!element.is_string()) {
      return failure(key, "an array of strings", "one with " + describe_json(&element));
    }
    strings.push_back(element.get<std::string>());
  }
  return strings;
}

Result<std::vector<int64_t>> JsonObject::get_ints(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_array()) return wrong_type(key, "an array of integers");
  std::vector<int64_t> numbers;
  numbers.reserve(value->size());
  for (const Json& element : *value) {
    const auto number = as_int(element, INT64_MIN, INT64_MAX);
    if (!number) return failure(key, "an array of integers", "one with " + describe_json(&element));
    numbers.push_back(*number);
  }
  return numbers;
}

Result<std::vector<double>> JsonObject::get_numbers(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_array()) return wrong_type(key, "an array of numbers");
  std::vector<double> numbers;
  numbers.reserve(value->size());
  for (const Json& element : *value) {
    if (!element.is_number()) {
      return failure(key, "an array of numbers", "one with " + describe_json(&element));
    }
    numbers.push_back(element.get<double>());
  }
  return numbers;
}

Result<JsonObject> JsonObject::get_object(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr) return wrong_type(key, "a JSON object");
  return of(*value, path_, name_of(key));
}

Result<std::string> JsonObject::get_string_or(std::string_view key, std::string absent) const {
  if (!has(key)) return absent;
  return get_string(key);
}

Result<bool> JsonObject::get_bool_or(std::string_view key, bool absent) const {
  if (!has(key)) return absent;
  return get_bool(key);
}

Result<int64_t> JsonObject::get_int_or(
    std::string_view key, int64_t absent, int64_t low, int64_t high) const {
  if (!has(key)) return absent;
  return get_int(key, low, high);
}

Result<double> JsonObject::get_number_or(std::string_view key, double absent) const {
  if (!has(key)) return absent;
  return get_number(key);
}

Result<double> JsonObject::get_number_or(
    std::string_view key, double absent, double low, double high) const {
  if (!has(key)) return absent;
  return get_number(key, low, high);
}

}  // namespace metal_lora::io
