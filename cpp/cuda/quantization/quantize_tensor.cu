// Quantizing by one scale that is computed for the whole tensor.
// SPDX-License-Identifier: Apache-2.0
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/launch.h"
#include "cuda/quantization/quantize_launch.h"
#include "cuda/quantization/quantize_result.cuh"

namespace quire::cuda::quant {

namespace {

constexpr int kTensorThreads = 1024;

// Grid: CTAs of 512 threads share the rows of x, kCount elements to a thread at a time. The range goes to scales[0] and zero_points[0], as bits
// of floats that are not negative and so order as integers do; both are 0 before.
template <typename T, int kCount, bool kAsymmetric>
__global__ void __launch_bounds__(kMaxThreads) tensor_range_kernel(const __grid_constant__ QuantizeParams p) {
  __shared__ float scratch[2][kWarpSize];
  const std::int64_t row_vectors = p.width / kCount, total = p.num_rows * row_vectors;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  Range range;
  constexpr int kInFlight = 4;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < total; first += kInFlight * stride) {
    Packed<T, kCount> packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      packed[i] = {};
      const std::int64_t item = first + i * stride;
      if (item >= total) continue;
      const std::int64_t row = p.num_rows == 1 ? 0 : divide(item, row_vectors);
      packed[i] = load_packed<T, kCount>(static_cast<const T*>(p.x) + p.x_rows.offset(row) + (item - row * row_vectors) * kCount);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) extend<kAsymmetric, T, kCount>(range, packed[i]);
  }
  range.above = cta_max(range.above, scratch[0]);
  if constexpr (kAsymmetric) range.below = cta_max(range.below, scratch[1]);
  // What it adds to is cleared by then; x was there before that began.
  device::wait_for_predecessor();
  if (threadIdx.x != 0) return;
  atomicMax(reinterpret_cast<unsigned*>(p.quant.scales), __float_as_uint(range.above));
  if constexpr (kAsymmetric) atomicMax(reinterpret_cast<unsigned*>(p.zero_points), __float_as_uint(range.below));
}

// Grid: one thread.
template <bool kAsymmetric>
__global__ void clear_tensor_range_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  p.quant.scales[0] = 0.0f;
  if constexpr (kAsymmetric) p.zero_points[0] = 0;
}

// Grid: one thread. The range that tensor_range_kernel left becomes scale and zero point.
template <Result kResult>
__global__ void tensor_scale_kernel(const __grid_constant__ QuantizeParams p) {
  device::launch_dependents();
  device::wait_for_predecessor();
  Range range;
  range.above = p.quant.scales[0];
  if constexpr (kResult == Result::kAsymmetricInt8) range.below = __int_as_float(p.zero_points[0]);
  write_scale<kResult>(p, 0, 0, computed<kResult>(p, range));
}

constexpr int kRegisterWords = 4;  // of a thread
constexpr int kTensorSlots = 5;    // words of a thread that are on their way at the second reading

