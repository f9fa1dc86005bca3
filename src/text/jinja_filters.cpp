// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <iterator>

#include "src/io/json.h"
#include "src/text/jinja_eval.h"

namespace metal_lora::text::jinja {

namespace {

using Items = std::vector<Value>;

constexpr std::string_view kFilters[] = {
    "abs",   "attr",   "capitalize", "count",      "d",          "default",   "dictsort",
    "e",     "escape", "first",      "float",      "format",     "from_json", "indent",
    "int",   "items",  "join",       "last",       "length",     "list",      "lower",
    "map",   "max",    "min",        "reject",     "rejectattr", "replace",   "reverse",
    "round", "safe",   "select",     "selectattr", "sort",       "string",    "sum",
    "title", "tojson", "trim",       "unique",     "upper",      "wordcount"};

constexpr std::string_view kTests[] = {
    "boolean", "callable", "defined",  "divisibleby", "eq",          "equalto",
    "even",    "false",    "float",    "ge",          "greaterthan", "gt",
    "in",      "integer",  "iterable", "le",          "lessthan",    "lower",
    "lt",      "mapping",  "ne",       "none",        "number",      "odd",
    "sameas",  "sequence", "string",   "true",        "undefined",   "upper"};

// "a.b.0": the attribute of map, sort, selectattr.
Value path_of(Evaluator& evaluator, Value value, const std::string& path) {
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    evaluator.step();
    const bool index =
        !part.empty() && part.size() < 10 &&
        std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    value = evaluator.subscript(value, index ? Value(int64_t{std::stoi(part)}) : Value(part));
    begin = end + 1;
  }
  return value;
}

// What sort, min, unique and dictsort compare: strings without case unless asked.
Value sort_key(Evaluator& evaluator, const Value& value, const Value* path, bool case_sensitive) {
  Value key = path && !path->is_none() ? path_of(evaluator, value, to_text(*path)) : value;
  if (!case_sensitive && key.is_string()) key = evaluator.text(to_lower(key.string()));
  return key;
}

void sort_by_keys(Evaluator& evaluator, Items& items, std::vector<Value> keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  // Merge sort over positions: a comparison may throw, which std::stable_sort allows.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    evaluator.step();
    return reverse ? compare(keys[b], keys[a]) < 0 : compare(keys[a], keys[b]) < 0;
  });
  Items sorted;
  for (const size_t i : order) sorted.push_back(items[i]);
  items = std::move(sorted);
}

Value filter_tojson(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  JsonStyle style;
  style.ensure_ascii = arguments.flag(0, "ensure_ascii", false);
  style.indent = static_cast<int>(std::clamp<int64_t>(arguments.integer(1, "indent", -1), -1, 64));
  style.sort_keys = arguments.flag(3, "sort_keys", false);
  if (const Value* pair = arguments.get(2, "separators"); pair && !pair->is_none()) {
    const Items parts = evaluator.iterate(*pair);
    if (parts.size() != 2) throw Problem{"tojson's separators must be two but are not"};
    style.item_separator = to_text(parts[0]);
    style.key_separator = to_text(parts[1]);
  }
  // HF's own tojson takes (x, ensure_ascii, indent, separators, sort_keys).
  std::string json = to_json(object, style, evaluator.limits().output_bytes);
  evaluator.step(json.size() / 64);
  return evaluator.text(std::move(json));
}

Value filter_indent(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  const Value* width = arguments.get(0, "width");
  const std::string pad =
      width && width->is_string()
          ? width->string()
          : std::string(std::clamp<int64_t>(arguments.integer(0, "width", 4), 0, 4096), ' ');
  const bool first = arguments.flag(1, "first", false), blank = arguments.flag(2, "blank", false);
  const std::string source = to_text(object);
  std::string out = first ? pad : "";
  for (size_t begin = 0; begin <= source.size();) {
    const size_t end = std::min(source.find('\n', begin), source.size());
    if (begin > 0 && (blank || end > begin)) out += pad;
    out.append(source, begin, end - begin);
    if (end < source.size()) out += '\n';
    begin = end + 1;
    if (out.size() > evaluator.limits().output_bytes) evaluator.charge(SIZE_MAX / 2);
  }
  return evaluator.text(std::move(out));
}

