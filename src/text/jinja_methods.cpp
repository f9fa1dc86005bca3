// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <utf8proc.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>

#include "src/text/jinja_eval.h"
#include "src/text/utf8.h"

namespace metal_lora::text::jinja {

namespace {

constexpr std::string_view kStringMethods[] = {
    "capitalize", "count",        "endswith",     "find",    "format",  "index",  "isalnum",
    "isalpha",    "isdigit",      "islower",      "isspace", "isupper", "join",   "lower",
    "lstrip",     "removeprefix", "removesuffix", "replace", "rfind",   "rsplit", "rstrip",
    "split",      "splitlines",   "startswith",   "strip",   "title",   "upper"};
constexpr std::string_view kListMethods[] = {
    "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "reverse"};
constexpr std::string_view kTupleMethods[] = {"count", "index"};
constexpr std::string_view kDictMethods[] = {
    "clear", "copy", "get", "items", "keys", "pop", "setdefault", "update", "values"};

template <size_t n>
bool among(const std::string_view (&names)[n], const std::string& name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

const std::string& string_of(const Value& value, const std::string& callee) {
  if (!value.is_string()) throw Problem{callee + " must get a string but got " + type_name(value)};
  return value.string();
}

// str.split() without a separator: runs of white space.
std::vector<std::string> split_white_space(const std::string& text, int64_t most) {
  std::vector<std::string> out;
  size_t pos = 0;
  const auto skip = [&] {
    while (pos < text.size()) {
      const CodePoint c = read_utf8(text, pos);
      if (!is_white_space(c.value) && !(c.value >= 0x1C && c.value <= 0x1F)) break;
      pos += c.bytes;
    }
  };
  skip();
  while (pos < text.size()) {
    if (most >= 0 && static_cast<int64_t>(out.size()) >= most) {
      Value rest(text.substr(pos));
      out.push_back(strip_text(rest.string(), nullptr, false, true));
      break;
    }
    const size_t begin = pos;
    while (pos < text.size()) {
      const CodePoint c = read_utf8(text, pos);
      if (is_white_space(c.value) || (c.value >= 0x1C && c.value <= 0x1F)) break;
      pos += c.bytes;
    }
    out.push_back(text.substr(begin, pos - begin));
    skip();
  }
  return out;
}

std::vector<std::string> split_at(
    const std::string& text, const std::string& separator, int64_t most, bool from_right) {
  if (separator.empty()) throw Problem{"a separator must not be empty but is"};
  std::vector<std::string> out;
  if (!from_right) {
    size_t begin = 0;
    for (size_t at; (most < 0 || static_cast<int64_t>(out.size()) < most) &&
                    (at = text.find(separator, begin)) != std::string::npos;) {
      out.push_back(text.substr(begin, at - begin));
      begin = at + separator.size();
    }
    out.push_back(text.substr(begin));
    return out;
  }
  size_t end = text.size();
  for (size_t at; (most < 0 || static_cast<int64_t>(out.size()) < most) &&
                  end >= separator.size() &&
                  (at = text.rfind(separator, end - separator.size())) != std::string::npos;) {
    out.push_back(text.substr(at + separator.size(), end - at - separator.size()));
    end = at;
  }
  out.push_back(text.substr(0, end));
  std::reverse(out.begin(), out.end());
  return out;
}

Value method_split(
    Evaluator& evaluator, const std::string& text, const Arguments& arguments, bool from_right) {
  const Value* separator = arguments.get(0, "sep");
  const int64_t most = arguments.integer(1, "maxsplit", -1);
  std::vector<std::string> parts;
  if (!separator || separator->is_none()) {
    if (from_right && most >= 0)
      throw Problem{"rsplit with a limit must have a separator but has none"};
    parts = split_white_space(text, most);
  } else {
    parts = split_at(text, string_of(*separator, "split"), most, from_right);
  }
  std::vector<Value> items;
  for (auto& part : parts) items.push_back(evaluator.text(std::move(part)));
  return evaluator.list(std::move(items));
}

bool starts_or_ends(const std::string& text, const Value& affix, bool starts) {
  if (affix.is_list()) {
    return std::any_of(affix.list().items.begin(), affix.list().items.end(), [&](const Value& one) {
      return one.is_string() && starts_or_ends(text, one, starts);
    });
  }
  const std::string& part = string_of(affix, starts ? "startswith" : "endswith");
  if (part.size() > text.size()) return false;
  return text.compare(starts ? 0 : text.size() - part.size(), part.size(), part) == 0;
}

// str.format with {}, {0} and {name}; a format specification is refused.
std::string format_braces(const std::string& format, const Arguments& arguments) {
  std::string out;
  size_t automatic = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    const char c = format[i];
    if ((c == '{' || c == '}') && i + 1 < format.size() && format[i + 1] == c) {
      out += c;
      ++i;
      continue;
    }
    if (c == '}') throw Problem{"format must have balanced braces but has not"};
    if (c != '{') {
      out += c;
      continue;
    }
    const size_t close = format.find('}', i);
    if (close == std::string::npos) throw Problem{"format must have balanced braces but has not"};
    const std::string field = format.substr(i + 1, close - i - 1);
    const bool digits =
        std::all_of(field.begin(), field.end(), [](char d) { return d >= '0' && d <= '9'; });
    const bool plain = std::all_of(field.begin(), field.end(), [](char d) {
      return d == '_' || (d >= '0' && d <= '9') || (d >= 'a' && d <= 'z') || (d >= 'A' && d <= 'Z');
    });
    if (!plain || field.size() > 64) {
      throw Problem{"format must have plain fields but has {" + field.substr(0, 64) + "}"};
    }
    const size_t index = !digits         ? SIZE_MAX
                         : field.empty() ? automatic++
                                         : std::stoul(field.substr(0, 9));
    out += to_text(arguments.require(index, field.c_str()));
    i = close;
  }
  return out;
}

bool all_characters(const std::string& text, bool (*property)(char32_t)) {
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    if (!property(c.value)) return false;
    pos += c.bytes;
  }
  return !text.empty();
}

bool is_letter(char32_t c) {
  const auto k = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool is_digit(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c)) == UTF8PROC_CATEGORY_ND;
}

bool is_letter_or_number(char32_t c) {
  return is_letter(c) || is_numeric(c);
}

// str.title(): a letter after a non-letter is upper case, any other lower.
std::string title_case(const std::string& text, bool only_first) {
  std::string out;
  bool start = true;
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    const std::string one = text.substr(pos, c.bytes);
    out += start ? to_upper(one) : to_lower(one);
    start = only_first ? false : !is_letter(c.value);
    pos += c.bytes;
  }
  return out;
}

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> out;
  std::string line;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n') ++i;
    if (text[i] == '\n' || text[i] == '\r') {
      out.push_back(std::exchange(line, {}));
    } else {
      line += text[i];
    }
  }
  if (!line.empty()) out.push_back(line);
  return out;
}

