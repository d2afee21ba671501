// The CPU kernels at every instruction set of this machine against double-precision references: tails, strides, in-place,
// unaligned pointers, special values. Buffers end where the tensor ends, and padding is poisoned and checked.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/numeric.h"
#include "cpu/isa/dispatch.h"
#include "cpu/thread_pool.h"
#include "ops/activation.h"
#include "ops/kv_cache.h"
#include "ops/norm.h"
#include "ops/position_encoding.h"
#include "quire/error.h"
#include "quire/runtime.h"

namespace quire::cpu {

namespace {

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr DType kCacheTypes[] = {DType::kFloat32,      DType::kFloat16,    DType::kBFloat16,
                                 DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8};
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<Isa> levels() {
  std::vector<Isa> result;
  for (Isa level : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Amx})
    if (level <= max_isa()) result.push_back(level);
  return result;
}

float read(const void* data, DType dtype, std::int64_t i) {
  return dispatch_kv(dtype, "test", [&](auto constant) { return to_float(static_cast<const HostType<constant()>*>(data)[i]); });
}

void write(void* data, DType dtype, std::int64_t i, float value) {
  dispatch_kv(dtype, "test", [&](auto constant) {
    using T = HostType<constant()>;
    static_cast<T*>(data)[i] = from_float<T>(value);
  });
}

/// A heap block that ends with its last element and starts `offset` elements in, so that vectors are unaligned.
class Elements {
 public:
  Elements(DType dtype, std::int64_t count, std::int64_t offset = 0)
      : dtype_(dtype), count_(count), offset_(offset), bytes_(static_cast<std::size_t>((count + offset) * itemsize(dtype))) {}

  void* data() { return bytes_.data() + offset_ * itemsize(dtype_); }
  float operator[](std::int64_t i) const { return read(bytes_.data(), dtype_, i + offset_); }
  void set(std::int64_t i, float value) { write(data(), dtype_, i, value); }
  void fill(float value) {
    for (std::int64_t i = 0; i < count_; ++i) set(i, value);
  }
  void randomize(std::mt19937& rng, float low, float high) {
    std::uniform_real_distribution<float> distribution(low, high);
    for (std::int64_t i = 0; i < count_; ++i) set(i, distribution(rng));
  }
  DType dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }

 private:
  DType dtype_;
  std::int64_t count_, offset_;
  std::vector<char> bytes_;
};

/// Half an ulp of the dtype, and a few of float32's for the arithmetic, relative to `magnitude`.
double tolerance(DType dtype, double value, double magnitude, double relative = 4e-6) {
  const double arithmetic = relative * std::abs(magnitude) + 1e-37;
  switch (dtype) {
    case DType::kFloat16: return arithmetic + std::abs(value) * 0x1.02p-11 + 0x1p-25;
    case DType::kBFloat16: return arithmetic + std::abs(value) * 0x1.02p-8;
    default: return arithmetic;
  }
}

/// The same bits, or both NaN.
bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

class CpuIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    set_isa(GetParam());
    ASSERT_EQ(isa(), GetParam());
  }
  void TearDown() override {
    set_isa(max_isa());
    set_num_threads(threads_before_);
  }
  std::mt19937 rng{1234};

 private:
  int threads_before_ = num_threads();
};

TEST_P(CpuIsa, NameIsReported) { EXPECT_EQ(cpu_isa(), name(GetParam())); }

// ---- Norms -------------------------------------------------------------------------------------------------------------------

enum class Norm { kRms, kFusedAdd, kLayer };

struct NormCase {
  Norm norm;
  DType dtype, weight_dtype;
  std::int64_t hidden, num_rows, padding, offset;
  bool in_place, bias;
  float weight_offset;
};

