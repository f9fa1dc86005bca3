// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace metal_lora::io {
class GgufFile;
}

namespace metal_lora::text {

namespace jinja {
struct Program;  // src/text/jinja_ast.h
}

/// A template comes from a model file, so it is hostile until shown otherwise: past any of these
/// render() throws Error invalid_input.
struct RenderLimits {
  size_t template_bytes = 1 << 20;  ///< checked by the constructor against the default
  size_t output_bytes = 64 << 20;
  size_t memory_bytes = 256 << 20;  ///< bytes of all strings and containers ever made
  uint64_t steps = 20'000'000;      ///< expressions and statements evaluated
  size_t depth = 256;               ///< nesting of expressions, blocks and macro calls
};

/// A calendar moment for strftime_now; the caller passes it, so that rendering is repeatable.
struct CalendarTime {
  int year = 1970, month = 1, day = 1, hour = 0, minute = 0, second = 0;
  /// This machine's local time now.
  static CalendarTime now();
};

struct ChatOptions {
  nlohmann::ordered_json tools;  ///< array of tool schemas; null: none
  bool add_generation_prompt = false;
  std::string bos_token, eos_token;
  nlohmann::ordered_json extra;      ///< object of further variables (enable_thinking …); or null
  std::optional<CalendarTime> date;  ///< absent: now
  RenderLimits limits;
};

/// A chat template in the subset of Jinja that Hugging Face templates use, rendered as
/// `transformers` renders it (trim_blocks and lstrip_blocks on). It sees JSON values only: no
/// files, no attributes of objects, no code. Immutable; render() may run in many threads at once.
class ChatTemplate {
 public:
  /// Throws Error invalid_input with the template's line for a syntax error, unsupported by name
  /// for a filter, test or statement outside the subset.
  explicit ChatTemplate(const std::string& source);

  /// The template of a Hugging Face folder (chat_template.jinja, else tokenizer_config.json) or of
  /// a .gguf file; nullopt where the model has none. Of several named ones, `name` is taken.
  static std::optional<ChatTemplate> from_path(
      const std::filesystem::path& model_path, const std::string& name = "default");
  static std::optional<ChatTemplate> from_gguf(const io::GgufFile& file);

  /// The prompt for `messages`, an array of {"role", "content", …}. Throws Error invalid_input with
  /// the line: raise_exception, a wrong type, or a limit.
  std::string render(const nlohmann::ordered_json& messages, const ChatOptions& options = {}) const;

  /// Renders with exactly these variables (an object), and nothing added.
  std::string render_variables(
      const nlohmann::ordered_json& variables,
      const RenderLimits& limits = {},
      const std::optional<CalendarTime>& date = std::nullopt) const;

  const std::string& source() const { return source_; }

 private:
  std::string source_;
  std::shared_ptr<const jinja::Program> program_;
};

}  // namespace metal_lora::text