Value string_search(const std::string& text, const std::string& name, const Arguments& arguments) {
  const std::string& part = string_of(arguments.require(0, "sub"), name);
  if (name == "count") {
    if (part.empty()) return static_cast<int64_t>(text_length(text)) + 1;
    int64_t n = 0;
    for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
    return n;
  }
  const size_t at = name == "rfind" ? text.rfind(part) : text.find(part);
  if (at != std::string::npos) {
    return static_cast<int64_t>(text_length(std::string_view(text).substr(0, at)));
  }
  if (name == "index") throw Problem{"index must find the string but does not"};
  return int64_t{-1};
}

Value string_method(
    Evaluator& evaluator,
    const std::string& text,
    const std::string& name,
    const Arguments& arguments) {
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    return evaluator.text(
        strip_text(text, arguments.get(0, "chars"), name != "rstrip", name != "lstrip"));
  }
  if (name == "startswith" || name == "endswith") {
    return starts_or_ends(text, arguments.require(0, "prefix"), name == "startswith");
  }
  if (name == "split" || name == "rsplit") {
    return method_split(evaluator, text, arguments, name == "rsplit");
  }
  if (name == "upper") return evaluator.text(to_upper(text));
  if (name == "lower") return evaluator.text(to_lower(text));
  if (name == "title" || name == "capitalize") {
    return evaluator.text(title_case(text, name == "capitalize"));
  }
  if (name == "replace") {
    return evaluator.text(replace_text(
        text,
        string_of(arguments.require(0, "old"), name),
        string_of(arguments.require(1, "new"), name),
        arguments.integer(2, "count", -1),
        evaluator.limits().output_bytes));
  }
  if (name == "join") {
    Arguments between;
    between.callee = name;
    between.positional.push_back(Value(text));
    return evaluator.apply_filter("join", arguments.require(0, "iterable"), between);
  }
  if (name == "format") return evaluator.text(format_braces(text, arguments));
  if (name == "removeprefix" || name == "removesuffix") {
    const std::string& part = string_of(arguments.require(0, "affix"), name);
    const bool prefix = name == "removeprefix";
    if (!starts_or_ends(text, Value(part), prefix)) return evaluator.text(text);
    return evaluator.text(text.substr(prefix ? part.size() : 0, text.size() - part.size()));
  }
  if (name == "splitlines") {
    std::vector<Value> lines;
    for (auto& line : split_lines(text)) lines.push_back(evaluator.text(std::move(line)));
    return evaluator.list(std::move(lines));
  }
  if (name == "isdigit") return all_characters(text, is_digit);
  if (name == "isalpha") return all_characters(text, is_letter);
  if (name == "isalnum") return all_characters(text, is_letter_or_number);
  if (name == "isspace") return all_characters(text, is_white_space);
  if (name == "isupper") return to_upper(text) == text && to_lower(text) != text;
  if (name == "islower") return to_lower(text) == text && to_upper(text) != text;
  return string_search(text, name, arguments);
}

