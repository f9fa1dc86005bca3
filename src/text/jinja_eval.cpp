// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/jinja_eval.h"

#include <algorithm>
#include <cmath>

#include "metal_lora/error.h"

namespace metal_lora::text::jinja {

namespace {

[[noreturn]] void fail(uint32_t line, const std::string& what) {
  throw Error(
      ErrorCode::invalid_input, "[chat template, line " + std::to_string(line) + "] " + what);
}

int64_t checked(bool overflow, int64_t value) {
  if (overflow) throw Problem{"an integer must fit 64 bits but does not"};
  return value;
}

int64_t add_integers(int64_t a, int64_t b) {
  int64_t out = 0;
  const bool overflow = __builtin_add_overflow(a, b, &out);
  return checked(overflow, out);
}

int64_t subtract_integers(int64_t a, int64_t b) {
  int64_t out = 0;
  const bool overflow = __builtin_sub_overflow(a, b, &out);
  return checked(overflow, out);
}

int64_t multiply_integers(int64_t a, int64_t b) {
  int64_t out = 0;
  const bool overflow = __builtin_mul_overflow(a, b, &out);
  return checked(overflow, out);
}

// Python rounds towards minus infinity.
int64_t floor_divide(int64_t a, int64_t b) {
  if (b == 0) throw Problem{"a divisor must not be zero but is"};
  checked(a == INT64_MIN && b == -1, 0);
  const int64_t q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}

void require_numbers(const Value& a, const Value& b, const char* op) {
  if (a.is_number() && b.is_number()) return;
  throw Problem{
      std::string("\"") + op + "\" must get numbers but got " + type_name(a) + " and " +
      type_name(b)};
}

Value power(const Value& a, const Value& b) {
  require_numbers(a, b, "**");
  if (a.is_real() || b.is_real() || b.integer() < 0) return std::pow(a.real(), b.real());
  int64_t base = a.integer(), exponent = b.integer(), out = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) out = multiply_integers(out, base);
    if (exponent > 1) base = multiply_integers(base, base);
  }
  return out;
}

bool compare_with(const std::string& op, const Value& a, const Value& b) {
  if (op == "==") return equal(a, b);
  if (op == "!=") return !equal(a, b);
  const int order = compare(a, b);
  return op == "<" ? order < 0 : op == "<=" ? order <= 0 : op == ">" ? order > 0 : order >= 0;
}

}  // namespace

