// Quantizing on the CPU and undoing it, and sums of columns.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/numeric.h"
#include "cpu/isa/tables.h"
#include "cpu/quantize_row.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"
#include "ops/quantization.h"

namespace quire::cpu {
namespace {

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

}  // namespace quire::cpu