Value filter_join(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  const std::string between = arguments.text(0, "d", "");
  const Value* path = arguments.get(1, "attribute");
  std::string out;
  bool first = true;
  for (const Value& item : evaluator.iterate(object)) {
    evaluator.step();
    if (!std::exchange(first, false)) out += between;
    out += to_text(path && !path->is_none() ? path_of(evaluator, item, to_text(*path)) : item);
    if (out.size() > evaluator.limits().output_bytes) evaluator.charge(SIZE_MAX / 2);
  }
  return evaluator.text(std::move(out));
}

// JSON text to a value, as llama.cpp's templates use it; transformers has no such filter. Bounded,
// since inserting into an ordered object costs its size.
Value filter_from_json(Evaluator& evaluator, const Value& object) {
  constexpr size_t kMaxBytes = 64 * 1024;
  const std::string source = to_text(object);
  evaluator.step(source.size());
  evaluator.charge(16 * source.size());
  if (const auto checked = io::parse_json(source, "from_json", {.max_bytes = kMaxBytes});
      !checked) {
    throw Problem{"from_json must get JSON but: " + checked.error().summary()};
  }
  return from_json(nlohmann::ordered_json::parse(source));
}

Value filter_map(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  Items out;
  const Value* path = arguments.positional.empty() ? arguments.get(0, "attribute") : nullptr;
  if (path) {
    const Value* absent = arguments.get(SIZE_MAX, "default");
    for (const Value& item : evaluator.iterate(object)) {
      Value value = path_of(evaluator, item, to_text(*path));
      out.push_back(value.is_undefined() && absent ? *absent : std::move(value));
    }
    return evaluator.list(std::move(out));
  }
  Arguments rest = arguments;
  const std::string name = to_text(arguments.require(0, "filter"));
  if (!is_filter(name)) throw Problem{"map's filter must be known but \"" + name + "\" is not"};
  rest.positional.erase(rest.positional.begin());
  rest.callee = name;
  for (const Value& item : evaluator.iterate(object)) {
    evaluator.step();
    out.push_back(evaluator.apply_filter(name, item, rest));
  }
  return evaluator.list(std::move(out));
}

// select, reject, selectattr, rejectattr: keeps what passes (or fails) a test.
Value filter_select(
    Evaluator& evaluator, const Value& object, const Arguments& arguments, bool keep, bool attr) {
  Arguments rest = arguments;
  std::string path, test;
  if (attr) {
    path = to_text(arguments.require(0, "attribute"));
    rest.positional.erase(rest.positional.begin());
  }
  if (!rest.positional.empty()) {
    test = to_text(rest.positional[0]);
    const bool known = is_test(test) || test == "==" || test == "!=" || test == "<" ||
                       test == ">" || test == "<=" || test == ">=";
    if (!known) throw Problem{"a test must be known but \"" + test + "\" is not"};
    rest.positional.erase(rest.positional.begin());
    rest.callee = test;
  }
  Items out;
  for (const Value& item : evaluator.iterate(object)) {
    evaluator.step();
    const Value tested = attr ? path_of(evaluator, item, path) : item;
    const bool holds = test.empty() ? truthy(tested) : evaluator.apply_test(test, tested, rest);
    if (holds == keep) out.push_back(item);
  }
  return evaluator.list(std::move(out));
}

Value filter_sort(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  Items items = evaluator.iterate(object);
  std::vector<Value> keys;
  for (const Value& item : items) {
    keys.push_back(sort_key(
        evaluator,
        item,
        arguments.get(2, "attribute"),
        arguments.flag(1, "case_sensitive", false)));
  }
  sort_by_keys(evaluator, items, std::move(keys), arguments.flag(0, "reverse", false));
  return evaluator.list(std::move(items));
}

Value filter_dictsort(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  if (!object.is_mapping())
    throw Problem{"dictsort must get a mapping but got " + type_name(object)};
  const bool by_value = arguments.text(1, "by", "key") == "value";
  Items pairs;
  std::vector<Value> keys;
  for (const auto& [key, value] : object.dict().items()) {
    pairs.push_back(evaluator.list({key, value}, true));
    keys.push_back(sort_key(
        evaluator, by_value ? value : key, nullptr, arguments.flag(0, "case_sensitive", false)));
  }
  sort_by_keys(evaluator, pairs, std::move(keys), arguments.flag(2, "reverse", false));
  return evaluator.list(std::move(pairs));
}

Value filter_unique(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  Items out;
  std::vector<Value> seen;
  for (const Value& item : evaluator.iterate(object)) {
    const Value key = sort_key(
        evaluator, item, arguments.get(1, "attribute"), arguments.flag(0, "case_sensitive", false));
    const bool known = std::any_of(seen.begin(), seen.end(), [&](const Value& other) {
      evaluator.step();
      return equal(key, other);
    });
    if (known) continue;
    seen.push_back(key);
    out.push_back(item);
  }
  return evaluator.list(std::move(out));
}

