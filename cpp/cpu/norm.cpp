// Norms on the CPU: rows over threads.
// SPDX-License-Identifier: Apache-2.0
#include "ops/norm.h"

#include <algorithm>
#include <vector>

#include "cpu/isa/tables.h"
#include "cpu/norm_weight.h"
#include "cpu/quantize_row.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

namespace {

void run_rows(const NormParams& p, NormKernel kernel, const void* weight, const void* bias) {
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const RowRun out = row_run(p.out_rows, begin), x = row_run(p.x_rows, begin), residual = row_run(p.residual_rows, begin);
      NormRows rows;
      rows.out = advance(p.out, p.out_rows.offset(begin), p.dtype);
      rows.x = advance(p.x, p.x_rows.offset(begin), p.dtype);
      rows.residual = p.residual == nullptr ? nullptr : advance(p.residual, p.residual_rows.offset(begin), p.dtype);
      rows.weight = weight;
      rows.bias = bias;
      rows.out_stride = out.stride;
      rows.x_stride = x.stride;
      rows.residual_stride = residual.stride;
      rows.num_rows = std::min({end - begin, out.num_rows, x.num_rows, residual.num_rows});
      rows.hidden = p.hidden;
      rows.eps = p.eps;
      rows.weight_offset = p.weight_offset;
      kernel(rows);
      begin += rows.num_rows;
    }
  };
  if (p.num_rows == 1 || p.num_rows * p.hidden < 2 * kGrainElements)
    run(0, p.num_rows);
  else
    parallel_for(p.num_rows, ceil_div(kGrainElements, p.hidden), run);
}

// Row by row through a float32 row of each thread.
void run_quantized_rows(const NormParams& p, NormKernel wide_kernel, const void* weight, const void* bias) {
  const std::int64_t grain = ceil_div(kGrainElements, p.hidden);
  const std::int64_t num_parts = std::min<std::int64_t>(num_threads(), ceil_div(p.num_rows, grain)),
                     rows_per_part = ceil_div(p.num_rows, num_parts);
  // Apart by a cache line or more: threads must not share one.
  constexpr std::int64_t kLine = 16;
  const std::int64_t scratch_floats = ceil_div(p.hidden, kLine) * kLine + kLine;
  std::vector<float> scratch(static_cast<std::size_t>(num_parts * scratch_floats));
  parallel_for(num_parts, 1, [&](std::int64_t begin, std::int64_t end) {
    float* const y = scratch.data() + begin * scratch_floats;
    for (std::int64_t row = begin * rows_per_part; row < std::min(end * rows_per_part, p.num_rows); ++row) {
      NormRows rows{};
      rows.out = y;
      rows.x = advance(p.x, p.x_rows.offset(row), p.dtype);
      rows.residual = p.residual == nullptr ? nullptr : advance(p.residual, p.residual_rows.offset(row), p.dtype);
      rows.weight = weight;
      rows.bias = bias;
      rows.num_rows = 1;
      rows.hidden = p.hidden;
      rows.eps = p.eps;
      rows.weight_offset = p.weight_offset;
      wide_kernel(rows);
      quantize_row(p.quant, advance(p.out, p.out_rows.offset(row), p.quant.dtype), y, row, p.hidden);
    }
  });
}

// One kernel writes the dtype of x, the other float32.
void run(const NormParams& p, NormKernel kernel, NormKernel wide_kernel, const void* weight, const void* bias) {
  if (p.quant.scales == nullptr) {
    run_rows(p, kernel, weight, bias);
  } else {
    run_quantized_rows(p, wide_kernel, weight, bias);
  }
}

}  // namespace

void rms_norm(const NormParams& p) {
  const NormKernels& kernels = norm_kernels.active();
  const NormWeight weight(p.weight, p.weight_dtype, p.hidden, p.dtype);
  run(p, kernels.rms_norm[index(p.dtype)][weight.column()], kernels.rms_norm_wide[index(p.dtype)][weight.column()], weight.data(), nullptr);
}

void fused_add_rms_norm(const NormParams& p) {
  const NormKernels& kernels = norm_kernels.active();
  const NormWeight weight(p.weight, p.weight_dtype, p.hidden, p.dtype);
  run(p, kernels.fused_add_rms_norm[index(p.dtype)][weight.column()], kernels.fused_add_rms_norm_wide[index(p.dtype)][weight.column()],
      weight.data(), nullptr);
}

void layer_norm(const NormParams& p) {
  const NormKernels& kernels = norm_kernels.active();
  // Kernels take weight and bias of one dtype.
  const bool widen = p.bias != nullptr && p.bias_dtype != p.weight_dtype;
  const NormWeight weight(p.weight, p.weight_dtype, p.hidden, p.dtype, widen), bias(p.bias, p.bias_dtype, p.hidden, p.dtype, widen);
  run(p, kernels.layer_norm[index(p.dtype)][weight.column()], kernels.layer_norm_wide[index(p.dtype)][weight.column()], weight.data(),
      bias.data());
}

}  // namespace quire::cpu