// Grid: CTAs that all run at once divide x, which is dense, as num_words words of 16 bytes. While all find the tensor's range a CTA holds the first
// `most_held` words of its part in shared memory and the next ones in registers; the rest it reads again, the last words first: the L2 cache still has
// those. The CTAs' ranges lie at the beginning of the result, which is written last.
template <typename T, Result kResult>
__global__ void __launch_bounds__(kTensorThreads, 1)
    quantize_tensor_kernel(const __grid_constant__ QuantizeParams p, const std::int64_t num_words, const int most_held) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr int kCount = kElementsPer16Bytes<T>, kInFlight = 4, kBatches = 3;
  extern __shared__ __align__(16) uint4 held[];
  __shared__ float scratch[4][kWarpSize];
  using Word = Packed<T, kCount>;
  const auto grid = cooperative_groups::this_grid();
  const int thread = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x), num_ctas = static_cast<int>(gridDim.x);
  const std::int64_t share = ceil_div(num_words, num_ctas), first_word = share * cta;
  const int count = static_cast<int>(max(min(num_words - first_word, share), std::int64_t{0}));
  const int num_held = min(count, most_held), first_rest = min(count, num_held + kRegisterWords * kTensorThreads);
  const uint4* const x = static_cast<const uint4*>(p.x) + first_word;
  auto* const out = static_cast<std::uint8_t*>(p.out) + first_word * kCount;
  const auto as_word = [](uint4 v) { return Word{{v.x, v.y, v.z, v.w}}; };
  const auto held_word = [&](int i) { return as_word(held[i]); };

  // Copies begin in batches, so that the first are looked at while others come. A thread reads what it has copied itself.
  const int batch = (most_held / kBatches + kTensorThreads - 1) / kTensorThreads * kTensorThreads;
  const auto each_of_batch = [&](int b, auto&& f) {
    const int end = b == kBatches - 1 ? num_held : min(num_held, (b + 1) * batch);
    for (int i = b * batch + thread; i < end; i += kTensorThreads) f(i);
  };
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    each_of_batch(b, [&](int i) { device::copy_async_16(device::shared_address(held + i), x + i, 16); });
    device::copy_async_commit();
  }
  Range range;
  for (int first = first_rest + thread; first < count; first += kInFlight * kTensorThreads) {
    Word words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      words[i] = {};
      const int word = first + i * kTensorThreads;
      if (word < count) words[i] = as_word(x[word]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) extend<kAsymmetric, T, kCount>(range, words[i]);
  }
  Word kept[kRegisterWords];
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) {
    const int word = num_held + thread + i * kTensorThreads;
    kept[i] = {};
    if (word < first_rest) kept[i] = as_word(x[word]);
  }
  const auto extend_by_batch = [&](int b) { each_of_batch(b, [&](int i) { extend<kAsymmetric, T, kCount>(range, held_word(i)); }); };
  static_assert(kBatches == 3);
  device::copy_async_wait<2>();
  extend_by_batch(0);
  device::copy_async_wait<1>();
  extend_by_batch(1);
  device::copy_async_wait<0>();
  extend_by_batch(2);
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) extend<kAsymmetric, T, kCount>(range, kept[i]);
  range.above = cta_max(range.above, scratch[0]);
  if constexpr (kAsymmetric) range.below = cta_max(range.below, scratch[1]);
  auto* const ranges = static_cast<float2*>(p.out);
  if (thread == 0) ranges[cta] = make_float2(range.above, range.below);
  grid.sync();
  const float2 other = thread < num_ctas ? __ldcg(ranges + thread) : float2{0.0f, 0.0f};
  range.above = cta_max(other.x, scratch[2]);
  if constexpr (kAsymmetric) range.below = cta_max(other.y, scratch[3]);
  const ScaleAndZero value = computed<kResult>(p, range);
  if (cta == 0 && thread == 0) write_scale<kResult>(p, 0, 0, value);
  const Quantizer by(value);
  // Words whose results lie where the ranges are.
  const int num_late = cta == 0 ? static_cast<int>(sizeof(float2)) * num_ctas / kCount : 0;
  auto read_all = grid.barrier_arrive();

  const auto finish = [&](int word, const Word& packed) {
    float v[kCount];
    unpack<T, kCount>(v, packed);
    store<kResult, true>(p, out + static_cast<std::int64_t>(word) * kCount, v, by);
  };
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) {
    const int word = num_held + thread + i * kTensorThreads;
    if (word < first_rest) finish(word, kept[i]);
  }
  int num_left = num_held;
  if (first_rest < count) {
    // The rest comes back from the end, to places of shared memory that are done with: a thread's own, the last ones.
    const auto slot = [&](int i) { return num_held - 1 - thread - i * kTensorThreads; };
    int next = count - 1 - thread;
    const auto refill = [&](int i) {
      if (next >= first_rest) device::copy_async_16(device::shared_address(held + slot(i)), x + next, 16);
      device::copy_async_commit();
      next -= kTensorThreads;
    };
#pragma unroll
    for (int i = 0; i < kTensorSlots; ++i) {
      finish(slot(i), held_word(slot(i)));
      refill(i);
    }
    num_left -= kTensorSlots * kTensorThreads;
    for (int word = count - 1 - thread; word >= first_rest;) {
#pragma unroll
      for (int i = 0; i < kTensorSlots; ++i, word -= kTensorThreads) {
        device::copy_async_wait<kTensorSlots - 1>();
        if (word < first_rest) continue;
        finish(word, held_word(slot(i)));
        refill(i);
      }
    }
  }
#pragma unroll 2
  for (int i = thread; i < num_left; i += kTensorThreads)
    if (i >= num_late) finish(i, held_word(i));
  grid.barrier_wait(std::move(read_all));
  for (int i = thread; i < num_late; i += kTensorThreads) finish(i, held_word(i));
}

}  // namespace

