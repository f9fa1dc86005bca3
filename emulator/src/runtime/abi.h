// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The contract lives beside the headers that generated code includes, so that a compiled library
// needs that folder alone.
#pragma once

#include "../../shim/metal_emulator/abi.h"
