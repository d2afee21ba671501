// How scaled_matmul is done: which kernel, which tile, how clusters share the work.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/quantization.h"

namespace quire::cuda::scaled {

/// Hopper's kernel: see scaled_matmul_wgmma.cuh.
struct WgmmaChoice {
  int rows;            // of a tile: 64 or 128
  int columns;         // of a tile: tokens, or output features where tokens are its rows
  bool token_rows;     // tokens are the tile's rows: only with block scales
  int shared_columns;  // CTAs of a cluster with the same columns: 1, 2, 4
  int splits;          // of the inner dimension, over CTAs of a cluster
  bool halves;         // tiles that would make up half a wave or less are halved: so many columns for each of two CTAs
};

/// Why Hopper's kernel cannot do it on a device of that compute capability; null: it can.
const char* prevents_wgmma(const ScaledMatmulParams& params, int compute_capability);
WgmmaChoice choose_wgmma(const ScaledMatmulParams& params, int num_sms);

void launch_wgmma_float8(const ScaledMatmulParams& params, const WgmmaChoice& choice, Stream stream);
void launch_wgmma_int8(const ScaledMatmulParams& params, const WgmmaChoice& choice, Stream stream);

/// The portable kernel, for everything.
void launch_mma(const ScaledMatmulParams& params, Stream stream);

}  // namespace quire::cuda::scaled
