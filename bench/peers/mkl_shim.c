// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Preloaded, makes MKL take its fastest path on processors that Intel did not make, so that PyTorch
// is measured at its best everywhere.
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
