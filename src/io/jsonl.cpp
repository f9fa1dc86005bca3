// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/jsonl.h"

#include <fmt/format.h>

#include <cstring>

namespace metal_lora::io {
namespace {

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

}  // namespace

Result<JsonlFile> JsonlFile::open(const std::string& path) {
  auto file = MappedFile::open(path);
  if (!file) return std::move(file).error();
  return open(std::move(*file));
}

Result<JsonlFile> JsonlFile::open(std::shared_ptr<const MappedFile> file) {
  const auto bytes = file->bytes();
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  JsonlFile result;
  uint64_t at = text.starts_with("\xef\xbb\xbf") ? 3 : 0;
  for (uint64_t line_number = 1; at < text.size(); ++line_number) {
    const void* newline = std::memchr(text.data() + at, '\n', text.size() - at);
    const uint64_t end =
        newline == nullptr ? text.size()
                           : static_cast<uint64_t>(static_cast<const char*>(newline) - text.data());
    std::string_view line = text.substr(at, end - at);
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.size() > kJsonlMaxLineBytes) {
      return Failure{
          ErrorCode::invalid_input,
          file->path(),
          at,
          fmt::format("line {}", line_number),
          fmt::format("at most {} bytes long", kJsonlMaxLineBytes),
          std::to_string(line.size()),
          "a .jsonl file has one JSON object on each line"};
    }
    if (!is_blank(line)) {
      result.rows_.push_back({at, line_number, static_cast<uint32_t>(line.size())});
    }
    at = end + 1;
  }
  result.file_ = std::move(file);
  return result;
}

JsonlRow JsonlFile::row(uint64_t index) const {
  const Span& span = rows_[index];
  const char* data = reinterpret_cast<const char*>(file_->bytes().data()) + span.offset;
  return {{data, span.bytes}, span.line_number, span.offset};
}

Result<Json> JsonlFile::parse(uint64_t index, const JsonLimits& limits) const {
  const JsonlRow line = row(index);
  auto parsed = parse_json(line.text, path(), limits, line.offset);
  if (parsed) return parsed;
  Failure failure = std::move(parsed).error();
  if (!failure.offset) failure.offset = line.offset;
  failure.field = fmt::format(
      "line {}{}{}", line.line_number, failure.field.empty() ? "" : ": ", failure.field);
  return failure;
}

Failure JsonlFile::failure(
    uint64_t index, const std::string& field, std::string expected, std::string got) const {
  const Span& span = rows_[index];
  return Failure{
      ErrorCode::invalid_input,
      path(),
      span.offset,
      fmt::format("line {}{}{}", span.line_number, field.empty() ? "" : ": ", field),
      std::move(expected),
      std::move(got),
      ""};
}

}  // namespace metal_lora::io
