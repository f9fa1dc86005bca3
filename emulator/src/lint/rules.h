// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

#include "src/frontend/structure.h"
#include "src/frontend/token.h"

namespace metal_emulator::linting {

struct Message {
  std::string file;
  int line = 0;
  std::string text;
};

/// What tokens alone show: words that Metal lacks, pointers without an address space, program-scope
/// variables outside `constant`, static locals, lambdas, threadgroup variables outside kernels.
void check_tokens(
    const frontend::TokenStream& stream,
    const std::vector<frontend::Declaration>& declarations,
    std::vector<Message>& messages);

/// Metal text as C++ for OpenCL: address spaces become OpenCL's, which clang then checks.
std::string to_opencl(
    frontend::TokenStream stream, const std::vector<frontend::Declaration>& declarations);

/// Recursion and calls through pointers in the LLVM assembly that clang printed for to_opencl()'s
/// text. (Its line tables give the place of every function.)
void check_calls(const std::string& assembly, std::vector<Message>& messages);

}  // namespace metal_emulator::linting
