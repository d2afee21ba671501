// Products of 8-bit matrices with scales on the CPU.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cpu/quantization/products.h"
#include "ops/quantization.h"

namespace quire::cpu {
namespace {

// What a row's sums are multiplied by, and its zero point.
void finish_scaled(const ScaledMatmulParams& p, const std::vector<float>& bias, std::int64_t row, std::int64_t column, std::int64_t columns,
                   float* sums) {
  if (p.granularity_a != ScaleGranularity::kGroup) {
    const float scale_a = p.scale_a[row * p.scale_a_row_stride];
    for (std::int64_t i = 0; i < columns; ++i) sums[i] = sums[i] * scale_a * p.scale_b[(column + i) * p.scale_b_row_stride];
  }
  quantized_matmul_kernels.active().narrow[index(p.out_dtype)](advance(p.out, row * p.out_stride + column, p.out_dtype), sums,
                                                               bias.empty() ? nullptr : bias.data() + column, columns);
}

// float8, and int8 with scales of blocks: both operands widened to float32, and scales of blocks multiplied into them.
void scaled_matmul_wide(const ScaledMatmulParams& p, const std::vector<float>& bias) {
  const auto widen = quantized_matmul_kernels.active().widen[index(p.dtype)];
  const bool by_block = p.granularity_a == ScaleGranularity::kGroup;
  for (std::int64_t first = 0; first < p.m; first += kChunkRows) {
    const std::int64_t chunk = std::min(kChunkRows, p.m - first);
    const std::vector<std::uint32_t> left = pack_left(chunk, p.k, [&](std::int64_t row, std::uint32_t* words) {
      float* const line = reinterpret_cast<float*>(words);
      widen(line, advance(p.a, (first + row) * p.a_stride, p.dtype), p.k);
      if (!by_block) return;
      for (std::int64_t i = 0; i < p.k; ++i)
        line[i] *= p.scale_a[(first + row) * p.scale_a_row_stride + i / kScaleBlock * p.scale_a_group_stride];
    });
    multiply_blocks(
        {left.data(), chunk, p.k}, p.n, false,
        [&](std::int64_t tile, std::int64_t step, std::int64_t steps, std::uint32_t* words) {
          float* const panel = reinterpret_cast<float*>(words);
          float line[kBlockSteps];
          for (std::int64_t column = 0; column < kTileColumns; ++column) {
            const std::int64_t n = tile * kTileColumns + column;
            if (n < p.n) {
              widen(line, advance(p.b, n * p.b_stride + step, p.dtype), steps);
              if (by_block)
                for (std::int64_t i = 0; i < steps; ++i)
                  line[i] *= p.scale_b[n / kScaleBlock * p.scale_b_row_stride + (step + i) / kScaleBlock * p.scale_b_group_stride];
            } else {
              std::fill(line, line + steps, 0.0f);
            }
            for (std::int64_t i = 0; i < steps; ++i) panel[i * kTileColumns + column] = line[i];
          }
        },
        [&](std::int64_t row, std::int64_t column, std::int64_t columns, std::uint32_t* sums) {
          finish_scaled(p, bias, first + row, column, columns, reinterpret_cast<float*>(sums));
        });
  }
}

// What is left of a sum in int32 when the zero point of its row of a is taken out. Modulo 2^32: the difference fits, its terms need not.
float without_zero_point(const ScaledMatmulParams& p, std::int64_t row, std::int64_t column, std::int32_t sum) {
  if (p.zero_point == nullptr) return static_cast<float>(sum);
  const auto zero_point = static_cast<std::uint32_t>(p.zero_point[row * p.zero_point_stride]);
  return static_cast<float>(
      static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) - zero_point * static_cast<std::uint32_t>(p.column_sums[column])));
}

