// Kernels that convert a token's keys or values to and from the cache's element type.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

/// One token's rows [num_heads, head_dim] on both sides; strides in elements.
struct KvRows {
  void* dst;
  const void* src;
  std::int64_t dst_head_stride, src_head_stride;
  std::int64_t num_heads, head_dim;
  const float* scale;         // null for 1
  std::int64_t scale_stride;  // 0: one scale; 1: one per head
};

using KvKernel = void (*)(const KvRows& rows);

/// Indexed by [dtype][cache dtype]: float32, float16, bfloat16, and those with float8_e4m3fn, float8_e5m2, int8, in DType's order.
struct KvKernels {
  KvKernel write[3][6];   // dst = saturate(src / scale)
  KvKernel gather[3][6];  // dst = src * scale
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

template <typename Dst, typename Src, typename F>
QUIRE_INLINE void convert_row(Dst* dst, const Src* src, std::int64_t n, F f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, f(load(src + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(dst + i, f(load(src + i, left)), left);
  }
}

template <bool kDivide, typename Dst, typename Src>
void convert_heads(const KvRows& rows) {
  Dst* dst = static_cast<Dst*>(rows.dst);
  const Src* src = static_cast<const Src*>(rows.src);
  const float* scale = rows.scale;
  for (std::int64_t head = 0; head < rows.num_heads; ++head) {
    if (scale == nullptr) {
      if constexpr (__is_same(Dst, Src))
        __builtin_memcpy(dst, src, static_cast<std::size_t>(rows.head_dim) * sizeof(Dst));
      else
        convert_row(dst, src, rows.head_dim, [](Vec v) QUIRE_LAMBDA_INLINE { return v; });
    } else {
      const Vec scale_v = set1(*scale);
      // A true division: multiplying by the reciprocal rounds twice.
      convert_row(dst, src, rows.head_dim, [scale_v](Vec v) QUIRE_LAMBDA_INLINE { return kDivide ? v / scale_v : v * scale_v; });
      scale += rows.scale_stride;
    }
    dst += rows.dst_head_stride;
    src += rows.src_head_stride;
  }
}

template <typename Cache, typename T>
void write_heads(const KvRows& rows) {
  convert_heads<true, Cache, T>(rows);
}
template <typename Cache, typename T>
void gather_heads(const KvRows& rows) {
  convert_heads<false, T, Cache>(rows);
}

#define QUIRE_KERNELS_BY_CACHE(kernel, T) \
  {kernel<float, T>, kernel<Half, T>, kernel<BFloat16, T>, kernel<Float8E4M3FN, T>, kernel<Float8E5M2, T>, kernel<std::int8_t, T>}
#define QUIRE_KERNELS(kernel) \
  {QUIRE_KERNELS_BY_CACHE(kernel, float), QUIRE_KERNELS_BY_CACHE(kernel, Half), QUIRE_KERNELS_BY_CACHE(kernel, BFloat16)}

extern const KvKernels kv_kernels;
const KvKernels kv_kernels = {QUIRE_KERNELS(write_heads), QUIRE_KERNELS(gather_heads)};

#undef QUIRE_KERNELS
#undef QUIRE_KERNELS_BY_CACHE

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
