// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Where output goes. Plain: results on stdout, progress and warnings on stderr. With --json: one
// JSON object a line on stdout, everything for people on stderr.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace metal_lora::cli {

/// Thrown when the reader of stdout has gone (`metal-lora … | head`): the program ends quietly.
struct OutputClosed {};

class Console {
 public:
  Console();

  bool json = false;
  bool quiet = false;

  /// One line for programs; nothing without --json. Flushed at once.
  void emit(const nlohmann::ordered_json& object);
  /// Text for people: stdout, or stderr with --json.
  void print(std::string_view text);
  void line(std::string_view text);
  /// To stderr, unless --quiet.
  void note(std::string_view text);
  void warn(std::string_view text);

  /// A line on stderr that the next one replaces; nothing unless stderr is a terminal.
  void progress(std::string_view text);
  void clear_progress();

  bool stdout_is_terminal() const { return stdout_is_terminal_; }
  bool stderr_is_terminal() const { return stderr_is_terminal_; }
  /// "\x1b[…m" around text where colours belong (a terminal, NO_COLOR unset), else the text.
  std::string bold(std::string_view text) const;
  std::string dim(std::string_view text) const;

 private:
  void write_stdout(std::string_view text);
  std::string styled(std::string_view text, const char* code) const;

  bool stdout_is_terminal_, stderr_is_terminal_, colours_;
  bool progress_shown_ = false;
};

/// "[#########>          ] " of `width` cells.
std::string progress_bar(double fraction, int width);
/// A curve in one line: eight heights of block characters, resampled to at most `width` of them.
std::string sparkline(const std::vector<double>& values, int width);
/// "1.2 GB", "34 MB", "512 B" (decimal units).
std::string format_bytes(double bytes);
/// "1:02:03", "4:05", "12 s".
std::string format_duration(double seconds);

}  // namespace metal_lora::cli
