// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Metal's standard library on a CPU: what compute kernels use of it (Metal Shading Language
// Specification 3.1). One header per chapter; any of Metal's own header names includes them all.
#pragma once

#include "abi.h"
#include "atomic.h"
#include "builtins.h"
#include "geometric.h"
#include "glue.h"
#include "integer.h"
#include "math.h"
#include "matrix.h"
#include "pack.h"
#include "relational.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "types.h"
#include "vector.h"
