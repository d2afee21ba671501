// Products with quantized operands on the CPU, at every instruction set of this machine, against double precision.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "core/numeric.h"
#include "cpu/isa/dispatch.h"
#include "ops/quantization.h"

namespace quire::cpu {
namespace {

std::vector<Isa> levels() {
  std::vector<Isa> result;
  for (Isa level : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Amx})
    if (level <= max_isa()) result.push_back(level);
  return result;
}

class Quantization : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { set_isa(GetParam()); }
  void TearDown() override { set_isa(max_isa()); }

  std::mt19937 random_{1};

  std::int64_t draw(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random_); }
  float normal() { return std::normal_distribution<float>()(random_); }
};

std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

TEST_P(Quantization, PackedWeights) {
  struct Shape {
    std::int64_t n, k, group_size;
  };
  for (const Shape s : {Shape{48, 256, 64}, {17, 96, 0}, {130, 300, 128}, {1, 33, 32}, {70, 1100, 64}})
    for (const int bits : {2, 3, 4, 8})
      for (const bool has_zeros : {false, true}) {
        WeightFormat f{s.k, s.n, bits, s.group_size, s.k, DType::kFloat32, has_zeros};
        const std::int64_t groups = f.num_groups(), size = s.group_size == 0 ? s.k : s.group_size;
        std::vector<std::uint8_t> codes(count(s.n * s.k)), zeros(count(s.n * groups), static_cast<std::uint8_t>(1 << (bits - 1)));
        std::vector<float> scales(zeros.size());
        for (auto& code : codes) code = static_cast<std::uint8_t>(draw(0, (1 << bits) - 1));
        for (auto& scale : scales) scale = 0.01f + 0.01f * std::abs(normal());
        if (has_zeros)
          for (auto& zero : zeros) zero = static_cast<std::uint8_t>(draw(0, (1 << bits) - 1));
        WeightSource source;
        source.codes = codes.data();
        source.scales = scales.data();
        source.zeros = has_zeros ? zeros.data() : nullptr;
        source.encoding = WeightEncoding::kCodes;
        source.bits = bits;
        source.in_features = source.num_rows = s.k;
        source.num_source_groups = groups;
        source.group_size = s.group_size;
        source.code_stride = s.k;
        source.zero_stride = source.scale_n_stride = groups;
        source.scale_group_stride = 1;
        std::vector<std::uint32_t> data(count((packed_weight_size(f) + 3) / 4));
        pack_weight(data.data(), f, source);
        std::vector<double> w(codes.size());
        for (std::int64_t i = 0; i < s.n; ++i)
          for (std::int64_t k = 0; k < s.k; ++k) {
            const std::size_t g = count(i * groups + k / size);
            w[count(i * s.k + k)] = (static_cast<float>(codes[count(i * s.k + k)]) - static_cast<float>(zeros[g])) * scales[g];
          }
        std::vector<float> undone(codes.size());
        const PackedParams packed{data.data(), nullptr, f};
        dequantize_weight(undone.data(), DType::kFloat32, s.k, packed);
        for (std::size_t i = 0; i < w.size(); ++i) ASSERT_EQ(undone[i], static_cast<float>(w[i])) << i;

        for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
          for (const auto& [tokens, batch_invariant] :
               {std::pair<std::int64_t, bool>{1, false}, {4, false}, {5, false}, {30, false}, {1, true}, {4, true}}) {
            std::vector<char> x(count(tokens * s.k * 4)), out(count(tokens * s.n * 4));
            std::vector<double> wide(count(tokens * s.k));
            dispatch_float(dtype, "test", [&](auto constant) {
              using T = HostType<constant()>;
              for (std::size_t i = 0; i < wide.size(); ++i) {
                const T value = from_float<T>(normal());
                reinterpret_cast<T*>(x.data())[i] = value;
                wide[i] = static_cast<double>(to_float(value));
              }
            });
            QuantizedMatmulParams p;
            p.out = out.data();
            p.x = x.data();
            p.dtype = dtype;
            p.num_tokens = tokens;
            p.out_stride = s.n;
            p.x_stride = s.k;
            p.weight = packed;
            p.batch_invariant = batch_invariant;
            quantized_matmul(p);
            const double ulp = dtype == DType::kFloat32 ? 0x1p-23 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
            // AMX multiplies with weights rounded to bfloat16.
            const bool rounds = GetParam() == Isa::kAvx512Amx && dtype == DType::kBFloat16 && (tokens > 4 || batch_invariant);
            const double relative = dtype == DType::kFloat32 ? 1e-6 : rounds ? 0x1p-9 : 0x1p-14;
            for (std::int64_t t = 0; t < tokens; ++t)
              for (std::int64_t n = 0; n < s.n; ++n) {
                double want = 0.0, magnitude = 0.0;
                for (std::int64_t k = 0; k < s.k; ++k) {
                  const double product = wide[count(t * s.k + k)] * w[count(n * s.k + k)];
                  want += product;
                  magnitude += std::abs(product);
                }
                const float got = dispatch_float(dtype, "test", [&](auto constant) {
                  return to_float(reinterpret_cast<const HostType<constant()>*>(out.data())[t * s.n + n]);
                });
                ASSERT_NEAR(got, want, ulp * std::abs(want) + relative * magnitude)
                    << bits << " bits, token " << t << " of " << tokens << ", feature " << n;
              }
          }
      }
}