const Value* Arguments::get(size_t index, const char* name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

const Value& Arguments::require(size_t index, const char* name) const {
  if (const Value* value = get(index, name)) return *value;
  throw Problem{callee + " must have the argument " + name + " but has not"};
}

int64_t Arguments::integer(size_t index, const char* name, int64_t absent) const {
  const Value* value = get(index, name);
  if (!value || value->is_none()) return absent;
  if (value->is_int() || value->is_bool()) return value->integer();
  throw Problem{callee + "'s " + name + " must be an integer but is " + type_name(*value)};
}

std::string Arguments::text(size_t index, const char* name, const std::string& absent) const {
  const Value* value = get(index, name);
  return value ? to_text(*value) : absent;
}

bool Arguments::flag(size_t index, const char* name, bool absent) const {
  const Value* value = get(index, name);
  return value ? truthy(*value) : absent;
}

Evaluator::Evaluator(const RenderLimits& limits, const CalendarTime& date)
    : limits_(limits), date_(date) {}

Evaluator::~Evaluator() {
  for (const auto& weak : lists_) {
    if (const auto list = weak.lock()) std::vector<Value>().swap(list->items);
  }
  for (const auto& weak : dicts_) {
    if (const auto dict = weak.lock()) Dict(std::move(*dict)).clear();
  }
}

void remember(Evaluator& evaluator, const Value& container) {
  evaluator.charge(sizeof(Value) + 16);
  if (container.is_list()) {
    evaluator.lists_.push_back(std::get<std::shared_ptr<List>>(container.data));
  } else if (container.is_dict()) {
    evaluator.dicts_.push_back(std::get<std::shared_ptr<Dict>>(container.data));
  }
}

void Evaluator::step(uint64_t count) {
  steps_ += count;
  if (steps_ > limits_.steps) {
    throw Problem{
        "rendering must take at most " + std::to_string(limits_.steps) + " steps but takes more"};
  }
}

void Evaluator::charge(size_t bytes) {
  memory_bytes_ += bytes;
  if (memory_bytes_ > limits_.memory_bytes) {
    throw Problem{
        "rendering must allocate at most " + std::to_string(limits_.memory_bytes) +
        " bytes but needs more"};
  }
}

Value Evaluator::text(std::string s) {
  charge(s.size() + sizeof(Value));
  return Value(std::move(s));
}

Value Evaluator::list(std::vector<Value> items, bool tuple) {
  charge(items.size() * sizeof(Value) + sizeof(List));
  step(items.size() / 16);
  auto out = std::make_shared<List>();
  out->items = std::move(items);
  out->is_tuple = tuple;
  return out;
}

std::string Evaluator::render(const Program& program, const nlohmann::ordered_json& variables) {
  std::string out;
  out_ = &out;
  try {
    auto globals = std::make_shared<Frame>();
    for (const char* name : {"range", "namespace", "dict", "raise_exception", "strftime_now"}) {
      auto function = std::make_shared<Callable>();
      function->name = name;
      globals->variables.emplace(name, Value(std::move(function)));
    }
    auto frame = std::make_shared<Frame>();
    frame->outer = globals;
    for (const auto& [name, value] : variables.items()) {
      frame->variables.insert_or_assign(name, from_json(value));
    }
    exec(program.body, frame);
  } catch (const Problem& problem) {
    fail(0, problem.message);
  }
  return out;
}

void Evaluator::write(const std::string& text) {
  if (out_->size() + text.size() > limits_.output_bytes) {
    throw Problem{
        "output must have at most " + std::to_string(limits_.output_bytes) + " bytes but has more"};
  }
  charge(text.size());
  *out_ += text;
}

std::string Evaluator::capture(const Body& body, const FramePtr& frame) {
  std::string text;
  std::string* const before = std::exchange(out_, &text);
  exec(body, frame);
  out_ = before;
  return text;
}

Evaluator::Flow Evaluator::exec(const Body& body, const FramePtr& frame) {
  // Blocks count as expressions do: a macro of nested blocks that calls itself uses stack for both.
  if (++depth_ > limits_.depth) {
    throw Problem{
        "nesting must be at most " + std::to_string(limits_.depth) + " levels but is deeper"};
  }
  for (const auto& stmt : body) {
    Flow flow = Flow::next;
    try {
      step();
      flow = exec(*stmt, frame);
    } catch (const Problem& problem) {
      fail(stmt->line, problem.message);
    }
    if (flow != Flow::next) {
      --depth_;
      return flow;
    }
  }
  --depth_;
  return Flow::next;
}

Evaluator::Flow Evaluator::exec(const Stmt& stmt, const FramePtr& frame) {
  const auto inner = [&] {
    auto scope = std::make_shared<Frame>();
    scope->outer = frame;
    return scope;
  };
  switch (stmt.kind) {
    case StmtKind::text:
      write(stmt.text);
      break;
    case StmtKind::output:
      write(to_text(eval(*stmt.expr, frame)));
      break;
    case StmtKind::branch:
      for (const auto& [condition, body] : stmt.branches) {
        if (!condition || truthy(eval(*condition, frame))) return exec(body, frame);
      }
      break;
    case StmtKind::loop:
      return exec_loop(stmt, frame);
    case StmtKind::set:
      bind(stmt, eval(*stmt.expr, frame), frame);
      break;
    case StmtKind::set_block:
    case StmtKind::filter_block: {
      const auto scope = inner();
      Value value = text(capture(stmt.body, scope));
      if (stmt.expr) {
        scope->variables.insert_or_assign("{block}", value);
        value = eval(*stmt.expr, scope);
      }
      if (stmt.kind == StmtKind::filter_block) {
        write(to_text(value));
      } else {
        bind(stmt, value, frame);
      }
      break;
    }
    case StmtKind::macro: {
      auto macro = std::make_shared<Callable>();
      macro->name = stmt.macro->name;
      macro->macro = stmt.macro.get();
      macro->scope = frame;
      frame->variables.insert_or_assign(macro->name, Value(macro));
      break;
    }
    case StmtKind::group:
      return exec(stmt.body, frame);
    case StmtKind::break_loop:
      return Flow::leave_loop;
    case StmtKind::continue_loop:
      return Flow::next_item;
  }
  return Flow::next;
}

void Evaluator::bind(const Stmt& stmt, const Value& value, const FramePtr& frame) {
  std::vector<Value> values = {value};
  if (stmt.unpacks) {
    values = iterate(value);
    if (values.size() != stmt.targets.size()) {
      throw Problem{
          "values to unpack must be " + std::to_string(stmt.targets.size()) + " but are " +
          std::to_string(values.size())};
    }
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const Expr& target = *stmt.targets[i];
    if (target.kind == ExprKind::name) {
      frame->variables.insert_or_assign(target.name, std::move(values[i]));
      continue;
    }
    const Value object = eval(*target.items[0], frame);
    if (!object.is_dict() || !object.dict().is_namespace) {
      throw Problem{"only a namespace can have its members set, but this is " + type_name(object)};
    }
    remember(*this, object);
    object.dict().set(Value(target.name), std::move(values[i]));
  }
}

Evaluator::Flow Evaluator::exec_loop(const Stmt& stmt, const FramePtr& frame) {
  const Value sequence = eval(*stmt.expr, frame);
  std::vector<Value> items = iterate(sequence);
  if (stmt.condition) {
    std::vector<Value> kept;
    for (auto& item : items) {
      auto scope = std::make_shared<Frame>();
      scope->outer = frame;
      bind(stmt, item, scope);
      if (truthy(eval(*stmt.condition, scope))) kept.push_back(std::move(item));
    }
    items = std::move(kept);
  }
  if (items.empty()) {
    auto scope = std::make_shared<Frame>();
    scope->outer = frame;
    return exec(stmt.otherwise, scope);
  }
  const auto loop = std::make_shared<Loop>();
  loop->depth0 = loop_depth_++;
  loop->items = std::make_shared<List>();
  loop->items->items = std::move(items);
  for (size_t i = 0; i < loop->items->items.size(); ++i) {
    step();
    loop->index0 = static_cast<int64_t>(i);
    auto scope = std::make_shared<Frame>();
    scope->outer = frame;
    bind(stmt, loop->items->items[i], scope);
    scope->variables.insert_or_assign("loop", Value(loop));
    if (exec(stmt.body, scope) == Flow::leave_loop) break;
  }
  --loop_depth_;
  return Flow::next;
}

Value Evaluator::eval(const Expr& expr, const FramePtr& frame) {
  if (++depth_ > limits_.depth) {
    fail(
        expr.line,
        "nesting must be at most " + std::to_string(limits_.depth) + " levels but is deeper");
  }
  try {
    step();
    Value value = evaluate(expr, frame);
    --depth_;
    return value;
  } catch (const Problem& problem) {
    fail(expr.line, problem.message);
  }
}

Value Evaluator::evaluate(const Expr& expr, const FramePtr& frame) {
  const auto item = [&](size_t i) { return eval(*expr.items[i], frame); };
  switch (expr.kind) {
    case ExprKind::constant:
      return expr.value;
    case ExprKind::name:
      return eval_name(expr, frame);
    case ExprKind::list:
    case ExprKind::tuple: {
      std::vector<Value> items;
      for (size_t i = 0; i < expr.items.size(); ++i) items.push_back(item(i));
      return list(std::move(items), expr.kind == ExprKind::tuple);
    }
    case ExprKind::dict: {
      auto dict = std::make_shared<Dict>();
      charge(sizeof(Dict) + expr.items.size() * 2 * sizeof(Value));
      for (size_t i = 0; i + 1 < expr.items.size(); i += 2) dict->set(item(i), item(i + 1));
      return dict;
    }
    case ExprKind::logical_not:
      return !truthy(item(0));
    case ExprKind::logical_and: {
      Value left = item(0);
      return truthy(left) ? item(1) : left;
    }
    case ExprKind::logical_or: {
      Value left = item(0);
      return truthy(left) ? left : item(1);
    }
    case ExprKind::concat: {
      std::string out;
      for (size_t i = 0; i < expr.items.size(); ++i) out += to_text(item(i));
      return text(std::move(out));
    }
    case ExprKind::compare:
      return eval_compare(expr, frame);
    case ExprKind::conditional:
      if (truthy(item(1))) return item(0);
      return expr.items[2] ? item(2) : Value();
    case ExprKind::attribute:
      return attribute(item(0), expr.name);
    case ExprKind::subscript:
      return subscript(item(0), item(1));
    case ExprKind::slice:
      return eval_slice(expr, frame);
    case ExprKind::call:
      return eval_call(expr, frame);
    case ExprKind::filter:
      return apply_filter(expr.name, item(0), eval_arguments(expr, 1, frame));
    case ExprKind::test:
    case ExprKind::test_not: {
      const bool holds = apply_test(expr.name, item(0), eval_arguments(expr, 1, frame));
      return holds == (expr.kind == ExprKind::test);
    }
    default:
      return eval_arithmetic(expr, frame);
  }
}

Value Evaluator::eval_name(const Expr& expr, const FramePtr& frame) {
  for (const Frame* at = frame.get(); at; at = at->outer.get()) {
    const auto it = at->variables.find(expr.name);
    if (it != at->variables.end()) return it->second;
  }
  return Undefined{expr.name};
}

Value Evaluator::eval_compare(const Expr& expr, const FramePtr& frame) {
  Value left = eval(*expr.items[0], frame);
  for (size_t i = 0; i < expr.ops.size(); ++i) {
    Value right = eval(*expr.items[i + 1], frame);
    const std::string& op = expr.ops[i];
    bool holds;
    if (op == "in" || op == "not in") {
      holds = contains(right, left) == (op == "in");
    } else {
      holds = compare_with(op, left, right);
    }
    if (!holds) return false;
    left = std::move(right);
  }
  return true;
}

Value Evaluator::add(const Value& a, const Value& b) {
  if (a.is_string() && b.is_string()) {
    charge(a.string().size() + b.string().size());
    return Value(a.string() + b.string());
  }
  if (a.is_list() && b.is_list() && a.list().is_tuple == b.list().is_tuple) {
    std::vector<Value> items = a.list().items;
    charge(items.size() * sizeof(Value));
    items.insert(items.end(), b.list().items.begin(), b.list().items.end());
    return list(std::move(items), a.list().is_tuple);
  }
  require_numbers(a, b, "+");
  if (a.is_real() || b.is_real()) return a.real() + b.real();
  return add_integers(a.integer(), b.integer());
}

Value Evaluator::multiply(const Value& a, const Value& b) {
  if ((a.is_int() || a.is_bool()) && (b.is_string() || b.is_list())) return multiply(b, a);
  if ((a.is_string() || a.is_list()) && (b.is_int() || b.is_bool())) {
    const auto count = static_cast<size_t>(std::max<int64_t>(0, b.integer()));
    const size_t unit = a.is_string() ? a.string().size() : a.list().items.size() * sizeof(Value);
    if (unit > 0 && count > limits_.memory_bytes / unit) charge(limits_.memory_bytes + 1);
    charge(count * unit);
    if (a.is_string()) {
      std::string out;
      out.reserve(count * unit);
      for (size_t i = 0; i < count && unit > 0; ++i) out += a.string();
      return Value(std::move(out));
    }
    std::vector<Value> items;
    for (size_t i = 0; i < count && unit > 0; ++i) {
      items.insert(items.end(), a.list().items.begin(), a.list().items.end());
    }
    return list(std::move(items), a.list().is_tuple);
  }
  require_numbers(a, b, "*");
  if (a.is_real() || b.is_real()) return a.real() * b.real();
  return multiply_integers(a.integer(), b.integer());
}

Value Evaluator::eval_arithmetic(const Expr& expr, const FramePtr& frame) {
  const Value a = eval(*expr.items[0], frame);
  if (expr.kind == ExprKind::negate || expr.kind == ExprKind::plus) {
    require_numbers(a, a, expr.kind == ExprKind::negate ? "-" : "+");
    if (a.is_real()) return expr.kind == ExprKind::negate ? -a.real() : a.real();
    return expr.kind == ExprKind::negate ? subtract_integers(0, a.integer()) : a.integer();
  }
  const Value b = eval(*expr.items[1], frame);
  const bool real = a.is_real() || b.is_real();
  switch (expr.kind) {
    case ExprKind::add:
      return add(a, b);
    case ExprKind::multiply:
      return multiply(a, b);
    case ExprKind::subtract:
      require_numbers(a, b, "-");
      return real ? Value(a.real() - b.real()) : Value(subtract_integers(a.integer(), b.integer()));
    case ExprKind::divide:
      require_numbers(a, b, "/");
      if (b.real() == 0) throw Problem{"a divisor must not be zero but is"};
      return a.real() / b.real();
    case ExprKind::floor_divide:
      require_numbers(a, b, "//");
      if (!real) return floor_divide(a.integer(), b.integer());
      if (b.real() == 0) throw Problem{"a divisor must not be zero but is"};
      return std::floor(a.real() / b.real());
    case ExprKind::modulo: {
      if (a.is_string()) {
        const bool many = b.is_list() && b.list().is_tuple;
        return text(format_percent(a.string(), many ? b.list().items : std::vector<Value>{b}));
      }
      require_numbers(a, b, "%");
      if (b.real() == 0) throw Problem{"a divisor must not be zero but is"};
      if (real) return a.real() - b.real() * std::floor(a.real() / b.real());
      const int64_t x = a.integer(), y = b.integer();
      return y == -1 ? int64_t{0} : x - floor_divide(x, y) * y;
    }
    default:
      return power(a, b);
  }
}

Value Evaluator::eval_slice(const Expr& expr, const FramePtr& frame) {
  const Value object = eval(*expr.items[0], frame);
  if (!object.is_string() && !object.is_list()) {
    throw Problem{"a slice must be of a string or a list but is of " + type_name(object)};
  }
  std::vector<uint32_t> offsets;
  if (object.is_string()) {
    charge(object.string().size() * sizeof(uint32_t));
    step(object.string().size() / 64);
    offsets = text_offsets(object.string());
  }
  const auto size =
      static_cast<int64_t>(object.is_string() ? offsets.size() - 1 : object.list().items.size());
  const auto bound = [&](size_t i, int64_t absent) {
    if (!expr.items[i]) return absent;
    const Value value = eval(*expr.items[i], frame);
    if (value.is_none()) return absent;
    if (!value.is_int() && !value.is_bool()) {
      throw Problem{"a slice must have integers but has " + type_name(value)};
    }
    return value.integer();
  };
  const int64_t stride = bound(3, 1);
  if (stride == 0) throw Problem{"the step of a slice must not be zero but is"};
  // Python's slice.indices(): ends outside are moved to the nearest one inside.
  const int64_t low = stride > 0 ? 0 : -1, high = stride > 0 ? size : size - 1;
  const auto clamp = [&](int64_t i) {
    return i < 0 ? (i < -size ? low : std::max(i + size, low)) : std::min(i, high);
  };
  int64_t start = expr.items[1] ? bound(1, INT64_MAX) : INT64_MAX;
  start = start == INT64_MAX ? (stride > 0 ? low : high) : clamp(start);
  int64_t stop = expr.items[2] ? bound(2, INT64_MAX) : INT64_MAX;
  stop = stop == INT64_MAX ? (stride > 0 ? high : low) : clamp(stop);
  std::string out;
  std::vector<Value> items;
  for (int64_t i = start; stride > 0 ? i < stop : i > stop;) {
    if (object.is_string()) {
      out.append(object.string(), offsets[i], offsets[i + 1] - offsets[i]);
    } else {
      items.push_back(object.list().items[i]);
    }
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  return object.is_string() ? text(std::move(out)) : list(std::move(items), object.list().is_tuple);
}

Arguments Evaluator::eval_arguments(const Expr& expr, size_t first, const FramePtr& frame) {
  Arguments out;
  out.callee = expr.name;
  for (size_t i = first; i < expr.items.size(); ++i) {
    out.positional.push_back(eval(*expr.items[i], frame));
  }
  for (const auto& [name, value] : expr.named) out.named.emplace_back(name, eval(*value, frame));
  return out;
}

Value Evaluator::eval_call(const Expr& expr, const FramePtr& frame) {
  const Value callee = eval(*expr.items[0], frame);
  Arguments arguments = eval_arguments(expr, 1, frame);
  if (!callee.is_callable()) {
    throw Problem{"only a function or macro can be called, but this is " + type_name(callee)};
  }
  const Callable& callable = callee.callable();
  arguments.callee = callable.name;
  if (callable.macro) return call_macro(callable, arguments);
  if (callable.self) return call_method(*callable.self, callable.name, arguments);
  return call_function(callable.name, arguments);
}

Value Evaluator::call_macro(const Callable& callable, const Arguments& arguments) {
  const MacroNode& macro = *callable.macro;
  const FramePtr outer = callable.scope.lock();
  if (!outer) throw Problem{"macro " + macro.name + " must be called inside its scope but is not"};
  auto scope = std::make_shared<Frame>();
  scope->outer = outer;
  charge(sizeof(Frame) + 64 * macro.parameters.size());
  const size_t count = macro.parameters.size();
  if (arguments.positional.size() > count) {
    throw Problem{
        "macro " + macro.name + " must get at most " + std::to_string(count) +
        " arguments but got " + std::to_string(arguments.positional.size())};
  }
  for (const auto& [name, value] : arguments.named) {
    if (std::find(macro.parameters.begin(), macro.parameters.end(), name) ==
        macro.parameters.end()) {
      throw Problem{"macro " + macro.name + " must have a parameter " + name + " but has not"};
    }
  }
  const size_t first_default = count - macro.defaults.size();
  for (size_t i = 0; i < count; ++i) {
    const std::string& name = macro.parameters[i];
    const Value* given = arguments.get(i, name.c_str());
    Value value;
    if (given) {
      value = *given;
    } else if (i >= first_default) {
      value = eval(*macro.defaults[i - first_default], scope);
    } else {
      value = Undefined{name};
    }
    scope->variables.insert_or_assign(name, std::move(value));
  }
  const int64_t loops = std::exchange(loop_depth_, 0);
  Value result = text(capture(macro.body, scope));
  loop_depth_ = loops;
  return result;
}

Value Evaluator::call_function(const std::string& name, const Arguments& arguments) {
  if (name == "raise_exception") {
    throw Problem{"the template refuses these messages: " + arguments.text(0, "message", "")};
  }
  if (name == "strftime_now") {
    return text(format_time(date_, arguments.text(0, "format", "%Y-%m-%d")));
  }
  if (name == "range") {
    int64_t start = arguments.integer(0, "start", 0), stop = start, stride = 1;
    if (arguments.positional.size() == 1) {
      start = 0;
    } else {
      stop = arguments.integer(1, "stop", 0);
      stride = arguments.integer(2, "step", 1);
    }
    if (stride == 0) throw Problem{"the step of range must not be zero but is"};
    std::vector<Value> items;
    for (int64_t i = start; stride > 0 ? i < stop : i > stop;) {
      step();
      charge(sizeof(Value));
      items.emplace_back(i);
      if (__builtin_add_overflow(i, stride, &i)) break;
    }
    return list(std::move(items));
  }
  auto dict = std::make_shared<Dict>();
  dict->is_namespace = name == "namespace";
  charge(sizeof(Dict) + 2 * sizeof(Value) * arguments.named.size());
  if (const Value* from = arguments.positional.empty() ? nullptr : &arguments.positional[0]) {
    if (!from->is_mapping())
      throw Problem{name + " must copy a mapping but got " + type_name(*from)};
    for (const auto& [key, value] : from->dict().items()) dict->set(key, value);
  }
  for (const auto& [key, value] : arguments.named) dict->set(Value(key), value);
  return dict;
}

}  // namespace metal_lora::text::jinja