size_t list_position(const List& list, int64_t index) {
  const auto size = static_cast<int64_t>(list.items.size());
  if (index < -size || index >= size) {
    throw Problem{
        "an index must lie in a list of " + std::to_string(size) + " but is " +
        std::to_string(index)};
  }
  return static_cast<size_t>(index < 0 ? index + size : index);
}

Value list_method(
    Evaluator& evaluator,
    const Value& object,
    const std::string& name,
    const Arguments& arguments) {
  List& list = object.list();
  if (name == "count" || name == "index") {
    const Value& item = arguments.require(0, "value");
    int64_t count = 0;
    for (size_t i = 0; i < list.items.size(); ++i) {
      evaluator.step();
      if (!equal(list.items[i], item)) continue;
      if (name == "index") return static_cast<int64_t>(i);
      ++count;
    }
    if (name == "index") throw Problem{"index must find the value but does not"};
    return count;
  }
  if (name == "copy") return evaluator.list(list.items);
  if (name == "pop") {
    const size_t at = list_position(list, arguments.integer(0, "index", -1));
    evaluator.step(list.items.size() / 16);
    Value out = list.items[at];
    list.items.erase(list.items.begin() + static_cast<std::ptrdiff_t>(at));
    return out;
  }
  remember(evaluator, object);
  if (name == "append") {
    list.items.push_back(arguments.require(0, "item"));
  } else if (name == "extend") {
    const auto more = evaluator.iterate(arguments.require(0, "items"));
    evaluator.charge(more.size() * sizeof(Value));
    list.items.insert(list.items.end(), more.begin(), more.end());
  } else if (name == "insert") {
    evaluator.step(list.items.size() / 16);
    const auto size = static_cast<int64_t>(list.items.size());
    const int64_t index = arguments.integer(0, "index", 0);
    const int64_t at =
        std::clamp<int64_t>(index < 0 ? std::max(index, -size) + size : index, 0, size);
    list.items.insert(list.items.begin() + at, arguments.require(1, "item"));
  } else if (name == "clear") {
    list.items.clear();
  } else {
    evaluator.step(list.items.size() / 16);
    std::reverse(list.items.begin(), list.items.end());
  }
  return None{};
}

Value dict_method(
    Evaluator& evaluator,
    const Value& object,
    const std::string& name,
    const Arguments& arguments) {
  Dict& dict = object.dict();
  if (name == "get") {
    const Value* found = dict.find(arguments.require(0, "key"));
    const Value* absent = arguments.get(1, "default");
    return found ? *found : absent ? *absent : Value(None{});
  }
  if (name == "items" || name == "keys" || name == "values") {
    std::vector<Value> out;
    for (const auto& [key, value] : dict.items()) {
      evaluator.step();
      out.push_back(
          name == "items"  ? evaluator.list({key, value}, true)
          : name == "keys" ? key
                           : value);
    }
    return evaluator.list(std::move(out));
  }
  if (name == "copy") {
    evaluator.charge(dict.items().size() * 4 * sizeof(Value));
    evaluator.step(dict.items().size());
    return std::make_shared<Dict>(dict);
  }
  if (name == "pop") {
    const Value& key = arguments.require(0, "key");
    const Value* found = dict.find(key);
    const Value* absent = arguments.get(1, "default");
    if (!found && !absent) throw Problem{"pop must find its key but does not"};
    Value out = found ? *found : *absent;
    evaluator.step(dict.items().size() / 4);
    if (found) dict.erase(key);
    return out;
  }
  remember(evaluator, object);
  if (name == "setdefault") {
    const Value& key = arguments.require(0, "key");
    if (const Value* found = dict.find(key)) return *found;
    const Value* absent = arguments.get(1, "default");
    dict.set(key, absent ? *absent : Value(None{}));
    return *dict.find(key);
  }
  if (name == "clear") {
    dict.clear();
    return None{};
  }
  if (!arguments.positional.empty()) {  // update
    const Value& from = arguments.positional[0];
    if (!from.is_mapping()) throw Problem{"update must get a mapping but got " + type_name(from)};
    const auto items = from.dict().items();
    evaluator.charge(items.size() * 4 * sizeof(Value));
    evaluator.step(items.size());
    for (const auto& [key, value] : items) dict.set(key, value);
  }
  for (const auto& [key, value] : arguments.named) dict.set(Value(key), value);
  return None{};
}

