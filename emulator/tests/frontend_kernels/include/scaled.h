// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

METAL_FUNC float scaled(float x) { return x * SCALE; }