// int8: pairs of int16, sums in int32.
void scaled_matmul_int8(const ScaledMatmulParams& p, const std::vector<float>& bias) {
  const std::int64_t num_steps = ceil_div(p.k, 2);
  const auto pair = [&](const std::int8_t* x, std::int64_t step) {
    const auto low = static_cast<std::uint16_t>(std::int16_t{x[2 * step]});
    const auto high = static_cast<std::uint16_t>(2 * step + 1 < p.k ? std::int16_t{x[2 * step + 1]} : std::int16_t{0});
    return low | static_cast<std::uint32_t>(high) << 16;
  };
  for (std::int64_t first = 0; first < p.m; first += kChunkRows) {
    const std::int64_t chunk = std::min(kChunkRows, p.m - first);
    const std::vector<std::uint32_t> left = pack_left(chunk, num_steps, [&](std::int64_t row, std::uint32_t* line) {
      const auto* const a = static_cast<const std::int8_t*>(p.a) + (first + row) * p.a_stride;
      for (std::int64_t step = 0; step < num_steps; ++step) line[step] = pair(a, step);
    });
    multiply_blocks(
        {left.data(), chunk, num_steps}, p.n, true,
        [&](std::int64_t tile, std::int64_t step, std::int64_t steps, std::uint32_t* panel) {
          for (std::int64_t column = 0; column < kTileColumns; ++column) {
            const std::int64_t n = tile * kTileColumns + column;
            const auto* const b = static_cast<const std::int8_t*>(p.b) + n * p.b_stride;
            for (std::int64_t i = 0; i < steps; ++i) panel[i * kTileColumns + column] = n < p.n ? pair(b, step + i) : 0u;
          }
        },
        [&](std::int64_t row, std::int64_t column, std::int64_t columns, const std::uint32_t* words) {
          float sums[kBlockColumns];
          for (std::int64_t i = 0; i < columns; ++i)
            sums[i] = without_zero_point(p, first + row, column + i, static_cast<std::int32_t>(words[i]));
          finish_scaled(p, bias, first + row, column, columns, sums);
        });
  }
}

// int8 on AMX: the rows of a as tiles once, those of b as panels for each block.
void scaled_matmul_int8_amx(const ScaledMatmulParams& p, const std::vector<float>& bias, const QuantizationAmxKernels& kernels) {
  const std::int64_t num_steps = ceil_div(p.k, std::int64_t{4 * kAmxTile}), tile_words = num_steps * kAmxTileWords;
  std::vector<float> scale_b(count(p.n));
  for (std::int64_t i = 0; i < p.n; ++i) scale_b[count(i)] = p.scale_b[i * p.scale_b_row_stride];
  const auto* const a = static_cast<const std::int8_t*>(p.a);
  const auto* const b = static_cast<const std::int8_t*>(p.b);
  const AlignedWords left(ceil_div(std::min(kChunkRows, p.m), std::int64_t{kAmxTile}) * tile_words);
  for (std::int64_t first = 0; first < p.m; first += kChunkRows) {
    const std::int64_t chunk = std::min(kChunkRows, p.m - first);
    parallel_for(ceil_div(chunk, std::int64_t{kAmxTile}), ceil_div(kGrainElements, kAmxTile * p.k),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t tile = begin; tile < end; ++tile)
                     kernels.pack_rows_int8(left.data() + tile * tile_words, a + (first + tile * kAmxTile) * p.a_stride, p.a_stride,
                                            std::min<std::int64_t>(kAmxTile, chunk - tile * kAmxTile), p.k);
                 });
    for_amx_blocks(
        chunk, p.n,
        [&](std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns, std::uint32_t* panel, std::uint32_t* sums) {
          for (std::int64_t step = 0; step < num_steps; step += kAmxSteps) {
            const std::int64_t steps = std::min(kAmxSteps, num_steps - step), panel_words = steps * kAmxTileWords, k = step * 4 * kAmxTile;
            for (std::int64_t i = 0; i < kAmxColumns; i += kAmxTile)
              kernels.pack_columns_int8(panel + i / kAmxTile * panel_words, b + std::min(column + i, p.n - 1) * p.b_stride + k, p.b_stride,
                                        std::clamp<std::int64_t>(columns - i, 0, kAmxTile), std::min(steps * 4 * kAmxTile, p.k - k));
            kernels.multiply_int8({sums, left.data() + row / kAmxTile * tile_words + step * kAmxTileWords, panel,
                                   ceil_div(rows, std::int64_t{kAmxTile}), tile_words, panel_words, steps, step > 0});
          }
          AmxFinish finish = {};
          finish.out = advance(p.out, (first + row) * p.out_stride + column, p.out_dtype);
          finish.sums = sums;
          finish.bias = bias.empty() ? nullptr : bias.data() + column;
          finish.scale_a = p.scale_a + (first + row) * p.scale_a_row_stride;
          finish.scale_b = scale_b.data() + column;
          if (p.zero_point != nullptr) {
            finish.zero_point = p.zero_point + (first + row) * p.zero_point_stride;
            finish.column_sums = p.column_sums + column;
          }
          finish.out_stride = p.out_stride;
          finish.scale_a_stride = p.scale_a_row_stride;
          finish.zero_point_stride = p.zero_point_stride;
          finish.rows = rows;
          finish.columns = columns;
          kernels.finish_int32[index(p.out_dtype)](finish);
        });
  }
}

// Up to this many rows of a are multiplied by each row of b as it is, which costs no panel.
constexpr std::int64_t kDotTokens = 8;

