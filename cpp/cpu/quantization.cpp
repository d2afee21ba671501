// Quantization on the CPU: quantizing and undoing it, the layout of packed weights, and products with quantized operands.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "core/dispatch.h"
#include "core/explain.h"
#include "core/numeric.h"
#include "cpu/isa/quantization_amx.h"
#include "cpu/isa/tables.h"
#include "cpu/quantize_row.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

#if defined(__x86_64__)
namespace avx512_amx {
extern const QuantizationAmxKernels quantization_amx_kernels;
}
#endif

namespace {

// Null on a machine without AMX, where other paths are taken.
const QuantizationAmxKernels* amx_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Amx) return &avx512_amx::quantization_amx_kernels;
#endif
  return nullptr;
}

std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

// ---- quantize, dequantize ---------------------------------------------------------------------------------------------------------

// Calls body(row, scratch) for all rows, on threads with `scratch_floats` floats of their own.
template <typename F>
void for_rows(std::int64_t num_rows, std::int64_t row_elements, std::int64_t scratch_floats, F&& body) {
  parallel_for(num_rows, ceil_div(kGrainElements, std::max<std::int64_t>(row_elements, 1)), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(count(scratch_floats));
    for (std::int64_t row = begin; row < end; ++row) body(row, scratch.data());
  });
}

std::int32_t zero_point_in_range(std::int32_t z) { return std::clamp(z, -128, 127); }

// The scale and zero point of elements that reach from low to high; symmetric unless zero_point is there.
void compute_scale(const QuantizeParams& p, float low, float high, float* scale, std::int32_t* zero_point) {
  if (zero_point == nullptr) {
    *scale = std::max(std::min(std::max(-low, high), p.scale_bound) / largest_quantized(p.quant.dtype), kSmallestScale);
    return;
  }
  *scale = std::max((high - low) / 255.0f, kSmallestScale);
  const float shift = std::nearbyint(low / *scale);  // NaN where the range is infinite
  *zero_point = zero_point_in_range(-128 - static_cast<std::int32_t>(std::fmax(std::fmin(shift, 512.0f), -512.0f)));
}

void store_row(const QuantizeParams& p, void* out, const float* x, std::int64_t n, const float* scale, const std::int32_t* zero_point) {
  if (zero_point != nullptr) {
    quantization_kernels.active().quantize_asymmetric(static_cast<std::int8_t*>(out), x, n, *scale, zero_point_in_range(*zero_point));
  } else {
    kv_kernels.active().write[index(DType::kFloat32)][index(p.quant.dtype)]({out, x, 0, 0, 1, n, scale, 0});
  }
}

}  // namespace

void quantize(const QuantizeParams& p) {
  const auto& kernels = quantized_matmul_kernels.active();
  const auto& ranges = quantization_kernels.active();
  const auto widened = [&](std::int64_t row, float* scratch) {
    kernels.widen[index(p.dtype)](scratch, advance(p.x, p.x_rows.offset(row), p.dtype), p.width);
    return scratch;
  };
  const bool per_tensor = p.quant.granularity == ScaleGranularity::kTensor;
  if (per_tensor && p.computes) {
    std::vector<float> low(count(p.num_rows)), high(count(p.num_rows));
    for_rows(p.num_rows, p.width, p.width,
             [&](std::int64_t row, float* scratch) { ranges.range(widened(row, scratch), p.width, &low[count(row)], &high[count(row)]); });
    compute_scale(p, *std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end()), p.quant.scales, p.zero_points);
  }
  for_rows(p.num_rows, p.width, p.width, [&](std::int64_t row, float* scratch) {
    const float* const x = widened(row, scratch);
    void* const out = advance(p.out, p.out_rows.offset(row), p.quant.dtype);
    for (std::int64_t begin = 0, group = 0; begin < p.width; begin += p.quant.group_size, ++group) {
      const std::int64_t n = std::min(p.quant.group_size, p.width - begin);
      float* const scale = p.quant.scale_at(row, group);
      std::int32_t* const zero_point = p.zero_points == nullptr ? nullptr : p.zero_point_at(row, group);
      if (p.computes && !per_tensor) {
        float low, high;
        ranges.range(x + begin, n, &low, &high);
        compute_scale(p, low, high, scale, zero_point);
      }
      store_row(p, static_cast<char*>(out) + begin, x + begin, n, scale, zero_point);
    }
  });
}

