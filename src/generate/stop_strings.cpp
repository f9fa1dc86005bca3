// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace metal_lora {

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    if (stop.empty()) {
      throw Error(
          ErrorCode::invalid_input, "[generate] a stop string must hold text but is empty");
    }
  }
}

std::string StopStrings::push(std::string_view piece) {
  if (stopped_) return {};
  held_ += piece;
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) first = std::min(first, held_.find(stop));
  if (first != std::string::npos) {
    stopped_ = true;
    std::string text = held_.substr(0, first);
    held_.clear();
    return text;
  }
  // The longest end of the text that begins a stop string stays back.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(stop.size() - 1, held_.size()); length > keep; --length) {
      if (std::string_view(held_).ends_with(std::string_view(stop).substr(0, length))) keep = length;
    }
  }
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return text;
}

std::string StopStrings::flush() { return std::exchange(held_, {}); }

}  // namespace metal_lora
