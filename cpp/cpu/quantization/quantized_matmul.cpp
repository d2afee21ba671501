// Products with packed weights on the CPU.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cpu/quantization/packed_weight.h"
#include "cpu/quantization/products.h"

namespace quire::cpu {
namespace {

// Up to this many rows of x are multiplied one by one, in fixed point.
constexpr std::int64_t kFixedPointTokens = 4;

// x of one token as float32 in the order of the packed rows; rows beyond the last are 0.
void read_row(const QuantizedMatmulParams& p, std::int64_t token, std::int64_t num_rows, std::vector<float>& natural, float* out) {
  const void* const x = advance(p.x, token * p.x_stride, p.dtype);
  const WeightFormat& f = p.weight.format;
  const auto widen = quantized_matmul_kernels.active().widen[index(p.dtype)];
  if (p.weight.permutation == nullptr) {
    widen(out, x, f.in_features);
  } else {
    natural.resize(count(f.in_features));
    widen(natural.data(), x, f.in_features);
    for (std::int64_t row = 0; row < f.num_rows; ++row) {
      const std::int64_t feature = p.weight.permutation[row];
      out[row] = feature >= 0 && feature < f.in_features ? natural[count(feature)] : 0.0f;
    }
  }
  std::fill(out + f.num_rows, out + num_rows, 0.0f);
}

// False, and nothing is written, where x has infinities or NaN.
bool multiply_fixed_point(const QuantizedMatmulParams& p, const PackedLayout& layout, const std::vector<float>& bias) {
  const auto& kernels = quantized_matmul_kernels.active();
  const WeightFormat& f = p.weight.format;
  const std::int64_t codes = layout.codes_per_word, num_rows = layout.num_steps * codes;
  const std::int64_t block = f.group_size == 0 ? kFixedPointBlock : f.group_size, num_blocks = ceil_div(num_rows, block);
  std::vector<float> natural, x(count(num_rows)), block_scales(count(p.num_tokens * num_blocks));
  std::vector<std::int16_t> q(count(num_rows));
  std::vector<std::int32_t> operands(count(p.num_tokens * num_rows / 2)), block_sums(block_scales.size());
  const int bits_index = f.stored_bits() == 4 ? 0 : 1;
  for (std::int64_t token = 0; token < p.num_tokens; ++token) {
    read_row(p, token, num_rows, natural, x.data());
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      const std::int64_t begin = b * block, end = std::min(begin + block, num_rows);
      const float scale = kernels.fixed_point(q.data() + begin, x.data() + begin, end - begin);
      if (!std::isfinite(scale)) return false;
      std::int32_t sum = 0;
      for (std::int64_t i = begin; i < end; ++i) sum += q[count(i)];
      block_scales[count(token * num_blocks + b)] = scale;
      block_sums[count(token * num_blocks + b)] = sum;
    }
    kernels.pack_row[bits_index](operands.data() + token * num_rows / 2, q.data(), layout.num_steps);
  }

  const auto multiply = kernels.row[bits_index];
  const std::int64_t group_stride = f.group_size == 0 ? 0 : kTileColumns;
  parallel_for(layout.num_tiles, ceil_div(4 * kGrainElements, num_rows * kTileColumns), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scales(count(layout.tile_scales)), zeros(scales.size());
    for (std::int64_t tile = begin; tile < end; ++tile) {
      read_tile(layout, p.weight, tile, scales.data(), zeros.data());
      const std::int64_t first = tile * kTileColumns;
      for (std::int64_t token = 0; token < p.num_tokens; ++token) {
        float sums[kTileColumns];
        multiply({sums, layout.words(p.weight.data, tile), scales.data(), zeros.data(), operands.data() + token * num_rows / 2,
                  block_scales.data() + token * num_blocks, block_sums.data() + token * num_blocks, layout.num_steps, block / codes,
                  group_stride, group_stride});
        kernels.narrow[index(p.dtype)](advance(p.out, token * p.out_stride + first, p.dtype), sums,
                                       bias.empty() ? nullptr : bias.data() + first,
                                       std::min<std::int64_t>(kTileColumns, f.out_features - first));
      }
    }
  });
  return true;
}