Value filter_extreme(
    Evaluator& evaluator, const Value& object, const Arguments& arguments, bool greatest) {
  Value best;
  Value best_key;
  bool first = true;
  for (const Value& item : evaluator.iterate(object)) {
    evaluator.step();
    const Value key = sort_key(
        evaluator, item, arguments.get(1, "attribute"), arguments.flag(0, "case_sensitive", false));
    const int order = first ? 0 : compare(key, best_key);
    if (first || (greatest ? order > 0 : order < 0)) {
      best = item;
      best_key = key;
    }
    first = false;
  }
  return best;
}

Value filter_sum(Evaluator& evaluator, const Value& object, const Arguments& arguments) {
  const Value* path = arguments.get(0, "attribute");
  const Value* start = arguments.get(1, "start");
  Value total = start ? *start : Value(int64_t{0});
  for (const Value& item : evaluator.iterate(object)) {
    evaluator.step();
    const Value value = path && !path->is_none() ? path_of(evaluator, item, to_text(*path)) : item;
    if (!total.is_number() || !value.is_number()) {
      throw Problem{"sum must get numbers but got " + type_name(value)};
    }
    int64_t integer = 0;
    if (total.is_real() || value.is_real()) {
      total = total.real() + value.real();
    } else if (__builtin_add_overflow(total.integer(), value.integer(), &integer)) {
      throw Problem{"an integer must fit 64 bits but does not"};
    } else {
      total = integer;
    }
  }
  return total;
}

// int() and float() of a string: the number, or nothing.
bool parse_real(const std::string& source, double& out) {
  const std::string text = strip_text(source, nullptr, true, true);
  const char* begin = text.data() + (text[0] == '+' && text.size() > 1 ? 1 : 0);
  const auto result = std::from_chars(begin, text.data() + text.size(), out);
  return !text.empty() && result.ec == std::errc() && result.ptr == text.data() + text.size();
}

bool parse_integer(const std::string& source, int base, int64_t& out) {
  const std::string text = strip_text(source, nullptr, true, true);
  const char* begin = text.data() + (text[0] == '+' && text.size() > 1 ? 1 : 0);
  const auto result = std::from_chars(begin, text.data() + text.size(), out, base);
  return !text.empty() && result.ec == std::errc() && result.ptr == text.data() + text.size();
}

Value filter_int(const Value& object, const Arguments& arguments) {
  const Value* given = arguments.get(0, "default");
  const Value absent = given ? *given : Value(int64_t{0});
  int64_t integer = 0;
  double real = 0;
  if (object.is_int() || object.is_bool()) return object.integer();
  if (object.is_string()) {
    const int base = static_cast<int>(std::clamp<int64_t>(arguments.integer(1, "base", 10), 2, 36));
    if (parse_integer(object.string(), base, integer)) return integer;
    if (!parse_real(object.string(), real)) return absent;
  } else if (object.is_real()) {
    real = object.real();
  } else {
    return absent;
  }
  if (!(std::fabs(real) < 9.2e18)) return absent;
  return static_cast<int64_t>(real);
}

Value filter_float(const Value& object, const Arguments& arguments) {
  const Value* absent = arguments.get(0, "default");
  double real = 0;
  if (object.is_number()) return object.real();
  if (object.is_string() && parse_real(object.string(), real)) return real;
  return absent ? *absent : Value(0.0);
}

Value filter_round(const Value& object, const Arguments& arguments) {
  if (!object.is_number()) throw Problem{"round must get a number but got " + type_name(object)};
  const auto digits = std::clamp<int64_t>(arguments.integer(0, "precision", 0), -300, 300);
  const std::string method = arguments.text(1, "method", "common");
  const double scale = std::pow(10.0, static_cast<double>(digits));
  const double scaled = object.real() * scale;
  const double rounded = method == "ceil"    ? std::ceil(scaled)
                         : method == "floor" ? std::floor(scaled)
                                             : std::nearbyint(scaled);
  if (object.is_int() && method == "common") return object;
  return rounded / scale;
}

