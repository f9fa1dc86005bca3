// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "src/text/utf8.h"

namespace metal_lora::text::jinja {

namespace {

constexpr int kMaxDepth = 128;

void check_depth(int depth) {
  if (depth > kMaxDepth) throw Problem{"a value must be at most 128 levels deep but is deeper"};
}

// repr() of a float: the shortest digits that read back, exponents as Python writes them.
std::string real_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  const std::string text(buffer, end.ptr);
  const size_t e = text.find('e');
  const int exponent = std::atoi(text.c_str() + e + 1);
  const bool negative = text[0] == '-';
  std::string digits;
  for (const char c : text.substr(negative, e - negative)) {
    if (c != '.') digits += c;
  }
  std::string out = negative ? "-" : "";
  const int n = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    out += digits[0];
    if (n > 1) out += "." + digits.substr(1);
    char tail[16];
    std::snprintf(tail, sizeof tail, "e%c%02d", exponent < 0 ? '-' : '+', std::abs(exponent));
    return out + tail;
  }
  if (exponent < 0) return out + "0." + std::string(-exponent - 1, '0') + digits;
  if (n <= exponent + 1) return out + digits + std::string(exponent + 1 - n, '0') + ".0";
  return out + digits.substr(0, exponent + 1) + "." + digits.substr(exponent + 1);
}

std::string string_repr(const std::string& text) {
  const bool doubles = text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
  const char quote = doubles ? '"' : '\'';
  std::string out(1, quote);
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (u < 0x20 || u == 0x7F) {
      char hex[8];
      std::snprintf(hex, sizeof hex, "\\x%02x", u);
      out += hex;
    } else {
      out += c;
    }
  }
  return out + quote;
}

void json_string(const std::string& text, bool ascii, std::string& out) {
  out += '"';
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    char buffer[16];
    switch (c.value) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (c.value < 0x20 || (ascii && c.value > 0x7E && c.value < 0x10000)) {
          std::snprintf(buffer, sizeof buffer, "\\u%04x", static_cast<unsigned>(c.value));
          out += c.value == 0x7F ? "\x7F" : buffer;
        } else if (ascii && c.value >= 0x10000) {
          const unsigned v = c.value - 0x10000;
          std::snprintf(
              buffer, sizeof buffer, "\\u%04x\\u%04x", 0xD800 + (v >> 10), 0xDC00 + (v & 0x3FF));
          out += buffer;
        } else {
          append_utf8(out, c.value);
        }
    }
    pos += c.bytes;
  }
  out += '"';
}

struct JsonWriter {
  const JsonStyle& style;
  size_t limit;
  std::string out;

  void line(int depth) {
    if (style.indent < 0) return;
    out += '\n';
    out.append(static_cast<size_t>(depth) * style.indent, ' ');
  }

  static std::string key_text(const Value& key) {
    if (key.is_string()) return key.string();
    if (key.is_none()) return "null";
    if (key.is_bool()) return std::get<bool>(key.data) ? "true" : "false";
    return to_text(key);
  }

  void separator() {
    // With an indent, Python drops the space that would end the line.
    out += style.indent >= 0 && style.item_separator == ", " ? "," : style.item_separator;
  }

  void dict(const Dict& dict, int depth) {
    if (dict.items().empty()) {
      out += "{}";
      return;
    }
    auto items = dict.items();
    if (style.sort_keys) {
      std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) {
        return compare(a.first, b.first) < 0;
      });
    }
    out += '{';
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) separator();
      line(depth + 1);
      json_string(key_text(items[i].first), style.ensure_ascii, out);
      out += style.key_separator;
      write(items[i].second, depth + 1);
    }
    line(depth);
    out += '}';
  }

  void write(const Value& value, int depth) {
    check_depth(depth);
    if (out.size() > limit) throw Problem{"JSON must stay within the output limit but exceeds it"};
    if (value.is_none()) {
      out += "null";
    } else if (value.is_bool()) {
      out += std::get<bool>(value.data) ? "true" : "false";
    } else if (value.is_int()) {
      out += std::to_string(value.integer());
    } else if (value.is_real()) {
      const double d = value.real();
      out += std::isnan(d)   ? "NaN"
             : std::isinf(d) ? (d > 0 ? "Infinity" : "-Infinity")
                             : real_text(d);
    } else if (value.is_string()) {
      json_string(value.string(), style.ensure_ascii, out);
    } else if (value.is_mapping()) {
      dict(value.dict(), depth);
    } else if (value.is_list()) {
      const auto& items = value.list().items;
      if (items.empty()) {
        out += "[]";
        return;
      }
      out += '[';
      for (size_t i = 0; i < items.size(); ++i) {
        if (i > 0) separator();
        line(depth + 1);
        write(items[i], depth + 1);
      }
      line(depth);
      out += ']';
    } else {
      throw Problem{"tojson must get a JSON value but got " + type_name(value)};
    }
  }
};

}  // namespace