template <typename T, Result kResult>
void launch_tensor_scale(QuantizeParams p, Stream stream) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr int kCount = kElementsPer16Bytes<T>;
  if (p.x_rows.inner_extents[0] == 1 && p.x_rows.inner_extents[1] == 1 && p.x_rows.strides[0] == p.width) {
    // Dense rows are one.
    p.width *= p.num_rows;
    p.num_rows = 1;
  }
  launch_waiting("clear_tensor_range_kernel", clear_tensor_range_kernel<kAsymmetric>, 1, 1, stream, p);
  if (is_vectors<T, kCount>(p.x, p.x_rows, p.x, RowLayout{}, p.width)) {
    const std::int64_t items = p.num_rows * (p.width / kCount);
    launch_waiting("tensor_range_kernel", tensor_range_kernel<T, kCount, kAsymmetric>, num_ctas(items, kMaxThreads, 4), kMaxThreads, stream,
                   p);
  } else {
    launch_waiting("tensor_range_kernel", tensor_range_kernel<T, 1, kAsymmetric>, num_ctas(p.num_rows * p.width, kMaxThreads, 4),
                   kMaxThreads, stream, p);
  }
  launch_waiting("tensor_scale_kernel", tensor_scale_kernel<kResult>, 1, 1, stream, p);
}

const char* prevents_tensor(const QuantizeParams& p) {
  const std::int64_t size = p.num_rows * p.width, item_bytes = itemsize(p.dtype), per_word = 16 / item_bytes;
  if (!are_apart_by(p, p.x_rows, p.width) || !are_apart_by(p, p.out_rows, p.width)) return "x or out is not dense";
  if (!is_aligned(p.x, 16) || !is_aligned(p.out, 16) || size % per_word != 0)
    return "x or out does not divide into aligned pieces of 16 bytes of x";
  if (size < kTensorThreads * per_word) return "x is small";
  // As measured on an H200.
  return size * item_bytes > 3 * std::int64_t{current_device_properties().l2_bytes} ? "x is over three times the L2 cache's size" : nullptr;
}

template <typename T, Result kResult>
bool launch_tensor(const QuantizeParams& p, Stream stream) {
  constexpr auto kernel = quantize_tensor_kernel<T, kResult>;
  if (prevents_tensor(p) != nullptr) return false;
  const DeviceProperties& device = current_device_properties();
  const int shared_bytes = device.max_shared_bytes_per_cta - 1024, most_held = shared_bytes / 16;
  set_max_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  const std::int64_t num_words = p.num_rows * p.width / kElementsPer16Bytes<T>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(std::min<std::int64_t>(device.num_sms, num_words / kTensorThreads)), 1, 1};
  config.blockDim = {kTensorThreads, 1, 1};
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = cuda_stream(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, p, num_words, most_held);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    // Of this device's SMs the stream has a part only.
    static_cast<void>(cudaGetLastError());
    return false;
  }
  QUIRE_CUDA_CHECK(status);
  QUIRE_CHECK_LAUNCH("quantize_tensor_kernel", stream);
  return true;
}

template bool launch_tensor<float, Result::kFloat8>(const QuantizeParams&, Stream);
template bool launch_tensor<__half, Result::kFloat8>(const QuantizeParams&, Stream);
template bool launch_tensor<__nv_bfloat16, Result::kFloat8>(const QuantizeParams&, Stream);
template bool launch_tensor<float, Result::kInt8>(const QuantizeParams&, Stream);
template bool launch_tensor<__half, Result::kInt8>(const QuantizeParams&, Stream);
template bool launch_tensor<__nv_bfloat16, Result::kInt8>(const QuantizeParams&, Stream);
template bool launch_tensor<float, Result::kAsymmetricInt8>(const QuantizeParams&, Stream);
template bool launch_tensor<__half, Result::kAsymmetricInt8>(const QuantizeParams&, Stream);
template bool launch_tensor<__nv_bfloat16, Result::kAsymmetricInt8>(const QuantizeParams&, Stream);
template void launch_tensor_scale<float, Result::kFloat8>(QuantizeParams, Stream);
template void launch_tensor_scale<__half, Result::kFloat8>(QuantizeParams, Stream);
template void launch_tensor_scale<__nv_bfloat16, Result::kFloat8>(QuantizeParams, Stream);
template void launch_tensor_scale<float, Result::kInt8>(QuantizeParams, Stream);
template void launch_tensor_scale<__half, Result::kInt8>(QuantizeParams, Stream);
template void launch_tensor_scale<__nv_bfloat16, Result::kInt8>(QuantizeParams, Stream);
template void launch_tensor_scale<float, Result::kAsymmetricInt8>(QuantizeParams, Stream);
template void launch_tensor_scale<__half, Result::kAsymmetricInt8>(QuantizeParams, Stream);
template void launch_tensor_scale<__nv_bfloat16, Result::kAsymmetricInt8>(QuantizeParams, Stream);

}  // namespace quire::cuda::quant