void check_norm(const NormCase& c, std::mt19937& rng) {
  const std::int64_t stride = c.hidden + c.padding;
  const std::int64_t count = (c.num_rows - 1) * stride + c.hidden;
  Elements x(c.dtype, count, c.offset), out(c.dtype, count, c.offset), residual(c.dtype, count, c.offset);
  Elements weight(c.weight_dtype, c.hidden, c.offset), bias(c.weight_dtype, c.hidden, c.offset);
  // Padding between rows is NaN: it may neither be read nor be written.
  x.fill(kNan), out.fill(kNan), residual.fill(kNan);
  std::uniform_real_distribution<float> distribution(-3.0f, 3.0f);
  for (std::int64_t row = 0; row < c.num_rows; ++row)
    for (std::int64_t i = 0; i < c.hidden; ++i) {
      x.set(row * stride + i, distribution(rng) + (c.norm == Norm::kLayer ? 5.0f : 0.0f));
      residual.set(row * stride + i, distribution(rng));
    }
  weight.randomize(rng, -2.0f, 2.0f);
  bias.randomize(rng, -2.0f, 2.0f);

  std::vector<double> input(static_cast<std::size_t>(count)), sums(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    input[at] = static_cast<double>(x[i]);
    if (c.norm != Norm::kFusedAdd) continue;
    // Rounded to the dtype before it is normalised.
    write(&sums[at], c.dtype, 0, x[i] + residual[i]);
    input[at] = sums[at] = static_cast<double>(read(&sums[at], c.dtype, 0));
  }

  const bool over_x = c.in_place || c.norm == Norm::kFusedAdd;
  Elements& result = over_x ? x : out;
  const double eps = 1e-3;
  NormParams p;
  p.out = result.data(), p.x = x.data(), p.weight = weight.data();
  p.bias = c.bias ? bias.data() : nullptr;
  p.residual = c.norm == Norm::kFusedAdd ? residual.data() : nullptr;
  p.dtype = c.dtype, p.weight_dtype = p.bias_dtype = c.weight_dtype;
  p.num_rows = c.num_rows, p.hidden = c.hidden;
  p.out_rows.strides[0] = p.x_rows.strides[0] = p.residual_rows.strides[0] = stride;
  p.eps = static_cast<float>(eps), p.weight_offset = c.weight_offset;
  (c.norm == Norm::kRms ? rms_norm : c.norm == Norm::kLayer ? layer_norm : fused_add_rms_norm)(p);

  for (std::int64_t row = 0; row < c.num_rows; ++row) {
    double mean = 0, square = 0;
    for (std::int64_t i = 0; i < c.hidden; ++i) mean += input[static_cast<std::size_t>(row * stride + i)];
    mean = c.norm == Norm::kLayer ? mean / static_cast<double>(c.hidden) : 0.0;
    for (std::int64_t i = 0; i < c.hidden; ++i) square += std::pow(input[static_cast<std::size_t>(row * stride + i)] - mean, 2);
    const double scale = 1 / std::sqrt(square / static_cast<double>(c.hidden) + static_cast<double>(static_cast<float>(eps)));
    for (std::int64_t i = 0; i < stride && row * stride + i < count; ++i) {
      const std::int64_t at = row * stride + i;
      if (i >= c.hidden) {
        EXPECT_TRUE(std::isnan(result[at]));
        continue;
      }
      const double v = input[static_cast<std::size_t>(at)], w = static_cast<double>(weight[i]);
      const double b = c.bias ? static_cast<double>(bias[i]) : 0.0, offset = static_cast<double>(c.weight_offset);
      const double expected = (v - mean) * scale * (w + offset) + b;
      const double magnitude = (std::abs(v) + std::abs(mean)) * scale * (std::abs(w) + offset) + std::abs(b);
      ASSERT_NEAR(static_cast<double>(result[at]), expected, tolerance(c.dtype, expected, magnitude))
          << "norm " << static_cast<int>(c.norm) << " " << name(c.dtype) << " weight " << name(c.weight_dtype) << " hidden " << c.hidden
          << " row " << row << " column " << i << " in_place " << c.in_place;
      if (c.norm == Norm::kFusedAdd) {
        ASSERT_EQ(static_cast<double>(residual[at]), sums[static_cast<std::size_t>(at)]);
      }
    }
  }
}

TEST_P(CpuIsa, NormsOfEveryWidth) {
  for (std::int64_t hidden = 1; hidden <= 130; ++hidden)
    for (DType dtype : kFloats) {
      const DType weight_dtype = kFloats[static_cast<std::size_t>(hidden) % 3];
      const bool odd = hidden % 2;
      check_norm({Norm::kRms, dtype, weight_dtype, hidden, 3, odd ? 3 : 0, odd, false, false, odd ? 1.0f : 0.0f}, rng);
      check_norm({Norm::kRms, dtype, dtype, hidden, 2, 1, 0, true, false, 0.0f}, rng);
      check_norm({Norm::kFusedAdd, dtype, weight_dtype, hidden, 3, odd ? 5 : 0, odd, false, false, odd ? 0.0f : 1.0f}, rng);
      check_norm({Norm::kLayer, dtype, weight_dtype, hidden, 3, odd ? 3 : 0, odd, false, odd, 0.0f}, rng);
      check_norm({Norm::kLayer, dtype, dtype, hidden, 2, 1, 0, true, !odd, 0.0f}, rng);
    }
}