std::string title_words(const std::string& source) {
  std::string out;
  bool start = true;
  for (const char c : source) {
    const bool boundary = c == ' ' || (c >= '\t' && c <= '\r') || std::strchr("-({[<", c);
    if (boundary && c != '\0') {
      out += c;
      start = true;
      continue;
    }
    out += c;
    if (start && static_cast<unsigned char>(c) < 0x80) {
      out.back() = to_upper(std::string(1, c))[0];
    } else if (static_cast<unsigned char>(c) < 0x80) {
      out.back() = to_lower(std::string(1, c))[0];
    }
    start = false;
  }
  return out;
}

std::string escape_html(const std::string& source) {
  std::string out;
  for (const char c : source) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

int64_t length_of(const Value& value) {
  if (value.is_string()) return static_cast<int64_t>(text_length(value.string()));
  if (value.is_list()) return static_cast<int64_t>(value.list().items.size());
  if (value.is_mapping()) return static_cast<int64_t>(value.dict().items().size());
  if (value.is_undefined()) return 0;
  throw Problem{"a length must be of a string, list or mapping but is of " + type_name(value)};
}

// Filters that make text of text.
bool filter_text(
    Evaluator& evaluator,
    const std::string& name,
    const Value& object,
    const Arguments& arguments,
    Value& out) {
  if (name == "string" || name == "safe") {
    out = object.is_string() ? object : evaluator.text(to_text(object));
  } else if (name == "trim") {
    out = evaluator.text(strip_text(to_text(object), arguments.get(0, "chars"), true, true));
  } else if (name == "upper") {
    out = evaluator.text(to_upper(to_text(object)));
  } else if (name == "lower") {
    out = evaluator.text(to_lower(to_text(object)));
  } else if (name == "title") {
    out = evaluator.text(title_words(to_text(object)));
  } else if (name == "capitalize") {
    out = evaluator.call_method(Value(to_text(object)), "capitalize", {});
  } else if (name == "e" || name == "escape") {
    out = evaluator.text(escape_html(to_text(object)));
  } else if (name == "replace") {
    out = evaluator.text(replace_text(
        to_text(object),
        to_text(arguments.require(0, "old")),
        to_text(arguments.require(1, "new")),
        arguments.integer(2, "count", -1),
        evaluator.limits().output_bytes));
  } else if (name == "indent") {
    out = filter_indent(evaluator, object, arguments);
  } else if (name == "tojson") {
    out = filter_tojson(evaluator, object, arguments);
  } else if (name == "from_json") {
    out = filter_from_json(evaluator, object);
  } else if (name == "join") {
    out = filter_join(evaluator, object, arguments);
  } else if (name == "format") {
    out = evaluator.text(format_percent(to_text(object), arguments.positional));
  } else if (name == "wordcount") {
    out = length_of(evaluator.call_method(Value(to_text(object)), "split", {}));
  } else {
    return false;
  }
  return true;
}

bool filter_number(
    const std::string& name, const Value& object, const Arguments& arguments, Value& out) {
  if (name == "int") {
    out = filter_int(object, arguments);
  } else if (name == "float") {
    out = filter_float(object, arguments);
  } else if (name == "round") {
    out = filter_round(object, arguments);
  } else if (name == "length" || name == "count") {
    out = length_of(object);
  } else if (name == "abs") {
    if (!object.is_number()) throw Problem{"abs must get a number but got " + type_name(object)};
    if (object.is_real()) {
      out = std::fabs(object.real());
    } else {
      if (object.integer() == INT64_MIN) throw Problem{"an integer must fit 64 bits but does not"};
      out = object.integer() < 0 ? -object.integer() : object.integer();
    }
  } else {
    return false;
  }
  return true;
}

Value filter_sequence(
    Evaluator& evaluator,
    const std::string& name,
    const Value& object,
    const Arguments& arguments) {
  if (name == "list") return evaluator.list(evaluator.iterate(object));
  if (name == "first" || name == "last") {
    Items items = evaluator.iterate(object);
    if (items.empty()) return Undefined{"no " + name + " item"};
    return name == "first" ? items.front() : items.back();
  }
  if (name == "reverse") {
    Items items = evaluator.iterate(object);
    std::reverse(items.begin(), items.end());
    if (!object.is_string()) return evaluator.list(std::move(items));
    std::string out;
    for (const Value& item : items) out += item.string();
    return evaluator.text(std::move(out));
  }
  if (name == "items") {
    if (object.is_undefined()) return evaluator.list({});
    if (!object.is_mapping())
      throw Problem{"items must get a mapping but got " + type_name(object)};
    return evaluator.call_method(object, "items", {});
  }
  // Jinja looks at the items of these only where there are any: None passes.
  const bool lenient = name == "map" || name == "select" || name == "reject" ||
                       name == "selectattr" || name == "rejectattr";
  if (lenient && !truthy(object)) return evaluator.list({});
  if (name == "map") return filter_map(evaluator, object, arguments);
  if (name == "select") return filter_select(evaluator, object, arguments, true, false);
  if (name == "reject") return filter_select(evaluator, object, arguments, false, false);
  if (name == "selectattr") return filter_select(evaluator, object, arguments, true, true);
  if (name == "rejectattr") return filter_select(evaluator, object, arguments, false, true);
  if (name == "sort") return filter_sort(evaluator, object, arguments);
  if (name == "dictsort") return filter_dictsort(evaluator, object, arguments);
  if (name == "unique") return filter_unique(evaluator, object, arguments);
  if (name == "min") return filter_extreme(evaluator, object, arguments, false);
  if (name == "max") return filter_extreme(evaluator, object, arguments, true);
  if (name == "sum") return filter_sum(evaluator, object, arguments);
  return evaluator.attribute(object, to_text(arguments.require(0, "name")));  // attr
}

bool all_case(const std::string& text, bool upper) {
  return text == (upper ? to_upper(text) : to_lower(text)) && to_upper(text) != to_lower(text);
}

}  // namespace

