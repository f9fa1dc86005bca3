// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/json.h"
#include "src/io/mapped_file.h"
#include "src/io/result.h"

namespace metal_lora::io {

inline constexpr uint64_t kJsonlMaxLineBytes = uint64_t{16} << 20;

/// One row: a line that is not blank, without its end.
struct JsonlRow {
  std::string_view text;     ///< into the mapping
  uint64_t line_number = 0;  ///< 1-based, blank lines counted: what an editor shows
  uint64_t offset = 0;       ///< of the text in the file
};

/// A JSON-lines file, mapped and split into rows; 24 bytes per row, text stays in the mapping.
/// Lines end in LF or CRLF; blank lines and a UTF-8 byte order mark are skipped. Immutable: rows
/// may be parsed from several threads.
class JsonlFile {
 public:
  /// Fails on a line over kJsonlMaxLineBytes, naming it. An empty file has no rows.
  static Result<JsonlFile> open(const std::string& path);
  static Result<JsonlFile> open(std::shared_ptr<const MappedFile> file);

  const std::string& path() const { return file_->path(); }
  uint64_t size() const { return rows_.size(); }
  /// `index` < size().
  JsonlRow row(uint64_t index) const;

  /// Row `index` as JSON. Failures give line number and byte offset; invalid UTF-8 is refused.
  Result<Json> parse(uint64_t index, const JsonLimits& limits = default_limits()) const;

  /// A failure about a row, for checks of its content: "[path at byte 120, line 3: field] …".
  Failure failure(
      uint64_t index, const std::string& field, std::string expected, std::string got) const;

  static JsonLimits default_limits() { return {kJsonlMaxLineBytes, 64, true}; }

 private:
  struct Span {
    uint64_t offset;
    uint64_t line_number;
    uint32_t bytes;
  };
  std::shared_ptr<const MappedFile> file_;
  std::vector<Span> rows_;
};

}  // namespace metal_lora::io