TEST_P(CpuIsa, NormsOfEveryWeightType) {
  for (DType dtype : kFloats)
    for (DType weight_dtype : kFloats)
      for (std::int64_t hidden : {5, 64, 129, 1031})
        for (Norm norm : {Norm::kRms, Norm::kFusedAdd, Norm::kLayer})
          check_norm({norm, dtype, weight_dtype, hidden, 2, 0, 0, false, norm == Norm::kLayer, 0.0f}, rng);
}

TEST_P(CpuIsa, NormsOverThreads) {
  set_num_threads(4);
  for (DType dtype : kFloats)
    for (Norm norm : {Norm::kRms, Norm::kFusedAdd, Norm::kLayer})
      check_norm({norm, dtype, dtype, 515, 400, 7, 1, false, norm == Norm::kLayer, 0.0f}, rng);
}

TEST_P(CpuIsa, NormsOfStridedRank4) {
  // x is [3, 4, 5, 33] seen through other strides than out's.
  constexpr std::int64_t kExtents[3] = {3, 4, 5}, kHidden = 33;
  Elements x(DType::kFloat32, 3 * 4 * 5 * 40), out(DType::kFloat32, 3 * 4 * 5 * kHidden), weight(DType::kFloat32, kHidden);
  x.randomize(rng, -1.0f, 1.0f);
  weight.fill(1.0f);
  NormParams p;
  p.out = out.data(), p.x = x.data(), p.weight = weight.data();
  p.num_rows = 60, p.hidden = kHidden;
  p.out_rows.strides[0] = kHidden;
  p.x_rows.inner_extents[0] = kExtents[1], p.x_rows.inner_extents[1] = kExtents[2];
  p.x_rows.strides[0] = 40, p.x_rows.strides[1] = 3 * 40, p.x_rows.strides[2] = 3 * 4 * 40;
  rms_norm(p);
  std::int64_t row = 0;
  for (std::int64_t a = 0; a < 3; ++a)
    for (std::int64_t b = 0; b < 4; ++b)
      for (std::int64_t d = 0; d < 5; ++d, ++row) {
        const std::int64_t base = a * 40 + b * 120 + d * 480;
        double square = 0;
        for (std::int64_t i = 0; i < kHidden; ++i) square += std::pow(static_cast<double>(x[base + i]), 2);
        for (std::int64_t i = 0; i < kHidden; ++i) {
          const double expected = static_cast<double>(x[base + i]) / std::sqrt(square / kHidden);
          ASSERT_NEAR(static_cast<double>(out[row * kHidden + i]), expected, 1e-6) << row;
        }
      }
}

TEST_P(CpuIsa, LayerNormWithBiasOfAnotherType) {
  constexpr std::int64_t kHidden = 77;
  Elements x(DType::kBFloat16, kHidden), out(DType::kBFloat16, kHidden), weight(DType::kFloat16, kHidden), bias(DType::kFloat32, kHidden);
  x.randomize(rng, -1.0f, 1.0f), weight.randomize(rng, -1.0f, 1.0f), bias.randomize(rng, -1.0f, 1.0f);
  NormParams p;
  p.out = out.data(), p.x = x.data(), p.weight = weight.data(), p.bias = bias.data();
  p.dtype = DType::kBFloat16, p.weight_dtype = DType::kFloat16, p.bias_dtype = DType::kFloat32;
  p.num_rows = 1, p.hidden = kHidden, p.eps = 1e-5f;
  layer_norm(p);
  double mean = 0, square = 0;
  for (std::int64_t i = 0; i < kHidden; ++i) mean += static_cast<double>(x[i]) / kHidden;
  for (std::int64_t i = 0; i < kHidden; ++i) square += std::pow(static_cast<double>(x[i]) - mean, 2) / kHidden;
  for (std::int64_t i = 0; i < kHidden; ++i) {
    const double scaled = (static_cast<double>(x[i]) - mean) / std::sqrt(square + 1e-5) * static_cast<double>(weight[i]);
    const double expected = scaled + static_cast<double>(bias[i]);
    EXPECT_NEAR(static_cast<double>(out[i]), expected, tolerance(DType::kBFloat16, expected, 4.0));
  }
}

