// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The .metal files of this folder, embedded, cut into regions so that each kernel is handed only
// the text it needs (MLX hashes a kernel's whole source at every dispatch).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace metal_lora::metal {

struct MetalFile {
  std::string_view name;  ///< "lora_kernels.metal"
  std::string_view text;
};
/// All embedded files.
const std::vector<MetalFile>& metal_files();

struct Region {
  std::string name;
  std::vector<std::string> needs;
  std::string_view file;
  int first_line = 0;  ///< of `text` in its file
  std::string_view text;
};
/// Cuts one file at its lines `// @region NAME : NEED NEED …`. Text before the first region is the
/// file's introduction and belongs to none. Throws Error internal on a malformed line.
std::vector<Region> parse_regions(const MetalFile& file);

/// The named regions and all they need, each once, needs first; with #line directives, so that a
/// compiler's message names the file of this folder. Throws Error internal on an unknown or cyclic
/// name. Thread-safe.
std::string assemble(const std::vector<std::string>& regions);

}  // namespace metal_lora::metal