Value loop_attribute(Evaluator& evaluator, const Value& object, const std::string& name) {
  const Loop& loop = object.loop();
  const auto size = static_cast<int64_t>(loop.items->items.size());
  if (name == "index") return loop.index0 + 1;
  if (name == "index0") return loop.index0;
  if (name == "revindex") return size - loop.index0;
  if (name == "revindex0") return size - loop.index0 - 1;
  if (name == "first") return loop.index0 == 0;
  if (name == "last") return loop.index0 + 1 == size;
  if (name == "length") return size;
  if (name == "depth") return loop.depth0 + 1;
  if (name == "depth0") return loop.depth0;
  if (name == "previtem" && loop.index0 > 0) return loop.items->items[loop.index0 - 1];
  if (name == "nextitem" && loop.index0 + 1 < size) return loop.items->items[loop.index0 + 1];
  if (name == "cycle" || name == "changed") {
    evaluator.charge(sizeof(Callable));
    auto method = std::make_shared<Callable>();
    method->name = name;
    method->self = std::make_shared<Value>(object);
    return method;
  }
  return Undefined{"loop." + name};
}

Value loop_method(
    Evaluator& evaluator,
    const Value& object,
    const std::string& name,
    const Arguments& arguments) {
  Loop& loop = object.loop();
  if (name == "cycle") {
    if (arguments.positional.empty()) throw Problem{"cycle must get values but got none"};
    return arguments.positional[static_cast<size_t>(loop.index0) % arguments.positional.size()];
  }
  Value now = evaluator.list(arguments.positional, true);
  const bool changed = loop.changed.is_undefined() || !equal(loop.changed, now);
  loop.changed = std::move(now);
  return changed;
}

Value undefined_member(const Value& object, const std::string& name) {
  if (object.is_undefined()) {
    throw Problem{
        "only a defined value has members, but this is " + type_name(object) +
        " and the template asks for '" + name.substr(0, 80) + "'"};
  }
  return Undefined{name};
}

}  // namespace

bool has_method(const Value& object, const std::string& name) {
  if (object.is_string()) return among(kStringMethods, name);
  if (object.is_list()) {
    return object.list().is_tuple ? among(kTupleMethods, name) : among(kListMethods, name);
  }
  return object.is_mapping() && among(kDictMethods, name);
}

Value Evaluator::attribute(const Value& object, const std::string& name) {
  if (object.is_loop()) return loop_attribute(*this, object, name);
  if (has_method(object, name)) {
    charge(sizeof(Callable) + sizeof(Value));
    auto method = std::make_shared<Callable>();
    method->name = name;
    method->self = std::make_shared<Value>(object);
    return method;
  }
  if (object.is_dict()) {
    if (const Value* found = object.dict().find(Value(name))) return *found;
  }
  return undefined_member(object, name);
}

Value Evaluator::subscript(const Value& object, const Value& key) {
  if (object.is_dict()) {
    if (const Value* found = object.dict().find(key)) return *found;
    return key.is_string() ? attribute(object, key.string()) : Value(Undefined{to_text(key)});
  }
  if (key.is_int() || key.is_bool()) {
    const int64_t index = key.integer();
    if (object.is_list()) {
      const auto size = static_cast<int64_t>(object.list().items.size());
      if (index < -size || index >= size) return Undefined{std::to_string(index)};
      return object.list().items[list_position(object.list(), index)];
    }
    if (object.is_string()) {
      step(object.string().size() / 64);
      const auto offsets = text_offsets(object.string());
      const auto size = static_cast<int64_t>(offsets.size()) - 1;
      if (index < -size || index >= size) return Undefined{std::to_string(index)};
      const size_t at = static_cast<size_t>(index < 0 ? index + size : index);
      return text(object.string().substr(offsets[at], offsets[at + 1] - offsets[at]));
    }
  }
  if (key.is_string()) return attribute(object, key.string());
  return undefined_member(object, to_text(key));
}

