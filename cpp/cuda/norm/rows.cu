// The norm ops on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/norm/rows.cuh"