bool is_filter(const std::string& name) {
  return std::find(std::begin(kFilters), std::end(kFilters), name) != std::end(kFilters);
}

bool is_test(const std::string& name) {
  return std::find(std::begin(kTests), std::end(kTests), name) != std::end(kTests);
}

Value Evaluator::apply_filter(
    const std::string& name, const Value& object, const Arguments& arguments) {
  if (name == "default" || name == "d") {
    const bool absent =
        object.is_undefined() || (arguments.flag(1, "boolean", false) && !truthy(object));
    const Value* other = arguments.get(0, "default_value");
    return absent ? (other ? *other : Value("")) : object;
  }
  if (object.is_string()) step(object.string().size() / 64);
  Value out;
  if (filter_text(*this, name, object, arguments, out)) return out;
  if (filter_number(name, object, arguments, out)) return out;
  return filter_sequence(*this, name, object, arguments);
}

bool Evaluator::apply_test(
    const std::string& name, const Value& object, const Arguments& arguments) {
  const auto other = [&]() -> const Value& { return arguments.require(0, "other"); };
  if (name == "defined") return !object.is_undefined();
  if (name == "undefined") return object.is_undefined();
  if (name == "none") return object.is_none();
  if (name == "string") return object.is_string();
  if (name == "mapping") return object.is_mapping();
  if (name == "number") return object.is_number();
  if (name == "integer") return object.is_int();
  if (name == "float") return object.is_real();
  if (name == "boolean") return object.is_bool();
  if (name == "true") return object.is_bool() && truthy(object);
  if (name == "false") return object.is_bool() && !truthy(object);
  if (name == "callable") return object.is_callable();
  if (name == "iterable") {
    return object.is_string() || object.is_list() || object.is_mapping() || object.is_undefined();
  }
  if (name == "sequence") {
    return object.is_string() || object.is_list() || object.is_mapping() || object.is_undefined();
  }
  if (name == "equalto" || name == "eq" || name == "==") return equal(object, other());
  if (name == "sameas")
    return object.data.index() == other().data.index() && equal(object, other());
  if (name == "ne" || name == "!=") return !equal(object, other());
  if (name == "in") return contains(other(), object);
  if (name == "lt" || name == "lessthan" || name == "<") return compare(object, other()) < 0;
  if (name == "le" || name == "<=") return compare(object, other()) <= 0;
  if (name == "gt" || name == "greaterthan" || name == ">") return compare(object, other()) > 0;
  if (name == "ge" || name == ">=") return compare(object, other()) >= 0;
  if (name == "lower") return all_case(to_text(object), false);
  if (name == "upper") return all_case(to_text(object), true);
  if (!object.is_int() && !object.is_bool()) {
    throw Problem{name + " must test an integer but got " + type_name(object)};
  }
  const int64_t divisor = name == "divisibleby" ? arguments.integer(0, "num", 0) : 2;
  if (divisor == 0) throw Problem{"a divisor must not be zero but is"};
  const bool divides = divisor == -1 || object.integer() % divisor == 0;
  return name == "odd" ? !divides : divides;
}

}  // namespace metal_lora::text::jinja
