// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/console.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <fmt/format.h>

#include "metal_lora/error.h"

namespace metal_lora::cli {

Console::Console()
    : stdout_is_terminal_(isatty(STDOUT_FILENO) == 1),
      stderr_is_terminal_(isatty(STDERR_FILENO) == 1) {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  colours_ = (no_color == nullptr || *no_color == '\0') &&
             (term == nullptr || std::strcmp(term, "dumb") != 0);
}

void Console::write_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0) {
    return;
  }
  if (errno == EPIPE) throw OutputClosed{};
  throw Error(
      ErrorCode::io, fmt::format("[stdout] must be writable but is not: {}", std::strerror(errno)));
}

void Console::emit(const nlohmann::ordered_json& object) {
  if (!json) return;
  clear_progress();
  // Invalid UTF-8 (a path, half a character of a model) becomes U+FFFD instead of an exception.
  write_stdout(
      object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

void Console::print(std::string_view text) {
  clear_progress();
  if (!json) return write_stdout(text);
  if (!quiet) std::fwrite(text.data(), 1, text.size(), stderr);
}

void Console::line(std::string_view text) {
  print(std::string(text) + "\n");
}

void Console::note(std::string_view text) {
  if (quiet) return;
  clear_progress();
  std::fprintf(stderr, "%.*s\n", static_cast<int>(text.size()), text.data());
}

void Console::warn(std::string_view text) {
  clear_progress();
  std::fprintf(stderr, "warning: %.*s\n", static_cast<int>(text.size()), text.data());
}

void Console::progress(std::string_view text) {
  if (!stderr_is_terminal_ || quiet) return;
  std::fprintf(stderr, "\r%.*s\x1b[K", static_cast<int>(text.size()), text.data());
  std::fflush(stderr);
  progress_shown_ = true;
}

void Console::clear_progress() {
  if (!progress_shown_) return;
  std::fprintf(stderr, "\r\x1b[K");
  std::fflush(stderr);
  progress_shown_ = false;
}

std::string Console::styled(std::string_view text, const char* code) const {
  const bool terminal = json ? stderr_is_terminal_ : stdout_is_terminal_;
  if (!terminal || !colours_) return std::string(text);
  return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
}
std::string Console::bold(std::string_view text) const {
  return styled(text, "1");
}
std::string Console::dim(std::string_view text) const {
  return styled(text, "2");
}

std::string progress_bar(double fraction, int width) {
  const double clamped = std::isfinite(fraction) ? std::clamp(fraction, 0.0, 1.0) : 0.0;
  const int full = static_cast<int>(clamped * width);
  std::string bar(static_cast<size_t>(width), ' ');
  std::fill(bar.begin(), bar.begin() + full, '#');
  if (full < width) bar[static_cast<size_t>(full)] = '>';
  return "[" + bar + "]";
}

std::string sparkline(const std::vector<double>& values, int width) {
  static constexpr const char* kHeights[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  if (values.empty() || width <= 0) return {};
  const size_t cells = std::min(values.size(), static_cast<size_t>(width));
  std::vector<double> means;
  for (size_t cell = 0; cell < cells; ++cell) {
    const size_t begin = cell * values.size() / cells, end = (cell + 1) * values.size() / cells;
    double sum = 0.0;
    for (size_t i = begin; i < end; ++i) sum += values[i];
    means.push_back(sum / static_cast<double>(end - begin));
  }
  double low = INFINITY, high = -INFINITY;
  for (const double mean : means) {
    if (!std::isfinite(mean)) continue;
    low = std::min(low, mean);
    high = std::max(high, mean);
  }
  std::string text;
  for (const double mean : means) {
    const double height = high > low ? (mean - low) / (high - low) : 0.0;
    // A loss that is not finite stands out at the top.
    text += kHeights[std::isfinite(mean) ? std::clamp(static_cast<int>(height * 7.999), 0, 7) : 7];
  }
  return text;
}

std::string format_bytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) {
    bytes /= 1000;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", bytes, bytes < 10 && unit > 0 ? 2 : 0, kUnits[unit]);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto total = static_cast<int64_t>(seconds + 0.5);
  if (total < 60) return fmt::format("{} s", total);
  if (total < 3600) return fmt::format("{}:{:02}", total / 60, total % 60);
  return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
}

}  // namespace metal_lora::cli