std::vector<Value> Evaluator::iterate(const Value& value) {
  std::vector<Value> items;
  if (value.is_list()) {
    items = value.list().items;
  } else if (value.is_mapping()) {
    for (const auto& [key, item] : value.dict().items()) items.push_back(key);
  } else if (value.is_string()) {
    const auto offsets = text_offsets(value.string());
    charge(offsets.size() * (sizeof(Value) + 32));
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      items.emplace_back(value.string().substr(offsets[i], offsets[i + 1] - offsets[i]));
    }
  } else if (!value.is_undefined()) {
    throw Problem{"only a list, mapping or string has items, but this is " + type_name(value)};
  }
  charge(items.size() * sizeof(Value));
  step(items.size() / 16);
  return items;
}

bool Evaluator::contains(const Value& container, const Value& item) {
  if (container.is_string()) {
    const std::string& part = string_of(item, "in");
    step(container.string().size() / 64);
    return container.string().find(part) != std::string::npos;
  }
  if (container.is_mapping()) return container.dict().find(item) != nullptr;
  if (container.is_undefined()) return false;
  if (!container.is_list()) {
    throw Problem{
        "\"in\" must look into a list, mapping or string but got " + type_name(container)};
  }
  return std::any_of(
      container.list().items.begin(), container.list().items.end(), [&](const Value& other) {
        step();
        return equal(other, item);
      });
}

Value Evaluator::call_method(
    const Value& object, const std::string& name, const Arguments& arguments) {
  if (object.is_string()) {
    step(object.string().size() / 64);
    return string_method(*this, object.string(), name, arguments);
  }
  if (object.is_list()) return list_method(*this, object, name, arguments);
  if (object.is_dict()) return dict_method(*this, object, name, arguments);
  return loop_method(*this, object, name, arguments);
}

std::string to_upper(const std::string& text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    pos += c.bytes;
    if (c.value == 0xDF) {
      out += "SS";
    } else {
      append_utf8(out, static_cast<char32_t>(utf8proc_toupper(static_cast<int32_t>(c.value))));
    }
  }
  return out;
}

std::string to_lower(const std::string& text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    pos += c.bytes;
    append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<int32_t>(c.value))));
  }
  return out;
}

std::string strip_text(const std::string& text, const Value* characters, bool left, bool right) {
  const bool given = characters && !characters->is_none();
  const std::string set = given ? to_text(*characters) : "";
  const auto drops = [&](size_t pos, uint32_t bytes) {
    if (given) return set.find(text.substr(pos, bytes)) != std::string::npos;
    const char32_t c = read_utf8(text, pos).value;
    return is_white_space(c) || (c >= 0x1C && c <= 0x1F);
  };
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    const uint32_t bytes = read_utf8(text, begin).bytes;
    if (!drops(begin, bytes)) break;
    begin += bytes;
  }
  while (right && end > begin) {
    size_t last = end - 1;
    while (last > begin && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!drops(last, static_cast<uint32_t>(end - last))) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

std::string replace_text(
    const std::string& text,
    const std::string& from,
    const std::string& to,
    int64_t count,
    size_t limit) {
  std::string out;
  size_t done = 0;
  // An empty pattern matches before every character and at the end.
  for (size_t at = 0; count != 0 && at <= text.size(); --count) {
    at = text.find(from, at);
    if (at == std::string::npos) break;
    out.append(text, done, at - done);
    out += to;
    done = at + from.size();
    at = done;
    if (from.empty()) at += at < text.size() ? read_utf8(text, at).bytes : 1;
    if (out.size() > limit)
      throw Problem{"replace must stay within the output limit but exceeds it"};
  }
  out.append(text, std::min(done, text.size()));
  return out;
}

std::string format_percent(const std::string& format, const std::vector<Value>& values) {
  std::string out;
  size_t used = 0;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    const char kind = i + 1 < format.size() ? format[++i] : ' ';
    if (kind == '%') {
      out += '%';
      continue;
    }
    if (used >= values.size()) throw Problem{"\"%\" must get a value for each field but got fewer"};
    const Value& value = values[used++];
    if (kind == 's') {
      out += to_text(value);
    } else if (kind == 'r') {
      out += to_repr(value);
    } else if (kind == 'd' && value.is_number() && std::fabs(value.real()) < 9e15) {
      out += std::to_string(value.is_real() ? static_cast<int64_t>(value.real()) : value.integer());
    } else if (kind == 'f' && value.is_number() && std::fabs(value.real()) < 1e30) {
      char buffer[64];
      std::snprintf(buffer, sizeof buffer, "%f", value.real());
      out += buffer;
    } else {
      throw Problem{std::string("\"%\" must have fields %s, %d, %r or %f but has %") + kind};
    }
  }
  if (used < values.size()) throw Problem{"\"%\" must use every value but does not"};
  return out;
}

}  // namespace metal_lora::text::jinja