TEST_P(CpuIsa, LayerNormWithALargeMean) {
  constexpr std::int64_t kHidden = 1000;
  Elements x(DType::kFloat32, kHidden), out(DType::kFloat32, kHidden), weight(DType::kFloat32, kHidden);
  weight.fill(1.0f);
  for (std::int64_t i = 0; i < kHidden; ++i) x.set(i, 4096.0f + static_cast<float>(i % 2));
  NormParams p;
  p.out = out.data(), p.x = x.data(), p.weight = weight.data(), p.num_rows = 1, p.hidden = kHidden, p.eps = 0.0f;
  layer_norm(p);
  for (std::int64_t i = 0; i < kHidden; ++i) ASSERT_NEAR(out[i], i % 2 ? 1.0f : -1.0f, 2e-3f);
}

// ---- Activations -------------------------------------------------------------------------------------------------------------

constexpr Activation kActivations[] = {Activation::kSilu,     Activation::kGelu,      Activation::kGeluTanh,   Activation::kGeluNew,
                                       Activation::kGeluFast, Activation::kGeluQuick, Activation::kReluSquared};

bool is_gated(Activation a) { return a == Activation::kSilu || a == Activation::kGelu || a == Activation::kGeluTanh; }

double activate(Activation a, double x) {
  switch (a) {
    case Activation::kSilu: return x / (1 + std::exp(-x));
    case Activation::kGelu: return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
    case Activation::kGeluNew:
    case Activation::kGeluFast: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kGeluQuick: return x / (1 + std::exp(-1.702 * x));
    case Activation::kReluSquared: return x > 0 ? x * x : 0;
  }
  return 0;
}

void check_activation(Activation a, DType dtype, std::int64_t width, std::int64_t num_rows, std::int64_t padding, std::int64_t offset,
                      bool in_place, std::mt19937& rng) {
  const bool gated = is_gated(a);
  const std::int64_t x_width = gated ? 2 * width : width, x_stride = x_width + padding, out_stride = width + padding;
  Elements x(dtype, (num_rows - 1) * x_stride + x_width, offset), out(dtype, (num_rows - 1) * out_stride + width, offset);
  x.fill(kNan), out.fill(kNan);
  std::uniform_real_distribution<float> distribution(-6.0f, 6.0f);
  for (std::int64_t row = 0; row < num_rows; ++row)
    for (std::int64_t i = 0; i < x_width; ++i) x.set(row * x_stride + i, distribution(rng));
  const Elements before = x;
  Elements& result = in_place ? x : out;
  ActivationParams p;
  p.out = result.data(), p.x = x.data(), p.dtype = dtype, p.activation = a, p.gated = gated;
  p.num_rows = num_rows, p.width = width, p.out_rows.strides[0] = out_stride, p.x_rows.strides[0] = x_stride;
  activation(p);
  for (std::int64_t row = 0; row < num_rows; ++row)
    for (std::int64_t i = 0; i < out_stride && row * out_stride + i < result.count(); ++i) {
      const double got = static_cast<double>(result[row * out_stride + i]);
      if (i >= width) {
        EXPECT_TRUE(std::isnan(got));
        continue;
      }
      const double up = gated ? static_cast<double>(before[row * x_stride + width + i]) : 1.0;
      const double expected = activate(a, static_cast<double>(before[row * x_stride + i])) * up;
      ASSERT_NEAR(got, expected, tolerance(dtype, expected, expected, 1e-5))
          << "activation " << static_cast<int>(a) << " " << name(dtype) << " width " << width << " row " << row << " column " << i;
    }
}

TEST_P(CpuIsa, ActivationsOfEveryWidth) {
  for (Activation a : kActivations)
    for (DType dtype : kFloats)
      for (std::int64_t width = 1; width <= 130; ++width) {
        const bool odd = width % 2;
        check_activation(a, dtype, width, 3, odd ? 5 : 0, odd, false, rng);
        if (!is_gated(a)) check_activation(a, dtype, width, 2, odd ? 1 : 0, 0, true, rng);
      }
}

TEST_P(CpuIsa, ActivationsOverThreads) {
  set_num_threads(4);
  for (DType dtype : kFloats) {
    check_activation(Activation::kSilu, dtype, 517, 200, 3, 1, false, rng);
    check_activation(Activation::kSilu, dtype, 20011, 3, 3, 1, false, rng);
    check_activation(Activation::kReluSquared, dtype, 40009, 1, 0, 0, true, rng);
  }
}