// x in bfloat16 on AMX, and the weight rounded to bfloat16.
void multiply_amx(const QuantizedMatmulParams& p, const PackedLayout& layout, const std::vector<float>& bias,
                  const QuantizationAmxKernels& kernels) {
  const WeightFormat& f = p.weight.format;
  constexpr std::int64_t kStepRows = 2 * kAmxTile;  // of the weight in a tile
  const std::int64_t codes = layout.codes_per_word, num_steps = ceil_div(f.num_rows, kStepRows), tile_words = num_steps * kAmxTileWords;
  const std::int64_t step_words = kStepRows / codes, group_words = f.group_size == 0 ? layout.num_steps : f.group_size / codes;
  const auto unpack = kernels.unpack[f.stored_bits() == 4 ? 0 : 1];
  const std::int64_t left_rows = ceil_div(std::min(kChunkRows, p.num_tokens), std::int64_t{kAmxTile}) * kAmxTile;
  const AlignedWords left(left_rows / kAmxTile * tile_words);

  const auto pack = [&](std::int64_t token, std::int64_t row, std::vector<float>& natural, float* line) {
    read_row(p, token, num_steps * kStepRows, natural, line);
    const auto upper = [&](std::int64_t i) {
      std::uint32_t bits;
      std::memcpy(&bits, line + i, 4);
      return bits >> 16;
    };
    std::uint32_t* const out = left.data() + row / kAmxTile * tile_words + row % kAmxTile * kAmxTile;
    for (std::int64_t step = 0; step < num_steps; ++step)
      for (std::int64_t word = 0; word < kAmxTile; ++word) {
        const std::int64_t i = step * kStepRows + word / (codes / 2) * codes + word % (codes / 2);
        out[step * kAmxTileWords + word] = upper(i) | upper(i + codes / 2) << 16;
      }
  };

  for (std::int64_t first = 0; first < p.num_tokens; first += kChunkRows) {
    const std::int64_t chunk = std::min(kChunkRows, p.num_tokens - first);
    parallel_for(chunk, ceil_div(kGrainElements, num_steps * kStepRows), [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> natural, line(count(num_steps * kStepRows));
      for (std::int64_t row = begin; row < end; ++row) pack(first + row, row, natural, line.data());
    });
    for_amx_blocks(
        chunk, f.out_features,
        [&](std::int64_t row, std::int64_t rows, std::int64_t column, std::int64_t columns, std::uint32_t* panel, std::uint32_t* sums) {
          const std::int64_t first_tile = column / kAmxTile, tiles = ceil_div(columns, std::int64_t{kAmxTile});
          std::vector<float> scales(count(tiles * layout.tile_scales)), zeros(scales.size());
          for (std::int64_t tile = 0; tile < tiles; ++tile)
            read_tile(layout, p.weight, first_tile + tile, scales.data() + tile * layout.tile_scales,
                      zeros.data() + tile * layout.tile_scales);
          for (std::int64_t step = 0; step < num_steps; step += kAmxSteps) {
            const std::int64_t steps = std::min(kAmxSteps, num_steps - step), panel_words = steps * kAmxTileWords;
            for (std::int64_t tile = 0; tile < kAmxColumns / kAmxTile; ++tile) {
              std::uint32_t* to = panel + tile * panel_words;
              std::uint32_t* const to_end = to + panel_words;
              if (tile < tiles) {
                const std::uint32_t* const words = layout.words(p.weight.data, first_tile + tile);
                const std::int64_t last_word = std::min((step + steps) * step_words, layout.num_steps);
                for (std::int64_t word = step * step_words; word < last_word;) {
                  const std::int64_t group = word / group_words, n = std::min((group + 1) * group_words, last_word) - word;
                  unpack(to, words + word * kTileColumns, n, scales.data() + tile * layout.tile_scales + group * kTileColumns,
                         zeros.data() + tile * layout.tile_scales + group * kTileColumns);
                  to += n * codes / 2 * kAmxTile;
                  word += n;
                }
              }
              std::fill(to, to_end, 0u);
            }
            kernels.multiply_bfloat16({sums, left.data() + row / kAmxTile * tile_words + step * kAmxTileWords, panel,
                                       ceil_div(rows, std::int64_t{kAmxTile}), tile_words, panel_words, steps, step > 0});
          }
          AmxFinish finish = {};
          finish.out = advance(p.out, (first + row) * p.out_stride + column, p.dtype);
          finish.sums = sums;
          finish.bias = bias.empty() ? nullptr : bias.data() + column;
          finish.out_stride = p.out_stride;
          finish.rows = rows;
          finish.columns = columns;
          kernels.finish_float32[index(p.dtype)](finish);
        });
  }
}

}  // namespace