std::string Dict::spelling(const Value& key) {
  if (key.is_string()) return "s" + key.string();
  if (key.is_none()) return "n";
  if (key.is_int() || key.is_bool()) return "i" + std::to_string(key.integer());
  if (key.is_real()) {
    const double d = key.real();
    return std::floor(d) == d && std::fabs(d) < 9e15 ? "i" + std::to_string(static_cast<int64_t>(d))
                                                     : "r" + real_text(d);
  }
  throw Problem{"a key must be a string or a number but is " + type_name(key)};
}

Value* Dict::find(const Value& key) {
  if (key.is_list() || key.is_dict() || key.is_undefined() || key.is_callable() || key.is_loop()) {
    return nullptr;
  }
  const auto it = index_.find(spelling(key));
  return it == index_.end() ? nullptr : &items_[it->second].second;
}

void Dict::set(const Value& key, Value value) {
  const auto [it, fresh] = index_.try_emplace(spelling(key), items_.size());
  if (fresh) {
    items_.emplace_back(key, std::move(value));
  } else {
    items_[it->second].second = std::move(value);
  }
}

bool Dict::erase(const Value& key) {
  const auto it = index_.find(spelling(key));
  if (it == index_.end()) return false;
  const size_t at = it->second;
  index_.erase(it);
  items_.erase(items_.begin() + static_cast<std::ptrdiff_t>(at));
  for (auto& [name, position] : index_) {
    if (position > at) --position;
  }
  return true;
}

void Dict::clear() {
  items_.clear();
  index_.clear();
}

bool truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (value.is_bool() || value.is_int()) return value.integer() != 0;
  if (value.is_real()) return value.real() != 0;
  if (value.is_string()) return !value.string().empty();
  if (value.is_list()) return !value.list().items.empty();
  if (value.is_mapping()) return !value.dict().items().empty();
  return true;
}

bool equal(const Value& a, const Value& b, int depth) {
  check_depth(depth);
  if (a.is_number() && b.is_number()) {
    return a.is_real() || b.is_real() ? a.real() == b.real() : a.integer() == b.integer();
  }
  if (a.data.index() != b.data.index()) return false;
  if (a.is_string()) return a.string() == b.string();
  if (a.is_list()) {
    const auto &x = a.list(), &y = b.list();
    return x.is_tuple == y.is_tuple &&
           std::equal(
               x.items.begin(),
               x.items.end(),
               y.items.begin(),
               y.items.end(),
               [&](auto& p, auto& q) { return equal(p, q, depth + 1); });
  }
  if (a.is_dict()) {
    const Dict &x = a.dict(), &y = b.dict();
    if (&x == &y) return true;
    if (x.is_namespace || y.is_namespace || x.items().size() != y.items().size()) return false;
    return std::all_of(x.items().begin(), x.items().end(), [&](const auto& item) {
      const Value* other = y.find(item.first);
      return other && equal(item.second, *other, depth + 1);
    });
  }
  if (a.is_callable()) return &a.callable() == &b.callable();
  if (a.is_loop()) return &a.loop() == &b.loop();
  return true;  // two None, or two undefined
}

