// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/text/chat_template.h"
#include "src/text/jinja_ast.h"

namespace metal_lora::text::jinja {

/// Variables of one scope. Reading looks outwards, setting does not.
struct Frame {
  std::shared_ptr<Frame> outer;
  std::unordered_map<std::string, Value> variables;
};

/// Arguments of a call, a filter or a test.
struct Arguments {
  std::string callee;  ///< for errors
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  /// The argument at `index` or named `name`; null where absent.
  const Value* get(size_t index, const char* name) const;
  const Value& require(size_t index, const char* name) const;
  int64_t integer(size_t index, const char* name, int64_t absent) const;
  std::string text(size_t index, const char* name, const std::string& absent) const;
  bool flag(size_t index, const char* name, bool absent) const;
};

/// One rendering. Operations throw Problem; exec() and eval() turn it into Error with the line.
class Evaluator {
 public:
  Evaluator(const RenderLimits& limits, const CalendarTime& date);
  /// Breaks the cycles that a template may have built.
  ~Evaluator();
  Evaluator(const Evaluator&) = delete;
  Evaluator& operator=(const Evaluator&) = delete;

  std::string render(const Program& program, const nlohmann::ordered_json& variables);

  // For filters, tests and methods.
  void step(uint64_t count = 1);
  /// Counts `bytes` of new memory.
  void charge(size_t bytes);
  Value text(std::string s);
  Value list(std::vector<Value> items, bool tuple = false);
  Value attribute(const Value& object, const std::string& name);
  Value subscript(const Value& object, const Value& key);
  /// The items that a for would take.
  std::vector<Value> iterate(const Value& value);
  Value apply_filter(const std::string& name, const Value& object, const Arguments& arguments);
  bool apply_test(const std::string& name, const Value& object, const Arguments& arguments);
  Value call_method(const Value& object, const std::string& name, const Arguments& arguments);
  bool contains(const Value& container, const Value& item);
  const RenderLimits& limits() const { return limits_; }

 private:
  enum class Flow { next, leave_loop, next_item };
  using FramePtr = std::shared_ptr<Frame>;

  Flow exec(const Body& body, const FramePtr& frame);
  Flow exec(const Stmt& stmt, const FramePtr& frame);
  Flow exec_loop(const Stmt& stmt, const FramePtr& frame);
  void bind(const Stmt& stmt, const Value& value, const FramePtr& frame);
  std::string capture(const Body& body, const FramePtr& frame);
  void write(const std::string& text);

  Value eval(const Expr& expr, const FramePtr& frame);
  Value evaluate(const Expr& expr, const FramePtr& frame);
  Value eval_name(const Expr& expr, const FramePtr& frame);
  Value eval_compare(const Expr& expr, const FramePtr& frame);
  Value eval_arithmetic(const Expr& expr, const FramePtr& frame);
  Value eval_slice(const Expr& expr, const FramePtr& frame);
  Value eval_call(const Expr& expr, const FramePtr& frame);
  Arguments eval_arguments(const Expr& expr, size_t first, const FramePtr& frame);
  Value call_macro(const Callable& callable, const Arguments& arguments);
  Value call_function(const std::string& name, const Arguments& arguments);
  Value add(const Value& a, const Value& b);
  Value multiply(const Value& a, const Value& b);

  const RenderLimits& limits_;
  const CalendarTime& date_;
  std::string* out_ = nullptr;
  uint64_t steps_ = 0;
  size_t memory_bytes_ = 0;
  size_t depth_ = 0;
  int64_t loop_depth_ = 0;
  std::vector<std::weak_ptr<List>> lists_;  ///< that a method or subscript may have changed
  std::vector<std::weak_ptr<Dict>> dicts_;

  friend void remember(Evaluator& evaluator, const Value& container);
};

/// Notes a container that is about to get an item, which may be the container itself.
void remember(Evaluator& evaluator, const Value& container);
/// Whether `object` has a method of this name, as Python's type would.
bool has_method(const Value& object, const std::string& name);
/// "%"-formatting of Python for %s, %d, %r, %f and %%.
std::string format_percent(const std::string& format, const std::vector<Value>& values);
std::string format_time(const CalendarTime& time, const std::string& format);

std::string to_upper(const std::string& text);
std::string to_lower(const std::string& text);
std::string strip_text(const std::string& text, const Value* characters, bool left, bool right);
std::string replace_text(
    const std::string& text,
    const std::string& from,
    const std::string& to,
    int64_t count,
    size_t limit);

}  // namespace metal_lora::text::jinja
