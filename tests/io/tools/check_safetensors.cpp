// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <iostream>
#include <string>

#include "src/io/safetensors.h"

// One path per line on stdin; "accept" or "refuse <why>" per line on stdout. For the comparison
// with the Rust reference in tests/python/test_safetensors_oracle.py. With "--write <from> <to>":
// reads one file and saves it again.
int main(int argc, char** argv) {
  using namespace metal_lora::io;
  if (argc == 4 && std::string(argv[1]) == "--write") {
    const auto file = read_safetensors(std::string(argv[2]));
    if (!file) return 1;
    return write_safetensors(argv[3], file->tensors(), file->metadata()).ok() ? 0 : 1;
  }
  for (std::string path; std::getline(std::cin, path);) {
    const auto file = read_safetensors(path);
    std::cout << (file ? "accept" : "refuse " + file.error().summary()) << "\n";
  }
}