int compare(const Value& a, const Value& b, int depth) {
  check_depth(depth);
  const auto order = [](const auto& x, const auto& y) { return x < y ? -1 : y < x ? 1 : 0; };
  if (a.is_number() && b.is_number()) {
    return a.is_real() || b.is_real() ? order(a.real(), b.real()) : order(a.integer(), b.integer());
  }
  if (a.is_string() && b.is_string()) return order(a.string(), b.string());
  if (a.is_list() && b.is_list() && a.list().is_tuple == b.list().is_tuple) {
    const auto &x = a.list().items, &y = b.list().items;
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (!equal(x[i], y[i], depth + 1)) return compare(x[i], y[i], depth + 1);
    }
    return order(x.size(), y.size());
  }
  throw Problem{"values must have an order but are " + type_name(a) + " and " + type_name(b)};
}

std::string type_name(const Value& value) {
  if (value.is_undefined()) {
    const std::string& name = std::get<Undefined>(value.data).name;
    return name.empty() ? "undefined" : "undefined ('" + name.substr(0, 80) + "')";
  }
  if (value.is_none()) return "None";
  if (value.is_bool()) return "a boolean";
  if (value.is_int()) return "an integer";
  if (value.is_real()) return "a float";
  if (value.is_string()) return "a string";
  if (value.is_list()) return value.list().is_tuple ? "a tuple" : "a list";
  if (value.is_dict()) return value.dict().is_namespace ? "a namespace" : "a mapping";
  return value.is_loop() ? "the loop" : "a function";
}

std::string to_text(const Value& value) {
  return value.is_string() ? value.string() : value.is_undefined() ? "" : to_repr(value);
}

std::string to_repr(const Value& value, int depth) {
  check_depth(depth);
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "None";
  if (value.is_bool()) return std::get<bool>(value.data) ? "True" : "False";
  if (value.is_int()) return std::to_string(value.integer());
  if (value.is_real()) return real_text(value.real());
  if (value.is_string()) return string_repr(value.string());
  if (value.is_list()) {
    const List& list = value.list();
    std::string out = list.is_tuple ? "(" : "[";
    for (size_t i = 0; i < list.items.size(); ++i) {
      out += (i > 0 ? ", " : "") + to_repr(list.items[i], depth + 1);
    }
    if (list.is_tuple && list.items.size() == 1) out += ",";
    return out + (list.is_tuple ? ")" : "]");
  }
  if (value.is_mapping()) {
    std::string out = "{";
    for (const auto& [key, item] : value.dict().items()) {
      out +=
          (out.size() > 1 ? ", " : "") + to_repr(key, depth + 1) + ": " + to_repr(item, depth + 1);
    }
    return out + "}";
  }
  throw Problem{type_name(value) + " must not be printed but is"};
}

std::string to_json(const Value& value, const JsonStyle& style, size_t limit) {
  JsonWriter writer{style, limit, {}};
  writer.write(value, 0);
  return std::move(writer.out);
}

Value from_json(const nlohmann::ordered_json& json, int depth) {
  check_depth(depth);
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::boolean:
      return json.get<bool>();
    case nlohmann::ordered_json::value_t::number_integer:
      return json.get<int64_t>();
    case nlohmann::ordered_json::value_t::number_unsigned:
      if (json.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)) return json.get<int64_t>();
      return static_cast<double>(json.get<uint64_t>());
    case nlohmann::ordered_json::value_t::number_float:
      return json.get<double>();
    case nlohmann::ordered_json::value_t::string: {
      const auto& text = json.get_ref<const std::string&>();
      return is_valid_utf8(text) ? text : replace_invalid_utf8(text);
    }
    case nlohmann::ordered_json::value_t::array: {
      auto list = std::make_shared<List>();
      for (const auto& item : json) list->items.push_back(from_json(item, depth + 1));
      return list;
    }
    case nlohmann::ordered_json::value_t::object: {
      auto dict = std::make_shared<Dict>();
      for (const auto& [key, item] : json.items()) dict->set(key, from_json(item, depth + 1));
      return dict;
    }
    default:
      return None{};
  }
}

size_t text_length(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

std::vector<uint32_t> text_offsets(std::string_view text) {
  std::vector<uint32_t> offsets;
  for (size_t pos = 0; pos < text.size(); pos += read_utf8(text, pos).bytes) {
    offsets.push_back(static_cast<uint32_t>(pos));
  }
  offsets.push_back(static_cast<uint32_t>(text.size()));
  return offsets;
}

}  // namespace metal_lora::text::jinja
