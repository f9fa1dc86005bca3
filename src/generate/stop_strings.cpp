// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace metal_lora {

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    if (stop.empty()) {
      throw Error(ErrorCode::invalid_input, "[generate] a stop string must hold text but is empty");
    }
  }
}

std::string StopStrings::push(std::string_view piece) {
  if (stopped_) return {};
  held_ += piece;
  // The one that is complete first ends the text, the longest of those: so the result does not
  // depend on how the text was cut into pieces.
  constexpr size_t kNone = std::string::npos;
  size_t end = kNone, begin = kNone;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == kNone || at + stop.size() > end) continue;
    begin = at + stop.size() < end ? at : std::min(begin, at);
    end = at + stop.size();
  }
  if (end != kNone) {
    stopped_ = true;
    std::string text = held_.substr(0, begin);
    held_.clear();
    return text;
  }
  // The longest end of the text that begins a stop string stays back.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(stop.size() - 1, held_.size()); length > keep; --length) {
      if (std::string_view(held_).ends_with(std::string_view(stop).substr(0, length)))
        keep = length;
    }
  }
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return text;
}

std::string StopStrings::flush() {
  return std::exchange(held_, {});
}

}  // namespace metal_lora