TEST_P(CpuIsa, ActivationsOfSpecialValues) {
  for (DType dtype : kFloats)
    for (Activation a : kActivations) {
      constexpr std::int64_t kWidth = 37;
      Elements x(dtype, 2 * kWidth), out(dtype, kWidth);
      const float specials[] = {0.0f, -0.0f, kNan, static_cast<float>(kInf), 100.0f, -100.0f, 1e4f, -1e4f, 1e-6f, -1e-6f, 30.0f, -30.0f};
      const auto special = [&](std::int64_t i) { return specials[static_cast<std::size_t>(i) % std::size(specials)]; };
      for (std::int64_t i = 0; i < kWidth; ++i) x.set(i, special(i)), x.set(kWidth + i, 1.0f);
      ActivationParams p;
      p.out = out.data(), p.x = x.data(), p.dtype = dtype, p.activation = a, p.gated = is_gated(a);
      p.num_rows = 1, p.width = kWidth, p.out_rows.strides[0] = kWidth, p.x_rows.strides[0] = 2 * kWidth;
      activation(p);
      for (std::int64_t i = 0; i < kWidth; ++i) {
        const double v = static_cast<double>(x[i]), got = static_cast<double>(out[i]);
        if (std::isnan(v)) {
          EXPECT_TRUE(std::isnan(got));
          continue;
        }
        double expected = activate(a, v);
        if (dtype == DType::kFloat16 && expected > 65504) expected = kInf;
        if (std::isinf(expected))
          EXPECT_EQ(got, expected);
        else
          EXPECT_NEAR(got, expected, tolerance(dtype, expected, expected, 3e-5)) << static_cast<int>(a) << " " << v;
      }
    }
}

// ---- Rotary position encoding --------------------------------------------------------------------------------------------------

TEST_P(CpuIsa, RotaryOfEveryWidth) {
  for (RopeStyle style : {RopeStyle::kNeox, RopeStyle::kGptj})
    for (DType dtype : kFloats)
      for (DType cache_dtype : kFloats)
        for (std::int64_t rotary_dim = 2; rotary_dim <= 130; rotary_dim += 2) {
          const bool partial = rotary_dim % 4 == 0;
          const std::int64_t head_dim = rotary_dim + (partial ? 6 : 0), padding = partial ? 3 : 0, head_stride = head_dim + padding;
          const std::int64_t num_tokens = 5, num_heads = 3, num_kv_heads = 2, max_position = 7;
          const std::int64_t q_stride = num_heads * head_stride, k_stride = num_kv_heads * head_stride;
          Elements q(dtype, num_tokens * q_stride, 1), k(dtype, num_tokens * k_stride, 1), table(cache_dtype, max_position * rotary_dim, 1);
          q.randomize(rng, -2.0f, 2.0f), k.randomize(rng, -2.0f, 2.0f), table.randomize(rng, -1.0f, 1.0f);
          const Elements q_before = q, k_before = k;
          const std::int64_t positions[num_tokens] = {3, -1, 6, 7, 0};
          RotaryParams p;
          p.positions = positions, p.q = q.data(), p.k = rotary_dim % 6 == 0 ? nullptr : k.data(), p.cos_sin_cache = table.data();
          p.dtype = dtype, p.cache_dtype = cache_dtype, p.style = style;
          p.num_tokens = num_tokens, p.num_heads = num_heads, p.num_kv_heads = num_kv_heads;
          p.head_dim = head_dim, p.rotary_dim = rotary_dim, p.max_position = max_position;
          p.q_token_stride = q_stride, p.k_token_stride = k_stride, p.q_head_stride = p.k_head_stride = head_stride;
          rotary_embedding(p);
          EXPECT_THROW(check_errors(Device{}), IndexError);  // position 7

          const auto check = [&](const Elements& got, const Elements& before, std::int64_t heads, bool rotated) {
            for (std::int64_t token = 0; token < num_tokens; ++token)
              for (std::int64_t head = 0; head < heads; ++head)
                for (std::int64_t i = 0; i < head_stride; ++i) {
                  const std::int64_t base = (token * heads + head) * head_stride, position = positions[token];
                  if (!rotated || i >= rotary_dim || position < 0 || position >= max_position) {
                    ASSERT_EQ(got[base + i], before[base + i]);
                    continue;
                  }
                  const std::int64_t half = rotary_dim / 2;
                  const bool neox = style == RopeStyle::kNeox;
                  const std::int64_t angle = neox ? i % half : i / 2, a_at = neox ? angle : 2 * angle,
                                     b_at = neox ? angle + half : a_at + 1;
                  const double cos_v = static_cast<double>(table[position * rotary_dim + angle]);
                  const double sin_v = static_cast<double>(table[position * rotary_dim + half + angle]);
                  const double a = static_cast<double>(before[base + a_at]), b = static_cast<double>(before[base + b_at]);
                  const double expected = i == a_at ? a * cos_v - b * sin_v : b * cos_v + a * sin_v;
                  ASSERT_NEAR(static_cast<double>(got[base + i]), expected, tolerance(dtype, expected, std::abs(a) + std::abs(b), 5e-7))
                      << name(dtype) << " rotary_dim " << rotary_dim << " token " << token << " head " << head << " element " << i;
                }
          };
          check(q, q_before, num_heads, true);
          check(k, k_before, num_kv_heads, p.k != nullptr);
        }
}