void set_default_scales(const QuantizeParams& p) {
  for (std::int64_t row = 0; row < p.num_rows; ++row) {
    *p.quant.scale_at(row, 0) = 1.0f;
    if (p.zero_points != nullptr) *p.zero_point_at(row, 0) = 0;
  }
}

void dequantize(const QuantizeParams& p) {
  const auto& kernels = quantized_matmul_kernels.active();
  for_rows(p.num_rows, p.width, p.width, [&](std::int64_t row, float* scratch) {
    kernels.widen[index(p.quant.dtype)](scratch, advance(p.x, p.x_rows.offset(row), p.quant.dtype), p.width);
    const std::int64_t scale_row = row / p.block_rows;
    for (std::int64_t begin = 0, group = 0; begin < p.width; begin += p.quant.group_size, ++group) {
      const std::int64_t end = std::min(begin + p.quant.group_size, p.width);
      const float scale = *p.quant.scale_at(scale_row, group);
      const float zero = p.zero_points == nullptr ? 0.0f : static_cast<float>(*p.zero_point_at(scale_row, group));
      for (std::int64_t i = begin; i < end; ++i) scratch[i] = (scratch[i] - zero) * scale;
    }
    kernels.narrow[index(p.dtype)](advance(p.out, p.out_rows.offset(row), p.dtype), scratch, nullptr, p.width);
  });
}

void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride) {
  parallel_for(n, ceil_div(kGrainElements, k + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < k; ++i) sum += b[row * stride + i];
      sums[row] = sum;
    }
  });
}

void quantize_weight(const QuantizeWeightParams& p) {
  const auto& kernels = quantized_matmul_kernels.active();
  const auto& ranges = quantization_kernels.active();
  const std::int64_t num_groups = p.num_groups();
  const int largest_code = (1 << p.bits) - 1, middle = 1 << (p.bits - 1);
  const float smallest = p.scale_dtype == DType::kFloat16 ? 0x1p-14f : kSmallestScale;
  for_rows(p.n, p.k, p.k, [&](std::int64_t row, float* w) {
    kernels.widen[index(p.dtype)](w, advance(p.w, row * p.w_stride, p.dtype), p.k);
    for (std::int64_t group = 0; group < num_groups; ++group) {
      const std::int64_t begin = group * p.group_size, end = std::min(begin + p.group_size, p.k);
      float low, high;
      ranges.range(w + begin, end - begin, &low, &high);
      float scale =
          p.zeros == nullptr ? std::max(-low, high) / (static_cast<float>(middle) - 0.5f) : (high - low) / static_cast<float>(largest_code);
      scale = std::max(scale, smallest);
      void* const stored_scale = advance(p.scales, row * num_groups + group, p.scale_dtype);
      kernels.narrow[index(p.scale_dtype)](stored_scale, &scale, nullptr, 1);
      kernels.widen[index(p.scale_dtype)](&scale, stored_scale, 1);
      int zero = middle;
      if (p.zeros != nullptr) {
        // fmin and fmax pass over NaN, which no integer is.
        zero = static_cast<int>(std::fmax(0.0f, std::fmin(std::nearbyint(-low / scale), static_cast<float>(largest_code))));
        p.zeros[row * num_groups + group] = static_cast<std::uint8_t>(zero);
      }
      for (std::int64_t i = begin; i < end; ++i) {
        const float code = std::nearbyint(w[i] / scale) + static_cast<float>(zero);
        // The order makes NaN 0.
        p.codes[row * p.codes_stride + i] =
            static_cast<std::uint8_t>(code > 0.0f ? std::min(code, static_cast<float>(largest_code)) : 0.0f);
      }
    }
  });
}

// ---- Packed weights ---------------------------------------------------------------------------------------------------------------
//
// Three parts, each from a multiple of 64 bytes on, by tiles of 16 output features:
//   codes   uint32 [tiles][steps][16]: a word has 8 codes of 4 bits, or 4 of 8, of neighbouring rows, the lowest bits first
//   scales  [tiles][groups][16], of the checkpoint's dtype
//   zeros   uint8 [tiles][groups][16]
// Features beyond the last have scale 0, rows beyond the last the code of 0.