void quantized_matmul(const QuantizedMatmulParams& p) {
  const char* const obstacle = p.batch_invariant                  ? "batch_invariant: one kernel for any number of tokens"
                               : p.dtype == DType::kFloat32       ? "x is float32, which it would round"
                               : p.num_tokens > kFixedPointTokens ? "it reads the weight for each token, which pays for up to 4"
                                                                  : nullptr;
  if (Explanation* const explanation = explaining()) {
    explain_cpu(*explanation, obstacle == nullptr ? "fixed_point" : "unpacked", obstacle != nullptr && p.dtype == DType::kBFloat16);
    explanation->reasons.push_back(obstacle != nullptr
                                       ? std::string("not fixed_point: ") + obstacle
                                       : "up to 4 tokens of 16 bits meet the codes as they are; unpacked if x has infinities or NaN");
    if (obstacle != nullptr && p.dtype == DType::kBFloat16 && amx_kernels() != nullptr)
      explanation->reasons.emplace_back("AMX: the weight is rounded to bfloat16");
    return;
  }
  const PackedLayout layout(p.weight.format);
  const WeightFormat& f = p.weight.format;
  const std::vector<float> bias = widened_bias(p.bias, p.bias_dtype, f.out_features);
  if (obstacle == nullptr && multiply_fixed_point(p, layout, bias)) return;

  if (p.dtype == DType::kBFloat16) {
    if (const QuantizationAmxKernels* const amx = amx_kernels()) return multiply_amx(p, layout, bias, *amx);
  }
  const auto& kernels = quantized_matmul_kernels.active();
  const std::int64_t num_rows = layout.num_steps * layout.codes_per_word;
  // All tiles' scales as float32: they are read once for each block of x.
  std::vector<float> scales(count(layout.num_tiles * layout.tile_scales)), zeros(scales.size());
  parallel_for(layout.num_tiles, ceil_div(kGrainElements, layout.tile_scales), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile)
      read_tile(layout, p.weight, tile, scales.data() + tile * layout.tile_scales, zeros.data() + tile * layout.tile_scales);
  });
  for (std::int64_t first = 0; first < p.num_tokens; first += kChunkRows) {
    const std::int64_t chunk = std::min(kChunkRows, p.num_tokens - first);
    const std::vector<std::uint32_t> left = pack_left(chunk, num_rows, [&](std::int64_t row, std::uint32_t* line) {
      std::vector<float> natural;
      read_row(p, first + row, num_rows, natural, reinterpret_cast<float*>(line));
    });
    multiply_blocks(
        {left.data(), chunk, num_rows}, f.out_features, false,
        [&](std::int64_t tile, std::int64_t step, std::int64_t steps, std::uint32_t* panel) {
          unpack_rows(layout, f, layout.words(p.weight.data, tile), scales.data() + tile * layout.tile_scales,
                      zeros.data() + tile * layout.tile_scales, step / layout.codes_per_word, steps / layout.codes_per_word,
                      reinterpret_cast<float*>(panel));
        },
        [&](std::int64_t row, std::int64_t column, std::int64_t columns, const std::uint32_t* sums) {
          kernels.narrow[index(p.dtype)](advance(p.out, (first + row) * p.out_stride + column, p.dtype),
                                         reinterpret_cast<const float*>(sums), bias.empty() ? nullptr : bias.data() + column, columns);
        });
  }
}

std::int64_t quantized_matmul_workspace_size(std::int64_t, const WeightFormat&, bool, DType, bool) { return 0; }

}  // namespace quire::cpu