// ---- KV cache ------------------------------------------------------------------------------------------------------------------

// Every bit pattern of a 16-bit float, as x of `dtype`, rounds into the cache as the host's conversion does.
TEST_P(CpuIsa, CacheConversionsOfEveryHalf) {
  for (DType dtype : kFloats)
    for (DType cache_dtype : kCacheTypes) {
      constexpr std::int64_t kCount = 1 << 16;
      Elements k(dtype, kCount), v(dtype, kCount), k_cache(cache_dtype, kCount), v_cache(cache_dtype, kCount);
      std::uniform_int_distribution<std::uint32_t> low_bits(0, 0xffff);
      for (std::uint32_t i = 0; i < kCount; ++i) {
        const auto bits16 = static_cast<std::uint16_t>(i);
        if (dtype == DType::kFloat32) {
          // k covers all exponents; v's low half is a rounding boundary or next to one.
          static_cast<std::uint32_t*>(k.data())[i] = i << 16 | low_bits(rng);
          static_cast<std::uint32_t*>(v.data())[i] = (i << 16) + 0x8000u * (i % 2) + (i % 3) - 1u;
        } else {
          static_cast<std::uint16_t*>(k.data())[i] = bits16;
          static_cast<std::uint16_t*>(v.data())[i] = static_cast<std::uint16_t>(~i);
        }
      }
      const std::int64_t slot = 0;
      KvParams p;
      p.k = k.data(), p.v = v.data(), p.k_cache = k_cache.data(), p.v_cache = v_cache.data(), p.slot_mapping = &slot;
      p.dtype = dtype, p.cache_dtype = cache_dtype;
      p.num_tokens = p.num_kv_heads = p.num_blocks = p.block_size = 1, p.head_dim = kCount;
      write_kv(p);
      for (std::int64_t i = 0; i < kCount; ++i)
        for (const auto& [in, out] : {std::pair{&k, &k_cache}, std::pair{&v, &v_cache}}) {
          double bytes = 0;
          write(&bytes, cache_dtype, 0, (*in)[i]);
          const float expected = read(&bytes, cache_dtype, 0), got = (*out)[i];
          ASSERT_TRUE(same(got, expected)) << name(dtype) << " to " << name(cache_dtype) << " of " << (*in)[i] << ": " << got;
        }
      // And back.
      Elements k_read(dtype, kCount), v_read(dtype, kCount);
      p.k = k_read.data(), p.v = v_read.data();
      gather_kv(p);
      for (std::int64_t i = 0; i < kCount; ++i)
        for (const auto& [cache, out] : {std::pair{&k_cache, &k_read}, std::pair{&v_cache, &v_read}}) {
          double bytes = 0;
          write(&bytes, dtype, 0, (*cache)[i]);
          const float expected = read(&bytes, dtype, 0), got = (*out)[i];
          ASSERT_TRUE(same(got, expected)) << name(cache_dtype) << " to " << name(dtype) << " of " << (*cache)[i] << ": " << got;
        }
    }
}

struct KvCase {
  DType dtype, cache_dtype;
  std::int64_t head_dim, padding, scale_stride;
  bool scaled;
};

