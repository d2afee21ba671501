// Rotary position encoding on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/dispatch.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/position_encoding.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
// Heads that a thread rotates by one set of angles; their loads are in flight together.
constexpr int kHeadsPerThread = 2;
// Threads of this kernel that an SM holds at once: the registers of a thread are bounded accordingly.
constexpr int kResidentThreads = 1024;
// Tokens per SM below which heads are spread over as many threads as there are.
constexpr int kManyTokensPerSm = 8;

// Grid: work item = blockDim.z tokens x one chunk of heads x one chunk of angles; gridDim.x CTAs walk all items. Thread (x, y, z)
// rotates kVec pairs of up to kHeadsPerThread heads of a token; the heads of q and k are numbered as one list. The position of
// the next item is read ahead, so that an item's pairs and angles are fetched together.
template <typename T, RopeStyle kStyle, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryParams p, ErrorWord* const error_word, const std::int64_t num_head_chunks,
                            const std::int64_t num_angle_chunks, const std::int64_t num_items) {
  const std::int64_t half = p.rotary_dim / 2;
  const std::int64_t num_all_heads = p.num_heads + p.num_kv_heads;
  const std::int64_t per_token = num_head_chunks * num_angle_chunks;
  const auto token_of = [&](std::int64_t item) { return (per_token == 1 ? item : divide(item, per_token)) * blockDim.z + threadIdx.z; };
  const auto read_position = [&](std::int64_t item) -> std::int64_t {
    const std::int64_t token = token_of(item);
    if (item >= num_items || token >= p.num_tokens) return -1;
    return p.position_dtype == DType::kInt64 ? static_cast<const std::int64_t*>(p.positions)[token * p.position_stride]
                                             : static_cast<const std::int32_t*>(p.positions)[token * p.position_stride];
  };
  std::int64_t next_position = read_position(blockIdx.x);
  for (std::int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const std::int64_t position = next_position;
    next_position = read_position(item + gridDim.x);
    const std::int64_t chunk = per_token == 1 ? 0 : item - divide(item, per_token) * per_token;
    const std::int64_t head_chunk = num_angle_chunks == 1 ? chunk : divide(chunk, num_angle_chunks);
    const std::int64_t angle = ((chunk - head_chunk * num_angle_chunks) * blockDim.x + threadIdx.x) * kVec;
    const std::int64_t token = token_of(item);
    if (token >= p.num_tokens || angle >= half) continue;

    // Load the pairs.
    constexpr bool kNeox = kStyle == RopeStyle::kNeox;
    const std::int64_t first_at = kNeox ? angle : 2 * angle;
    const std::int64_t second_at = kNeox ? angle + half : 2 * angle + kVec;
    T* rows[kHeadsPerThread];
    Packed<T, kVec> firsts[kHeadsPerThread], seconds[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const std::int64_t head = (head_chunk * kHeadsPerThread + i) * blockDim.y + threadIdx.y;
      rows[i] = nullptr;
      if (head >= num_all_heads) continue;
      rows[i] = head < p.num_heads ? static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride
                                   : static_cast<T*>(p.k) + token * p.k_token_stride + (head - p.num_heads) * p.k_head_stride;
      firsts[i] = load_packed<T, kVec>(rows[i] + first_at);
      seconds[i] = load_packed<T, kVec>(rows[i] + second_at);
    }

    // Angles.
    if (position < 0 || position >= p.max_position) {
      if (position != -1 && chunk == 0 && threadIdx.x == 0 && threadIdx.y == 0)
        record_error(error_word, OpId::kRotaryEmbedding, ArgId::kPositions, token, position);
      continue;
    }
    float cos_sin[2][kVec];
    load_parameter(cos_sin, p.cos_sin_cache, p.cache_dtype, position * p.rotary_dim + angle, half, p.max_position * p.rotary_dim);

    // Rotate and store.
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      if (rows[i] == nullptr) continue;
      float x[2 * kVec];
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), firsts[i]);
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), seconds[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        float& a = x[kNeox ? e : 2 * e];
        float& b = x[kNeox ? e + kVec : 2 * e + 1];
        const float rotated_a = a * cos_sin[0][e] - b * cos_sin[1][e];
        const float rotated_b = b * cos_sin[0][e] + a * cos_sin[1][e];
        a = rotated_a;
        b = rotated_b;
      }
      store_floats(rows[i] + first_at, reinterpret_cast<const float (&)[kVec]>(x[0]));
      store_floats(rows[i] + second_at, reinterpret_cast<const float (&)[kVec]>(x[kVec]));
    }
  }
}

template <typename T, RopeStyle kStyle, int kVec>
void launch_rotary(const RotaryParams& p, Stream stream) {
  const std::int64_t num_angle_vectors = p.rotary_dim / 2 / kVec;
  const std::int64_t num_all_heads = p.num_heads + p.num_kv_heads;
  const std::int64_t lanes = std::min<std::int64_t>(num_angle_vectors, kThreads);
  const bool many_tokens = p.num_tokens >= kManyTokensPerSm * current_device_properties().num_sms;
  const std::int64_t head_lanes = std::min(many_tokens ? ceil_div(num_all_heads, kHeadsPerThread) : num_all_heads, kThreads / lanes);
  // z is limited to 64 by the hardware.
  const std::int64_t tokens_per_cta = many_tokens ? std::min<std::int64_t>(kThreads / (lanes * head_lanes), 64) : 1;
  const std::int64_t num_angle_chunks = ceil_div(num_angle_vectors, lanes);
  const std::int64_t num_head_chunks = ceil_div(num_all_heads, head_lanes * kHeadsPerThread);
  const std::int64_t num_items = ceil_div(p.num_tokens, tokens_per_cta) * num_head_chunks * num_angle_chunks;
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(head_lanes), static_cast<unsigned>(tokens_per_cta));
  const std::int64_t limit =
      many_tokens ? current_device_properties().num_sms * (kResidentThreads / (lanes * head_lanes * tokens_per_cta)) : 0x7fffffff;
  const auto num_ctas = static_cast<unsigned>(std::min(num_items, limit));
  rotary_embedding_kernel<T, kStyle, kVec>
      <<<num_ctas, block, 0, cuda_stream(stream)>>>(p, error_word(), num_head_chunks, num_angle_chunks, num_items);
  QUIRE_CHECK_LAUNCH("rotary_embedding", stream);
}

}  // namespace

void rotary_embedding(const RotaryParams& params, Stream stream) {
  dispatch_float(params.dtype, "rotary_embedding", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto rows_are_aligned = [&](const void* data, std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
      return num_heads == 0 || (is_aligned(data, 16) && keeps_alignment(params.num_tokens, token_stride, sizeof(T), 16) &&
                                keeps_alignment(num_heads, head_stride, sizeof(T), 16));
    };
    const bool vectors = params.rotary_dim / 2 % kVec == 0 && parameter_is_vectors(params.cos_sin_cache, params.cache_dtype, kVec) &&
                         rows_are_aligned(params.q, params.num_heads, params.q_token_stride, params.q_head_stride) &&
                         rows_are_aligned(params.k, params.num_kv_heads, params.k_token_stride, params.k_head_stride);
    const bool neox = params.style == RopeStyle::kNeox;
    if (vectors) {
      neox ? launch_rotary<T, RopeStyle::kNeox, kVec>(params, stream) : launch_rotary<T, RopeStyle::kGptj, kVec>(params, stream);
    } else {
      neox ? launch_rotary<T, RopeStyle::kNeox, 1>(params, stream) : launch_rotary<T, RopeStyle::kGptj, 1>(params, stream);
    }
  });
}

}  // namespace quire::cuda
