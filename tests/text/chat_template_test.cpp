// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "metal_lora/error.h"

namespace metal_lora::text {
namespace {

using Json = nlohmann::ordered_json;
using ::testing::HasSubstr;

std::string render(const std::string& source, const Json& variables = Json::object()) {
  return ChatTemplate(source).render_variables(variables, {}, CalendarTime{2026, 11, 23, 4, 5, 6});
}

std::string error_of(const std::string& source, const RenderLimits& limits = {}) {
  try {
    ChatTemplate(source).render_variables(Json::object(), limits, CalendarTime{});
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ChatTemplate, RendersChatMl) {
  const ChatTemplate chat(
      "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>' + "
      "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif "
      "%}");
  ChatOptions options;
  options.add_generation_prompt = true;
  EXPECT_EQ(
      chat.render(Json::parse(R"([{"role":"user","content":"hi"}])"), options),
      "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, BlocksTakeTheirLine) {
  EXPECT_EQ(render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n"), "a\n  b\nc");
  EXPECT_EQ(render("a\n  {%- if true -%}\n  b  {%+ endif %}"), "ab  ");
}

TEST(ChatTemplate, MissingOptionsAreNotInvented) {
  const ChatTemplate chat("{{ bos_token is defined }}{{ tools is none }}");
  EXPECT_EQ(chat.render(Json::array()), "FalseTrue");
  EXPECT_THROW(chat.render(Json::object()), Error);
}

TEST(ChatTemplate, ErrorsNameTheLine) {
  EXPECT_THAT(error_of("a\n{{ x.y }}"), HasSubstr("line 2"));
  EXPECT_THAT(error_of("\n\n{{ raise_exception('no tools') }}"), HasSubstr("no tools"));
  EXPECT_THAT(error_of("{% if true %}"), HasSubstr("endif"));
  EXPECT_THAT(error_of("{{ 1 | nothing }}"), HasSubstr("\"nothing\""));
  EXPECT_THAT(error_of("{% include 'x' %}"), HasSubstr("\"include\""));
}

TEST(ChatTemplate, PythonObjectsAreOutOfReach) {
  EXPECT_EQ(render("{{ ''.__class__ is defined }}{{ raise_exception.__globals__ }}"), "False");
}

TEST(ChatTemplate, LoopingStops) {
  EXPECT_THAT(
      error_of("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
      HasSubstr("at most"));
  EXPECT_THAT(error_of("{{ range(9999999999999)|length }}"), HasSubstr("at most"));
  EXPECT_THAT(
      error_of("{% set l = [1] %}{% for i in l %}{% set _ = l.extend(l) %}{% endfor %}"
               "{% for i in range(99) %}{% set _ = l.extend(l) %}{% endfor %}"),
      HasSubstr("at most"));
}

TEST(ChatTemplate, DoublingStops) {
  EXPECT_THAT(
      error_of("{% set n = namespace(s='xxxxxxxx') %}{% for i in range(64) %}"
               "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"),
      HasSubstr("at most"));
  EXPECT_THAT(error_of("{{ 'x' * 99999999999 }}"), HasSubstr("at most"));
  EXPECT_THAT(error_of("{{ ('x' * 99999).replace('x', 'y' * 99999) }}"), HasSubstr("limit"));
}

TEST(ChatTemplate, DepthStops) {
  EXPECT_THAT(error_of("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), HasSubstr("deeper"));
  EXPECT_THAT(
      error_of("{{ " + std::string(9999, '(') + "1" + std::string(9999, ')') + "}}"),
      HasSubstr("deeper"));
  EXPECT_THAT(error_of("{{ " + std::string(100000, '-') + "1 }}"), HasSubstr("deeper"));
  std::string blocks;
  for (int i = 0; i < 5000; ++i) blocks += "{% if true %}";
  EXPECT_THAT(error_of(blocks), HasSubstr("deeper"));
  std::string open, close;
  for (int i = 0; i < 150; ++i) {
    open += "{% if true %}";
    close += "{% endif %}";
  }
  const std::string macro = "{% macro m() %}" + open + "{{ m() }}" + close + "{% endmacro %}";
  EXPECT_THAT(error_of(macro + "{{ m() }}"), HasSubstr("deeper"));
  EXPECT_THAT(
      error_of("{% set l = [] %}{% set _ = l.append(l) %}{{ l }}"), HasSubstr("128 levels"));
}

TEST(ChatTemplate, OutputStops) {
  RenderLimits limits;
  limits.output_bytes = 10;
  EXPECT_THAT(error_of("{% for i in range(11) %}x{% endfor %}", limits), HasSubstr("10 bytes"));
  EXPECT_THROW(ChatTemplate(std::string((1 << 20) + 1, 'x')), Error);
}

TEST(ChatTemplate, DatesAreTheCallers) {
  EXPECT_EQ(render("{{ strftime_now('%A %d %B %Y %H:%M') }}"), "Monday 23 November 2026 04:05");
}

}  // namespace
}  // namespace metal_lora::text