void scaled_matmul_dots(const ScaledMatmulParams& p, const std::vector<float>& bias) {
  const auto& kernels = quantized_matmul_kernels.active();
  const bool by_block = p.granularity_a == ScaleGranularity::kGroup, in_int32 = p.dtype == DType::kInt8 && !by_block;
  std::vector<float> wide(in_int32 ? 0 : count(p.m * p.k));
  std::vector<std::int16_t> narrow(in_int32 ? count(p.m * p.k) : 0);
  for (std::int64_t row = 0; row < p.m; ++row) {
    const void* const a = advance(p.a, row * p.a_stride, p.dtype);
    if (in_int32) {
      const auto* const values = static_cast<const std::int8_t*>(a);
      std::copy(values, values + p.k, narrow.begin() + row * p.k);
      continue;
    }
    float* const line = wide.data() + row * p.k;
    kernels.widen[index(p.dtype)](line, a, p.k);
    if (!by_block) continue;
    for (std::int64_t i = 0; i < p.k; ++i) line[i] *= p.scale_a[row * p.scale_a_row_stride + i / kScaleBlock * p.scale_a_group_stride];
  }
  // Results of some columns are gathered, so that rows of the result are written in pieces.
  parallel_for(ceil_div(p.n, kBlockColumns), ceil_div(kGrainElements, p.k * kBlockColumns), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kBlockColumns; first < std::min(end * kBlockColumns, p.n); first += kBlockColumns) {
      const std::int64_t columns = std::min(kBlockColumns, p.n - first);
      float sums[kDotTokens][kBlockColumns];
      for (std::int64_t column = 0; column < columns; ++column) {
        const std::int64_t n = first + column;
        const void* const b = advance(p.b, n * p.b_stride, p.dtype);
        for (std::int64_t row = 0; row < p.m; row += kDotRows) {
          const int rows = static_cast<int>(std::min<std::int64_t>(kDotRows, p.m - row));
          if (in_int32) {
            std::int32_t exact[kDotRows];
            kernels.dot_int8({exact, narrow.data() + row * p.k, b, p.k, p.k, rows});
            for (int r = 0; r < rows; ++r) sums[row + r][column] = without_zero_point(p, row + r, n, exact[r]);
            continue;
          }
          const auto dot = p.dtype == DType::kInt8 ? kernels.dot_int8_wide : kernels.dot_float8;
          float total[kDotRows] = {};
          for (std::int64_t k = 0; k < p.k; k += by_block ? kScaleBlock : p.k) {
            float part[kDotRows];
            dot({part, wide.data() + row * p.k + k, advance(b, k, p.dtype), p.k, by_block ? std::min(kScaleBlock, p.k - k) : p.k, rows});
            const float scale =
                by_block ? p.scale_b[n / kScaleBlock * p.scale_b_row_stride + k / kScaleBlock * p.scale_b_group_stride] : 1.0f;
            for (int r = 0; r < rows; ++r) total[r] += part[r] * scale;
          }
          for (int r = 0; r < rows; ++r) sums[row + r][column] = total[r];
        }
      }
      for (std::int64_t row = 0; row < p.m; ++row) finish_scaled(p, bias, row, first, columns, sums[row]);
    }
  });
}

}  // namespace

void scaled_matmul(const ScaledMatmulParams& p) {
  const bool dots = p.m <= kDotTokens && !p.batch_invariant;
  const bool in_int32 = p.dtype == DType::kInt8 && p.granularity_a != ScaleGranularity::kGroup;
  if (Explanation* const explanation = explaining()) {
    explain_cpu(*explanation, dots ? "rows" : in_int32 ? "int32" : "float32", in_int32 && !dots);
    explanation->reasons.emplace_back(dots                ? "up to 8 rows of a meet each row of b as it is"
                                      : p.batch_invariant ? "not rows: batch_invariant: one kernel for any number of rows of a"
                                                          : "not rows: more than 8 rows of a, for which b is widened once");
    if (!dots && !in_int32)
      explanation->reasons.emplace_back(p.dtype == DType::kInt8 ? "not int32: scales of blocks" : "not int32: a and b are float8");
    return;
  }
  const std::vector<float> bias = widened_bias(p.bias, p.bias_dtype, p.n);
  if (dots) return scaled_matmul_dots(p, bias);
  if (in_int32) {
    const QuantizationAmxKernels* const amx = amx_kernels();
    if (amx != nullptr) return scaled_matmul_int8_amx(p, bias, *amx);
    scaled_matmul_int8(p, bias);
  } else {
    scaled_matmul_wide(p, bias);
  }
}

std::int64_t scaled_matmul_workspace_size(std::int64_t, std::int64_t, std::int64_t, DType, bool, bool) { return 0; }

}  // namespace quire::cpu
