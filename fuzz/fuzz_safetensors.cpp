// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "fuzz/fuzz_input.h"
#include "src/io/safetensors.h"

// Reads, uses every tensor, and lays the same tensors out again: what was read can be written, and
// the written header reads back.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  using namespace metal_lora;
  const auto file = io::read_safetensors(fuzz::as_file(data, bytes));
  if (!file) {
    fuzz::require(!file.error().message().empty());
    return 0;
  }
  fuzz::use_tensors(file->tensors());
  for (const io::TensorInfo& tensor : file->tensors()) {
    fuzz::require(file->find(tensor.name) == &tensor);
  }
  const auto layout = io::lay_out_safetensors("again", file->tensors(), file->metadata());
  fuzz::require(layout.ok());
  std::string again = layout->header;
  for (const uint32_t at : layout->order) {
    const io::TensorInfo& tensor = file->tensors()[at];
    again.append(reinterpret_cast<const char*>(tensor.data), tensor.nbytes);
  }
  const auto reread = io::read_safetensors(
      fuzz::as_file(reinterpret_cast<const uint8_t*>(again.data()), again.size()));
  fuzz::require(reread.ok() && reread->tensors().size() == file->tensors().size());
  return 0;
}
