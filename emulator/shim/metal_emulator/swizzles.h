// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Declares all swizzles of a vector as union members: METAL_EMULATOR_SWIZZLES_n(letters) expands
// METAL_EMULATOR_SWIZZLE(width, name, indices) for each word of 2-4 of the n letters.
#pragma once

#define ME_SW(w, name, ...) METAL_EMULATOR_SWIZZLE(w, name, __VA_ARGS__)

#define ME_4_OF_2(n, i, j, k, X, Y) ME_SW(4, n##X, i, j, k, 0) ME_SW(4, n##Y, i, j, k, 1)
#define ME_3_OF_2(n, i, j, X, Y) \
  ME_SW(3, n##X, i, j, 0)        \
  ME_4_OF_2(n##X, i, j, 0, X, Y) ME_SW(3, n##Y, i, j, 1) ME_4_OF_2(n##Y, i, j, 1, X, Y)
#define ME_2_OF_2(n, i, X, Y) \
  ME_SW(2, n##X, i, 0) ME_3_OF_2(n##X, i, 0, X, Y) ME_SW(2, n##Y, i, 1) ME_3_OF_2(n##Y, i, 1, X, Y)
#define METAL_EMULATOR_SWIZZLES_2(X, Y) ME_2_OF_2(X, 0, X, Y) ME_2_OF_2(Y, 1, X, Y)

#define ME_4_OF_3(n, i, j, k, X, Y, Z) \
  ME_SW(4, n##X, i, j, k, 0) ME_SW(4, n##Y, i, j, k, 1) ME_SW(4, n##Z, i, j, k, 2)
#define ME_3_OF_3(n, i, j, X, Y, Z) \
  ME_SW(3, n##X, i, j, 0)           \
  ME_4_OF_3(n##X, i, j, 0, X, Y, Z) \
  ME_SW(3, n##Y, i, j, 1)           \
  ME_4_OF_3(n##Y, i, j, 1, X, Y, Z) ME_SW(3, n##Z, i, j, 2) ME_4_OF_3(n##Z, i, j, 2, X, Y, Z)
#define ME_2_OF_3(n, i, X, Y, Z) \
  ME_SW(2, n##X, i, 0)           \
  ME_3_OF_3(n##X, i, 0, X, Y, Z) \
  ME_SW(2, n##Y, i, 1)           \
  ME_3_OF_3(n##Y, i, 1, X, Y, Z) ME_SW(2, n##Z, i, 2) ME_3_OF_3(n##Z, i, 2, X, Y, Z)
#define METAL_EMULATOR_SWIZZLES_3(X, Y, Z) \
  ME_2_OF_3(X, 0, X, Y, Z) ME_2_OF_3(Y, 1, X, Y, Z) ME_2_OF_3(Z, 2, X, Y, Z)

#define ME_4_OF_4(n, i, j, k, X, Y, Z, W) \
  ME_SW(4, n##X, i, j, k, 0)              \
  ME_SW(4, n##Y, i, j, k, 1) ME_SW(4, n##Z, i, j, k, 2) ME_SW(4, n##W, i, j, k, 3)
#define ME_3_OF_4(n, i, j, X, Y, Z, W)                             \
  ME_SW(3, n##X, i, j, 0)                                          \
  ME_4_OF_4(n##X, i, j, 0, X, Y, Z, W)                             \
  ME_SW(3, n##Y, i, j, 1)                                          \
  ME_4_OF_4(n##Y, i, j, 1, X, Y, Z, W) ME_SW(3, n##Z, i, j, 2)     \
      ME_4_OF_4(n##Z, i, j, 2, X, Y, Z, W) ME_SW(3, n##W, i, j, 3) \
          ME_4_OF_4(n##W, i, j, 3, X, Y, Z, W)
#define ME_2_OF_4(n, i, X, Y, Z, W)                                                        \
  ME_SW(2, n##X, i, 0)                                                                     \
  ME_3_OF_4(n##X, i, 0, X, Y, Z, W)                                                        \
  ME_SW(2, n##Y, i, 1)                                                                     \
  ME_3_OF_4(n##Y, i, 1, X, Y, Z, W) ME_SW(2, n##Z, i, 2) ME_3_OF_4(n##Z, i, 2, X, Y, Z, W) \
      ME_SW(2, n##W, i, 3) ME_3_OF_4(n##W, i, 3, X, Y, Z, W)
#define METAL_EMULATOR_SWIZZLES_4(X, Y, Z, W) \
  ME_2_OF_4(X, 0, X, Y, Z, W)                 \
  ME_2_OF_4(Y, 1, X, Y, Z, W) ME_2_OF_4(Z, 2, X, Y, Z, W) ME_2_OF_4(W, 3, X, Y, Z, W)