TEST_P(Quantization, ScaledProducts) {
  struct Shape {
    std::int64_t m, n, k;
  };
  for (const Shape s : {Shape{1, 64, 128}, {3, 33, 100}, {8, 70, 300}, {9, 64, 256}, {45, 130, 515}, {530, 70, 1100}})
    for (const DType dtype : {DType::kInt8, DType::kFloat8E4M3FN})
      for (const bool by_block : {false, true}) {
        std::vector<std::int8_t> a(count(s.m * s.k)), b(count(s.n * s.k));
        for (auto* side : {&a, &b})
          for (auto& value : *side)
            value = dtype == DType::kInt8 ? static_cast<std::int8_t>(draw(-128, 127))
                                          : static_cast<std::int8_t>(from_float<Float8E4M3FN>(normal()).bits);
        const auto wide = [&](std::int8_t value) {
          return dtype == DType::kInt8 ? static_cast<double>(value)
                                       : static_cast<double>(to_float(Float8E4M3FN{static_cast<std::uint8_t>(value)}));
        };
        const std::int64_t blocks = (s.k + 127) / 128;
        std::vector<float> scale_a(count(s.m * blocks)), scale_b(count(s.n * blocks)), out(count(s.m * s.n));
        for (auto* scales : {&scale_a, &scale_b})
          for (auto& scale : *scales) scale = 0.01f + 0.01f * std::abs(normal());
        ScaledMatmulParams p;
        p.out = out.data();
        p.a = a.data();
        p.b = b.data();
        p.scale_a = scale_a.data();
        p.scale_b = scale_b.data();
        p.dtype = dtype;
        p.out_dtype = DType::kFloat32;
        p.granularity_a = by_block ? ScaleGranularity::kGroup : ScaleGranularity::kToken;
        p.granularity_b = by_block ? ScaleGranularity::kGroup : ScaleGranularity::kToken;
        p.m = s.m, p.n = s.n, p.k = s.k;
        p.out_stride = s.n;
        p.a_stride = p.b_stride = s.k;
        p.scale_a_row_stride = p.scale_b_row_stride = blocks;
        p.scale_a_group_stride = p.scale_b_group_stride = by_block ? 1 : 0;
        std::vector<std::int32_t> sums(count(s.n));
        const std::int32_t zero_point = dtype == DType::kInt8 && !by_block ? 77 : 0;
        if (zero_point != 0) {
          column_sums(sums.data(), b.data(), s.n, s.k, s.k);
          p.zero_point = &zero_point;
          p.column_sums = sums.data();
        }
        scaled_matmul(p);
        for (std::int64_t m = 0; m < s.m; ++m)
          for (std::int64_t n = 0; n < s.n; ++n) {
            double want = 0.0, magnitude = 0.0;
            for (std::int64_t k = 0; k < s.k; ++k) {
              const std::int64_t block = by_block ? k / 128 : 0;
              const double product = (wide(a[count(m * s.k + k)]) - zero_point) * wide(b[count(n * s.k + k)]) *
                                     static_cast<double>(scale_a[count(m * blocks + block)]) *
                                     static_cast<double>(scale_b[count((by_block ? n / 128 : n) * blocks + block)]);
              want += product;
              magnitude += std::abs(product);
            }
            ASSERT_NEAR(out[count(m * s.n + n)], want, 1e-6 * magnitude) << name(dtype) << " row " << m << " column " << n;
          }
      }
}

INSTANTIATE_TEST_SUITE_P(, Quantization, testing::ValuesIn(levels()), [](const auto& isa) { return std::string(name(isa.param)); });

}  // namespace
}  // namespace quire::cpu
