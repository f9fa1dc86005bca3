// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/regions.h"

#include <algorithm>
#include <map>
#include <sstream>

#include "metal_lora/error.h"

namespace metal_lora::metal {
namespace {

constexpr std::string_view kMarker = "// @region ";

[[noreturn]] void refuse(std::string_view where, int line, const std::string& what) {
  throw Error(ErrorCode::internal, std::string(where) + ":" + std::to_string(line) + ": " + what);
}

Region parse_marker(const MetalFile& file, int line, std::string_view marker) {
  std::istringstream words{std::string(marker.substr(kMarker.size()))};
  Region region;
  region.file = file.name;
  region.first_line = line + 1;
  std::string colon;
  if (!(words >> region.name)) refuse(file.name, line, "@region must have a name");
  if (words >> colon) {
    if (colon != ":") refuse(file.name, line, "@region NAME must be followed by ':'");
    for (std::string need; words >> need;) region.needs.push_back(need);
  }
  return region;
}

using RegionTable = std::map<std::string, Region, std::less<>>;

const RegionTable& region_table() {
  static const RegionTable table = [] {
    RegionTable result;
    for (const auto& file : metal_files()) {
      for (auto& region : parse_regions(file)) {
        const int line = region.first_line;
        const auto name = region.name;
        if (!result.emplace(name, std::move(region)).second) {
          refuse(file.name, line, "@region " + name + " is defined twice");
        }
      }
    }
    return result;
  }();
  return table;
}

void append(
    const std::string& name,
    std::vector<std::string>& done,
    std::vector<std::string>& open,
    std::string& text) {
  if (std::find(done.begin(), done.end(), name) != done.end()) return;
  const auto found = region_table().find(name);
  if (found == region_table().end()) {
    throw Error(ErrorCode::internal, "[metal] there is no region named " + name);
  }
  const Region& region = found->second;
  if (std::find(open.begin(), open.end(), name) != open.end()) {
    refuse(region.file, region.first_line, "@region " + name + " needs itself");
  }
  open.push_back(name);
  for (const auto& need : region.needs) append(need, done, open, text);
  open.pop_back();
  done.push_back(name);
  text += "#line " + std::to_string(region.first_line) + " \"" + std::string(region.file) + "\"\n";
  text += region.text;
}

}  // namespace

std::vector<Region> parse_regions(const MetalFile& file) {
  std::vector<Region> regions;
  size_t begin = 0;
  for (int line = 1; begin < file.text.size(); ++line) {
    size_t end = file.text.find('\n', begin);
    end = end == std::string_view::npos ? file.text.size() : end + 1;
    const auto content = file.text.substr(begin, end - begin);
    if (content.starts_with(kMarker)) {
      regions.push_back(parse_marker(file, line, content));
      regions.back().text = file.text.substr(end, 0);
    } else if (!regions.empty()) {
      auto& text = regions.back().text;
      text = std::string_view(text.data(), text.size() + content.size());
    }
    begin = end;
  }
  return regions;
}

std::string assemble(const std::vector<std::string>& regions) {
  std::vector<std::string> done, open;
  std::string text;
  for (const auto& name : regions) append(name, done, open, text);
  return text;
}

}  // namespace metal_lora::metal