void check_kv(const KvCase& c, std::mt19937& rng) {
  const std::int64_t num_kv_heads = 3, num_blocks = 4, block_size = 5, num_tokens = 9;
  const std::int64_t head_stride = c.head_dim + c.padding, token_stride = num_kv_heads * head_stride;
  // The cache is stored [num_blocks, num_kv_heads, block_size, head_dim] with padding between rows.
  const std::int64_t cache_row = c.head_dim + c.padding, cache_count = num_blocks * num_kv_heads * block_size * cache_row;
  Elements k(c.dtype, num_tokens * token_stride, 1), v(c.dtype, num_tokens * token_stride, 1);
  Elements k_cache(c.cache_dtype, cache_count, 1), v_cache(c.cache_dtype, cache_count, 1);
  k.randomize(rng, -500.0f, 500.0f), v.randomize(rng, -0.1f, 0.1f);
  k_cache.fill(17.0f), v_cache.fill(17.0f);
  const float k_scale[3] = {0.7f, 3.0f, 1.5f}, v_scale[3] = {0.001f, 0.01f, 0.0013f};
  const std::int32_t slots[2 * num_tokens] = {4, 0, -1, 0, 19, 0, 20, 0, 0, 0, -7, 0, 7, 0, 12, 0, 2147483647, 0};
  KvParams p;
  p.k = k.data(), p.v = v.data(), p.k_cache = k_cache.data(), p.v_cache = v_cache.data();
  p.slot_mapping = slots, p.slot_dtype = DType::kInt32, p.slot_stride = 2;
  p.k_scale = c.scaled ? k_scale : nullptr, p.v_scale = c.scaled ? v_scale : nullptr;
  p.k_scale_stride = p.v_scale_stride = c.scale_stride;
  p.dtype = c.dtype, p.cache_dtype = c.cache_dtype;
  p.num_tokens = num_tokens, p.num_kv_heads = num_kv_heads, p.head_dim = c.head_dim, p.num_blocks = num_blocks, p.block_size = block_size;
  p.k_token_stride = p.v_token_stride = token_stride, p.k_head_stride = p.v_head_stride = head_stride;
  p.k_cache_block_stride = p.v_cache_block_stride = num_kv_heads * block_size * cache_row;
  p.k_cache_slot_stride = p.v_cache_slot_stride = cache_row, p.k_cache_head_stride = p.v_cache_head_stride = block_size * cache_row;
  write_kv(p);
  EXPECT_THROW(check_errors(Device{}), IndexError);
  EXPECT_NO_THROW(check_errors(Device{}));

  const auto slot_of = [&](std::int64_t token) -> std::int64_t {
    const std::int64_t slot = slots[2 * token];
    return slot >= 0 && slot < num_blocks * block_size ? slot : -1;
  };
  const auto cache_at = [&](std::int64_t slot, std::int64_t head, std::int64_t i) {
    return ((slot / block_size * num_kv_heads + head) * block_size + slot % block_size) * cache_row + i;
  };
  for (bool is_k : {true, false}) {
    Elements expected(c.cache_dtype, cache_count);
    expected.fill(17.0f);
    const Elements& source = is_k ? k : v;
    for (std::int64_t token = 0; token < num_tokens; ++token)
      for (std::int64_t head = 0; head < num_kv_heads && slot_of(token) >= 0; ++head)
        for (std::int64_t i = 0; i < c.head_dim; ++i) {
          const float scale = c.scaled ? (is_k ? k_scale : v_scale)[head * c.scale_stride] : 1.0f;
          expected.set(cache_at(slot_of(token), head, i), source[token * token_stride + head * head_stride + i] / scale);
        }
    for (std::int64_t i = 0; i < cache_count; ++i)
      ASSERT_EQ((is_k ? k_cache : v_cache)[i], expected[i]) << name(c.dtype) << " to " << name(c.cache_dtype) << " head_dim " << c.head_dim;
  }

  Elements k_read(c.dtype, num_tokens * token_stride, 1), v_read(c.dtype, num_tokens * token_stride, 1);
  k_read.fill(17.0f), v_read.fill(17.0f);
  p.k = k_read.data(), p.v = v_read.data();
  gather_kv(p);
  EXPECT_THROW(check_errors(Device{}), IndexError);
  for (bool is_k : {true, false})
    for (std::int64_t token = 0; token < num_tokens; ++token)
      for (std::int64_t head = 0; head < num_kv_heads; ++head)
        for (std::int64_t i = 0; i < head_stride; ++i) {
          float value = 17.0f;
          if (i < c.head_dim) {
            const float scale = c.scaled ? (is_k ? k_scale : v_scale)[head * c.scale_stride] : 1.0f;
            value = slot_of(token) < 0 ? 0.0f : (is_k ? k_cache : v_cache)[cache_at(slot_of(token), head, i)] * scale;
          }
          double bytes = 0;
          write(&bytes, c.dtype, 0, value);
          ASSERT_EQ((is_k ? k_read : v_read)[token * token_stride + head * head_stride + i], read(&bytes, c.dtype, 0));
        }
}

