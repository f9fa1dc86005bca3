// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace metal_lora::text::jinja {

struct Value;
struct MacroNode;
struct Frame;

/// A sequence: Python's list, or its tuple.
struct List {
  std::vector<Value> items;
  bool is_tuple = false;
};

/// Python's dict, in insertion order, keyed by strings, integers, booleans and None.
class Dict {
 public:
  Value* find(const Value& key);
  const Value* find(const Value& key) const { return const_cast<Dict*>(this)->find(key); }
  void set(const Value& key, Value value);
  bool erase(const Value& key);
  const std::vector<std::pair<Value, Value>>& items() const { return items_; }
  void clear();

  bool is_namespace = false;  ///< namespace(): its members are set as ns.x

 private:
  static std::string spelling(const Value& key);

  std::vector<std::pair<Value, Value>> items_;
  std::unordered_map<std::string, size_t> index_;
};

/// What the body of a for sees as `loop`.
struct Loop;

/// Something that can be called: a global function, a macro, or a method bound to its object.
struct Callable {
  std::string name;
  const MacroNode* macro = nullptr;
  std::weak_ptr<Frame>
      scope;  ///< where the macro was defined; weak, or scopes would own themselves
  std::shared_ptr<Value> self;  ///< of a bound method
};

struct Undefined {
  std::string name;
};
struct None {};

/// A value of the template language. Containers are shared, as in Python.
struct Value {
  using Text = std::shared_ptr<const std::string>;
  std::variant<
      Undefined,
      None,
      bool,
      int64_t,
      double,
      Text,
      std::shared_ptr<List>,
      std::shared_ptr<Dict>,
      std::shared_ptr<Loop>,
      std::shared_ptr<Callable>>
      data;

  Value() = default;
  Value(None) : data(None{}) {}
  Value(Undefined u) : data(std::move(u)) {}
  Value(bool b) : data(b) {}
  Value(int64_t i) : data(i) {}
  Value(double d) : data(d) {}
  Value(std::string s) : data(std::make_shared<const std::string>(std::move(s))) {}
  Value(const char* s) : Value(std::string(s)) {}
  Value(std::shared_ptr<List> l) : data(std::move(l)) {}
  Value(std::shared_ptr<Dict> d) : data(std::move(d)) {}
  Value(std::shared_ptr<Loop> l) : data(std::move(l)) {}
  Value(std::shared_ptr<Callable> c) : data(std::move(c)) {}

  bool is_undefined() const { return std::holds_alternative<Undefined>(data); }
  bool is_none() const { return std::holds_alternative<None>(data); }
  bool is_bool() const { return std::holds_alternative<bool>(data); }
  bool is_int() const { return std::holds_alternative<int64_t>(data); }
  bool is_real() const { return std::holds_alternative<double>(data); }
  bool is_number() const { return is_bool() || is_int() || is_real(); }
  bool is_string() const { return std::holds_alternative<Text>(data); }
  bool is_list() const { return std::holds_alternative<std::shared_ptr<List>>(data); }
  bool is_dict() const { return std::holds_alternative<std::shared_ptr<Dict>>(data); }
  bool is_mapping() const { return is_dict() && !dict().is_namespace; }
  bool is_loop() const { return std::holds_alternative<std::shared_ptr<Loop>>(data); }
  bool is_callable() const { return std::holds_alternative<std::shared_ptr<Callable>>(data); }

  const std::string& string() const { return *std::get<Text>(data); }
  List& list() const { return *std::get<std::shared_ptr<List>>(data); }
  Dict& dict() const { return *std::get<std::shared_ptr<Dict>>(data); }
  Loop& loop() const { return *std::get<std::shared_ptr<Loop>>(data); }
  const Callable& callable() const { return *std::get<std::shared_ptr<Callable>>(data); }
  /// True, False and integers as a number.
  int64_t integer() const { return is_bool() ? std::get<bool>(data) : std::get<int64_t>(data); }
  double real() const {
    return is_real() ? std::get<double>(data) : static_cast<double>(integer());
  }
};

struct Loop {
  std::shared_ptr<List> items;
  int64_t index0 = 0;
  int64_t depth0 = 0;
  Value changed;
};

/// What goes wrong inside a value operation; the evaluator adds the line. Not an Error of ours.
struct Problem {
  std::string message;
};

// Python's rules. Every function that recurses throws Problem beyond 128 levels, which only a
// container inside itself or a hostile input reaches.
bool truthy(const Value& value);
bool equal(const Value& a, const Value& b, int depth = 0);
/// <0, 0, >0; Problem for values without an order.
int compare(const Value& a, const Value& b, int depth = 0);
std::string type_name(const Value& value);
/// str() and repr().
std::string to_text(const Value& value);
std::string to_repr(const Value& value, int depth = 0);

struct JsonStyle {
  int indent = -1;  ///< spaces a level; -1: one line
  bool ensure_ascii = false;
  bool sort_keys = false;
  std::string item_separator = ", ", key_separator = ": ";
};
/// Python's json.dumps. `limit` bytes at most.
std::string to_json(const Value& value, const JsonStyle& style, size_t limit);

Value from_json(const nlohmann::ordered_json& json, int depth = 0);

/// Strings count in code points.
size_t text_length(std::string_view text);
/// Byte offset of each code point and of the end; text must be UTF-8 or is taken byte by byte.
std::vector<uint32_t> text_offsets(std::string_view text);

}  // namespace metal_lora::text::jinja