namespace {

struct PackedLayout {
  explicit PackedLayout(const WeightFormat& f)
      : codes_per_word(32 / f.stored_bits()),
        num_tiles(ceil_div(f.out_features, kTileColumns)),
        num_steps(ceil_div(f.num_rows, codes_per_word)),
        num_groups(f.num_groups()),
        tile_words(num_steps * kTileColumns),
        tile_scales(num_groups * kTileColumns),
        scales_at(num_tiles * tile_words * 4),
        zeros_at(scales_at + ceil_div(num_tiles * tile_scales * itemsize(f.scale_dtype), 64) * 64),
        num_bytes(zeros_at + (f.has_zeros ? num_tiles * tile_scales : 0)) {}

  int codes_per_word;
  std::int64_t num_tiles, num_steps, num_groups;
  std::int64_t tile_words, tile_scales;  // of one tile
  std::int64_t scales_at, zeros_at, num_bytes;

  const std::uint32_t* words(const void* data, std::int64_t tile) const {
    return static_cast<const std::uint32_t*>(data) + tile * tile_words;
  }
};

// Scales and zeros of a tile as float32 [num_groups][16].
void read_tile(const PackedLayout& layout, const PackedParams& w, std::int64_t tile, float* scales, float* zeros) {
  const char* const data = static_cast<const char*>(w.data);
  const DType dtype = w.format.scale_dtype;
  quantized_matmul_kernels.active().widen[index(dtype)](scales, data + layout.scales_at + tile * layout.tile_scales * itemsize(dtype),
                                                        layout.tile_scales);
  if (w.format.has_zeros) {
    const auto* const stored = reinterpret_cast<const std::uint8_t*>(data + layout.zeros_at) + tile * layout.tile_scales;
    for (std::int64_t i = 0; i < layout.tile_scales; ++i) zeros[i] = static_cast<float>(stored[i]);
  } else {
    std::fill(zeros, zeros + layout.tile_scales, w.format.stored_bits() == 4 ? 8.0f : 128.0f);
  }
}

}  // namespace

std::int64_t packed_weight_size(const WeightFormat& format) { return PackedLayout(format).num_bytes; }

void pack_weight(void* data, const WeightFormat& f, const WeightSource& source) {
  const PackedLayout layout(f);
  const int bits = f.stored_bits();
  const std::int64_t scale_bytes = itemsize(f.scale_dtype);
  char* const bytes = static_cast<char*>(data);
  parallel_for(layout.num_tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first = tile * kTileColumns, columns = std::min<std::int64_t>(kTileColumns, f.out_features - first);
      auto* const words = reinterpret_cast<std::uint32_t*>(bytes) + tile * layout.tile_words;
      std::memset(words, 0, count(layout.tile_words) * 4);
      for (std::int64_t step = 0; step < layout.num_steps; ++step)
        for (int c = 0; c < layout.codes_per_word; ++c)
          for (std::int64_t column = 0; column < columns; ++column)
            words[step * kTileColumns + column] |= source.code(step * layout.codes_per_word + c, first + column) << (c * bits);
      char* const scales = bytes + layout.scales_at + tile * layout.tile_scales * scale_bytes;
      std::memset(scales, 0, count(layout.tile_scales * scale_bytes));
      auto* const zeros = reinterpret_cast<std::uint8_t*>(bytes + layout.zeros_at) + tile * layout.tile_scales;
      if (f.has_zeros) std::memset(zeros, 0, count(layout.tile_scales));
      for (std::int64_t group = 0; group < layout.num_groups; ++group)
        for (std::int64_t column = 0; column < columns; ++column) {
          const std::int64_t at = group * kTileColumns + column;
          std::memcpy(scales + at * scale_bytes,
                      static_cast<const char*>(source.scales) + source.scale_index(group, first + column) * scale_bytes,
                      count(scale_bytes));
          if (f.has_zeros) zeros[at] = static_cast<std::uint8_t>(source.zero(group, first + column));
        }
    }
  });
}

