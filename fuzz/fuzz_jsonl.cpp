// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "fuzz/fuzz_input.h"
#include "src/io/jsonl.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace metal_lora;
  const auto file = io::JsonlFile::open(fuzz::as_file(data, bytes));
  if (!file) return 0;
  uint64_t end = 0;
  for (uint64_t i = 0; i < file->size(); ++i) {
    const io::JsonlRow row = file->row(i);
    fuzz::require(row.offset >= end && row.offset + row.text.size() <= bytes);
    end = row.offset + row.text.size();
    const auto parsed = file->parse(i);
    if (!parsed) {
      fuzz::require(parsed.error().field.starts_with("line "));
      fuzz::require(*parsed.error().offset >= row.offset && *parsed.error().offset <= end);
    }
  }
  return 0;
}
