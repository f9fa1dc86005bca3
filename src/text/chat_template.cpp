// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/chat_template.h"

#include <cstdio>
#include <ctime>
#include <system_error>

#include "metal_lora/error.h"
#include "src/io/gguf.h"
#include "src/io/json.h"
#include "src/io/mapped_file.h"
#include "src/text/jinja_eval.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;

// Days since 1970-01-01 of the proleptic Gregorian calendar (Hinnant, "chrono-compatible low-level
// date algorithms").
int64_t days_from_civil(int64_t y, int m, int d) {
  y -= m <= 2;
  const int64_t era = (y >= 0 ? y : y - 399) / 400;
  const int64_t yoe = y - era * 400;
  const int64_t doy = (153 * (m + (m > 2 ? -3 : 9)) + 2) / 5 + d - 1;
  return era * 146097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719468;
}

// tokenizer_config.json has one template, or a list of {"name", "template"}.
std::optional<std::string> choose(
    const io::Json& value, const std::string& name, const std::string& where) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return value.get<std::string>();
  std::optional<std::string> found;
  if (value.is_array()) {
    for (const auto& item : value) {
      const bool named = item.is_object() && item.contains("name") && item.contains("template") &&
                         item["name"].is_string() && item["template"].is_string();
      if (named && item["name"].get<std::string>() == name)
        return item["template"].get<std::string>();
    }
  }
  throw Error(
      ErrorCode::invalid_input,
      "[" + where + ", chat_template] must be a template or a list with one named \"" + name +
          "\" but is " + io::describe_json(&value));
}

}  // namespace

CalendarTime CalendarTime::now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm local{};
  localtime_r(&seconds, &local);
  return {
      local.tm_year + 1900,
      local.tm_mon + 1,
      local.tm_mday,
      local.tm_hour,
      local.tm_min,
      local.tm_sec};
}

namespace jinja {

std::string format_time(const CalendarTime& t, const std::string& format) {
  static constexpr const char* kMonths[] = {
      "January",
      "February",
      "March",
      "April",
      "May",
      "June",
      "July",
      "August",
      "September",
      "October",
      "November",
      "December"};
  static constexpr const char* kDays[] = {
      "Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"};
  const int64_t days = days_from_civil(t.year, t.month, t.day);
  const char* month = kMonths[(t.month + 11) % 12];
  const char* day = kDays[((days + 4) % 7 + 7) % 7];
  const auto number = [](int value, int width) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, "%0*d", width, value);
    return std::string(buffer);
  };
  std::string out;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%' || i + 1 == format.size()) {
      out += format[i];
      continue;
    }
    const bool unpadded = format[i + 1] == '-' && i + 2 < format.size();
    i += unpadded ? 2 : 1;
    const int two = unpadded ? 1 : 2;
    switch (format[i]) {
      case 'Y':
        out += number(t.year, 4);
        break;
      case 'y':
        out += number(t.year % 100, 2);
        break;
      case 'm':
        out += number(t.month, two);
        break;
      case 'd':
        out += number(t.day, two);
        break;
      case 'e':
        out += t.day < 10 ? " " + number(t.day, 1) : number(t.day, 2);
        break;
      case 'H':
        out += number(t.hour, two);
        break;
      case 'I':
        out += number((t.hour + 11) % 12 + 1, two);
        break;
      case 'M':
        out += number(t.minute, two);
        break;
      case 'S':
        out += number(t.second, two);
        break;
      case 'p':
        out += t.hour < 12 ? "AM" : "PM";
        break;
      case 'B':
        out += month;
        break;
      case 'b':
        out.append(month, 3);
        break;
      case 'A':
        out += day;
        break;
      case 'a':
        out.append(day, 3);
        break;
      case 'j':
        out += number(static_cast<int>(days - days_from_civil(t.year, 1, 1)) + 1, unpadded ? 1 : 3);
        break;
      case 'F':
        out += number(t.year, 4) + "-" + number(t.month, 2) + "-" + number(t.day, 2);
        break;
      case 'T':
        out += number(t.hour, 2) + ":" + number(t.minute, 2) + ":" + number(t.second, 2);
        break;
      case '%':
        out += '%';
        break;
      default:
        throw Problem{std::string("strftime_now must have fields it knows but has %") + format[i]};
    }
  }
  return out;
}

}  // namespace jinja

ChatTemplate::ChatTemplate(const std::string& source) : source_(source) {
  const size_t limit = RenderLimits{}.template_bytes;
  if (source.size() > limit) {
    throw Error(
        ErrorCode::invalid_input,
        "[chat template] must have at most " + std::to_string(limit) + " bytes but has " +
            std::to_string(source.size()));
  }
  program_ = jinja::parse(is_valid_utf8(source) ? source : replace_invalid_utf8(source));
}

std::optional<ChatTemplate> ChatTemplate::from_gguf(const io::GgufFile& file) {
  if (!file.has("tokenizer.chat_template")) return std::nullopt;
  return ChatTemplate(std::string(io::unwrap(file.get_string("tokenizer.chat_template"))));
}

std::optional<ChatTemplate> ChatTemplate::from_path(
    const std::filesystem::path& model_path, const std::string& name) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(model_path, ignored)) {
    return from_gguf(io::unwrap(io::read_gguf(model_path.string())));
  }
  const auto jinja_file = model_path / "chat_template.jinja";
  if (std::filesystem::exists(jinja_file, ignored)) {
    const auto file = io::unwrap(io::MappedFile::open(jinja_file.string()));
    const auto bytes = file->bytes();
    return ChatTemplate(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  const auto config_file = model_path / "tokenizer_config.json";
  if (!std::filesystem::exists(config_file, ignored)) return std::nullopt;
  const io::Json config =
      io::unwrap(io::read_json_file(config_file.string(), {.max_bytes = kMaxConfigBytes}));
  if (!config.is_object() || !config.contains("chat_template")) return std::nullopt;
  const auto source = choose(config["chat_template"], name, config_file.string());
  return source ? std::optional<ChatTemplate>(*source) : std::nullopt;
}

std::string ChatTemplate::render(
    const nlohmann::ordered_json& messages, const ChatOptions& options) const {
  if (!messages.is_array()) {
    throw Error(
        ErrorCode::invalid_input,
        std::string("[chat template] messages must be an array but are ") + messages.type_name());
  }
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  variables["messages"] = messages;
  variables["tools"] = options.tools;
  variables["documents"] = nullptr;
  variables["add_generation_prompt"] = options.add_generation_prompt;
  if (!options.bos_token.empty()) variables["bos_token"] = options.bos_token;
  if (!options.eos_token.empty()) variables["eos_token"] = options.eos_token;
  if (options.extra.is_object()) {
    for (const auto& [name, value] : options.extra.items()) variables[name] = value;
  }
  return render_variables(variables, options.limits, options.date);
}

std::string ChatTemplate::render_variables(
    const nlohmann::ordered_json& variables,
    const RenderLimits& limits,
    const std::optional<CalendarTime>& date) const {
  const CalendarTime time = date.value_or(CalendarTime::now());
  jinja::Evaluator evaluator(limits, time);
  return evaluator.render(*program_, variables);
}

}  // namespace metal_lora::text
