// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Metal's standard library on a CPU: what compute kernels use of it (Metal Shading Language
// Specification 3.1). One header per chapter; any of Metal's own header names includes them all.
#pragma once

#include "abi.h"
#include "types.h"
#include "vector.h"
#include "relational.h"
#include "math.h"
#include "integer.h"
#include "geometric.h"
#include "matrix.h"
#include "pack.h"
#include "atomic.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "builtins.h"
#include "glue.h"