namespace {

// panel[row - first][16] = w of rows [step * codes_per_word, ...) of a tile; steps are cut where groups end.
void unpack_rows(const PackedLayout& layout, const WeightFormat& f, const std::uint32_t* words, const float* scales, const float* zeros,
                 std::int64_t first_step, std::int64_t num_steps, float* panel) {
  const auto unpack = quantized_matmul_kernels.active().unpack[f.stored_bits() == 4 ? 0 : 1];
  const std::int64_t group_steps = f.group_size == 0 ? layout.num_steps : f.group_size / layout.codes_per_word;
  for (std::int64_t step = first_step; step < first_step + num_steps;) {
    const std::int64_t group = step / group_steps;
    const std::int64_t end = std::min((group + 1) * group_steps, first_step + num_steps);
    unpack(panel, {words + step * kTileColumns, scales + group * kTileColumns, zeros + group * kTileColumns, end - step});
    panel += (end - step) * layout.codes_per_word * kTileColumns;
    step = end;
  }
}

}  // namespace

void dequantize_weight(void* out, DType dtype, std::int64_t out_stride, const PackedParams& w) {
  const PackedLayout layout(w.format);
  const auto& kernels = quantized_matmul_kernels.active();
  const std::int64_t num_rows = layout.num_steps * layout.codes_per_word, k = w.format.in_features;
  parallel_for(layout.num_tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scales(count(layout.tile_scales)), zeros(scales.size()), panel(count(num_rows * kTileColumns)), line(count(k));
    for (std::int64_t tile = begin; tile < end; ++tile) {
      read_tile(layout, w, tile, scales.data(), zeros.data());
      unpack_rows(layout, w.format, layout.words(w.data, tile), scales.data(), zeros.data(), 0, layout.num_steps, panel.data());
      for (std::int64_t column = 0; column < std::min<std::int64_t>(kTileColumns, w.format.out_features - tile * kTileColumns); ++column) {
        // What no row is read from stays 0.
        std::fill(line.begin(), line.end(), 0.0f);
        for (std::int64_t row = 0; row < w.format.num_rows; ++row) {
          const std::int64_t feature = w.permutation == nullptr ? row : w.permutation[row];
          if (feature >= 0 && feature < k) line[count(feature)] = panel[count(row * kTileColumns + column)];
        }
        kernels.narrow[index(dtype)](advance(out, (tile * kTileColumns + column) * out_stride, dtype), line.data(), nullptr, k);
      }
    }
  });
}

// ---- Products ---------------------------------------------------------------------------------------------------------------------

namespace {

constexpr std::int64_t kBlockRows = 192;     // a multiple of every table's rows
constexpr std::int64_t kBlockColumns = 64;   // likewise of its columns
constexpr std::int64_t kBlockSteps = 256;    // of a panel that stays in the second-level cache, and a column of it in the first
constexpr std::int64_t kChunkRows = 8 * kBlockRows;  // rows of x that are widened at a time
static_assert(kBlockColumns % kTileColumns == 0);

// The left operand of tiles: [ceil(m / rows)][num_steps][rows], 4 bytes each; rows beyond the last are 0.
struct LeftOperand {
  const std::uint32_t* data;
  std::int64_t num_rows, num_steps;
};

// c = a b by blocks. fill(tile, first step, number of steps, panel) writes [steps][16] words of the right operand; finish(row, first column,
// number of columns, sums) takes sums of one row.
template <typename Fill, typename Finish>
void multiply_blocks(const LeftOperand& a, std::int64_t num_columns, bool is_int16, Fill&& fill, Finish&& finish) {
  const auto& kernels = quantized_matmul_kernels.active();
  const auto multiply = is_int16 ? kernels.multiply_int16 : kernels.multiply;
  const std::int64_t row_blocks = ceil_div(a.num_rows, kBlockRows), column_blocks = ceil_div(num_columns, kBlockColumns);
  parallel_for(row_blocks * column_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> panel(count(kBlockSteps * kBlockColumns)), sums(count(kBlockRows * kBlockColumns));
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t first_row = task % row_blocks * kBlockRows, first_column = task / row_blocks * kBlockColumns;
      const std::int64_t rows = std::min(kBlockRows, a.num_rows - first_row), columns = std::min(kBlockColumns, num_columns - first_column);
      for (std::int64_t step = 0; step < a.num_steps; step += kBlockSteps) {
        const std::int64_t steps = std::min(kBlockSteps, a.num_steps - step), panel_words = steps * kTileColumns;
        for (std::int64_t tile = 0; tile < ceil_div(columns, kTileColumns); ++tile)
          fill(first_column / kTileColumns + tile, step, steps, panel.data() + tile * panel_words);
        for (std::int64_t row = 0; row < rows; row += kernels.rows) {
          const std::uint32_t* const left = a.data + ((first_row + row) * a.num_steps + step * kernels.rows);
          for (std::int64_t column = 0; column < columns; column += kernels.columns)
            multiply({sums.data() + row * kBlockColumns + column, left, panel.data() + column / kTileColumns * panel_words, kBlockColumns,
                      panel_words, steps, step > 0});
        }
      }
      for (std::int64_t row = 0; row < rows; ++row) finish(first_row + row, first_column, columns, sums.data() + row * kBlockColumns);
    }
  });
}