TEST_P(CpuIsa, KvOfEveryWidth) {
  for (DType dtype : kFloats)
    for (DType cache_dtype : kCacheTypes)
      for (std::int64_t head_dim = 1; head_dim <= 130; head_dim += head_dim < 40 ? 1 : 9) {
        const bool scaled = cache_dtype > DType::kBFloat16 && head_dim % 4 != 0;
        check_kv({dtype, cache_dtype, head_dim, head_dim % 2 ? 3 : 0, head_dim % 3 == 0 ? 0 : 1, scaled}, rng);
      }
}

TEST_P(CpuIsa, KvOfDenseHeadsOverThreads) {
  set_num_threads(4);
  const std::int64_t num_tokens = 3000, num_kv_heads = 2, head_dim = 24, block_size = 16, num_blocks = 200, row = num_kv_heads * head_dim;
  Elements k(DType::kFloat32, num_tokens * row), v(DType::kFloat32, num_tokens * row);
  Elements k_cache(DType::kBFloat16, num_blocks * block_size * row), v_cache(DType::kBFloat16, num_blocks * block_size * row);
  k.randomize(rng, -1.0f, 1.0f), v.randomize(rng, -1.0f, 1.0f);
  std::vector<std::int64_t> slots(static_cast<std::size_t>(num_tokens));
  for (std::int64_t t = 0; t < num_tokens; ++t) slots[static_cast<std::size_t>(t)] = (t * 1009) % (num_blocks * block_size);
  KvParams p;
  p.k = k.data(), p.v = v.data(), p.k_cache = k_cache.data(), p.v_cache = v_cache.data(), p.slot_mapping = slots.data();
  p.cache_dtype = DType::kBFloat16;
  p.num_tokens = num_tokens, p.num_kv_heads = num_kv_heads, p.head_dim = head_dim, p.num_blocks = num_blocks, p.block_size = block_size;
  p.k_token_stride = p.v_token_stride = row, p.k_head_stride = p.v_head_stride = head_dim;
  p.k_cache_block_stride = p.v_cache_block_stride = block_size * row;
  p.k_cache_slot_stride = p.v_cache_slot_stride = row, p.k_cache_head_stride = p.v_cache_head_stride = head_dim;
  write_kv(p);
  for (std::int64_t t = 0; t < num_tokens; ++t)
    for (std::int64_t i = 0; i < row; ++i) {
      const std::int64_t at = slots[static_cast<std::size_t>(t)] * row + i;
      ASSERT_EQ(k_cache[at], to_float(from_float<BFloat16>(k[t * row + i])));
      ASSERT_EQ(v_cache[at], to_float(from_float<BFloat16>(v[t * row + i])));
    }
}

TEST(CpuCopyBlocks, CopiesPairsAndGuardsThem) {
  // Blocks of 3 segments of 70001 bytes, with gaps between segments and blocks.
  const std::int64_t num_blocks = 8, segment = 70001, segment_stride = 70010, block_stride = 3 * segment_stride + 5;
  std::vector<std::uint8_t> cache(static_cast<std::size_t>(num_blocks * block_stride));
  for (std::size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<std::uint8_t>(i * 2654435761u >> 13);
  const std::vector<std::uint8_t> before = cache;
  const std::int32_t pairs[] = {0, 4, 1, 5, -1, 6, 8, 6, 2, -1, 2, 99, 3, 3};
  CopyBlocksParams p;
  p.cache = cache.data(), p.pairs = pairs, p.pair_dtype = DType::kInt32, p.num_pairs = 7;
  p.num_blocks = num_blocks, p.block_stride_bytes = block_stride;
  p.num_segments = 3, p.segment_bytes = segment, p.segment_stride_bytes = segment_stride;
  copy_blocks(p);
  EXPECT_THROW(check_errors(Device{}), IndexError);
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const std::int64_t source = block == 4 ? 0 : block == 5 ? 1 : block;
    for (std::int64_t i = 0; i < block_stride; ++i) {
      const bool inside = i < 3 * segment_stride && i % segment_stride < segment;
      ASSERT_EQ(cache[static_cast<std::size_t>(block * block_stride + i)],
                before[static_cast<std::size_t>((inside ? source : block) * block_stride + i)]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, CpuIsa, ::testing::ValuesIn(levels()), [](const auto& info) { return std::string(name(info.param)); });

}  // namespace
}  // namespace quire::cpu