// Fills the left operand: widened(row, line) gives the row's elements as words in line, num_steps of them.
template <typename F>
std::vector<std::uint32_t> pack_left(std::int64_t num_rows, std::int64_t num_steps, F&& widened) {
  const std::int64_t tile_rows = quantized_matmul_kernels.active().rows, num_tiles = ceil_div(num_rows, tile_rows);
  std::vector<std::uint32_t> result(count(num_tiles * tile_rows * num_steps));
  parallel_for(num_tiles, ceil_div(kGrainElements, tile_rows * num_steps), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> line(count(num_steps));
    for (std::int64_t row = begin * tile_rows; row < std::min(end * tile_rows, num_rows); ++row) {
      widened(row, line.data());
      std::uint32_t* const out = result.data() + row / tile_rows * tile_rows * num_steps + row % tile_rows;
      for (std::int64_t step = 0; step < num_steps; ++step) out[step * tile_rows] = line[count(step)];
    }
  });
  return result;
}

// Words from a multiple of 64 bytes on, so that no row of a tile lies in two lines of the cache.
class AlignedWords {
 public:
  explicit AlignedWords(std::int64_t num_words) : storage_(count(num_words + 16)) {
    void* start = storage_.data();
    std::size_t space = storage_.size() * 4;
    data_ = static_cast<std::uint32_t*>(std::align(64, count(num_words) * 4, start, space));
  }
  std::uint32_t* data() const { return data_; }

 private:
  std::vector<std::uint32_t> storage_;
  std::uint32_t* data_;
};

constexpr std::int64_t kAmxBlockRows = 512, kAmxFewRows = 128;

// Blocks of rows and columns of a product on AMX, by threads: block(first row, rows, first column, columns, panel, sums), where panel has
// room for kAmxSteps tiles of each of the columns' panels.
template <typename F>
void for_amx_blocks(std::int64_t num_rows, std::int64_t num_columns, F&& block) {
  const std::int64_t column_blocks = ceil_div(num_columns, std::int64_t{kAmxColumns});
  // A panel is filled again for each block of rows, so these are long unless threads would have nothing to do.
  const std::int64_t most = column_blocks * ceil_div(num_rows, kAmxBlockRows) >= 2 * num_threads() ? kAmxBlockRows : kAmxFewRows;
  const std::int64_t row_blocks = ceil_div(num_rows, most);
  parallel_for(row_blocks * column_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    const AlignedWords panel(kAmxSteps * kAmxTile * kAmxColumns);
    const AlignedWords sums(ceil_div(std::min(most, num_rows), std::int64_t{kAmxTile}) * kAmxTile * kAmxColumns);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t row = task % row_blocks * most, column = task / row_blocks * kAmxColumns;
      block(row, std::min(most, num_rows - row), column, std::min<std::int64_t>(kAmxColumns, num_columns - column), panel.data(),
            sums.data());
    }
  });
}

std::vector<float> widened_bias(const void* bias, DType dtype, std::int64_t n) {
  std::vector<float> result;
  if (bias == nullptr) return result;
  result.resize(count(n));
  quantized_matmul_kernels.active().widen[index(dtype)](result.data(), bias, n);
  return result;
}

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
