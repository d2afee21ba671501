// The steps of `quire bench ladder` on a GPU: attention without a mask, each step written to be read.
// SPDX-License-Identifier: Apache-2.0
//
// Compiled at run time by NVRTC, so it includes nothing. HEAD_DIM, a multiple of 16, comes from the command line.
// Everywhere: q and out are [num_tokens, num_heads, HEAD_DIM], k and v [num_tokens, num_kv_heads, HEAD_DIM], all float16, num_heads a multiple of
// num_kv_heads; scores are [num_heads, num_tokens, num_tokens], float32.

using Half = unsigned short;

__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ Half to_half(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Two numbers as float16, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Where the row of a token and head starts.
__device__ __forceinline__ long long row(int token, int num_heads, int head) { return ((long long)token * num_heads + head) * HEAD_DIM; }

constexpr int kTile = 16;  // of queries, keys and columns, in all steps before the tensor cores

// ---- Three kernels: scores, softmax, output. Every thread fetches all that it needs from global memory ----

// Grid: a CTA of 16 x 16 threads makes 16 x 16 scores of one head, one to a thread.
extern "C" __global__ void ladder_scores_naive_kernel(float* scores, const Half* q, const Half* k, int num_tokens, int num_heads,
                                                      int num_kv_heads, float scale) {
  const int key = blockIdx.x * kTile + threadIdx.x, query = blockIdx.y * kTile + threadIdx.y, head = blockIdx.z;
  if (key >= num_tokens || query >= num_tokens) return;
  const Half* q_row = q + row(query, num_heads, head);
  const Half* k_row = k + row(key, num_kv_heads, head / (num_heads / num_kv_heads));
  float sum = 0.0f;
  for (int d = 0; d < HEAD_DIM; ++d) sum += to_float(q_row[d]) * to_float(k_row[d]);
  scores[((long long)head * num_tokens + query) * num_tokens + key] = sum * scale;
}

// Grid: a CTA of 16 x 16 threads makes 16 columns of 16 rows of one head's output, one number to a thread.
extern "C" __global__ void ladder_output_naive_kernel(Half* out, const float* scores, const Half* v, int num_tokens, int num_heads,
                                                      int num_kv_heads) {
  const int column = blockIdx.x * kTile + threadIdx.x, query = blockIdx.y * kTile + threadIdx.y, head = blockIdx.z;
  if (query >= num_tokens) return;
  const float* weights = scores + ((long long)head * num_tokens + query) * num_tokens;
  const Half* v_column = v + row(0, num_kv_heads, head / (num_heads / num_kv_heads)) + column;
  float sum = 0.0f;
  for (int key = 0; key < num_tokens; ++key) sum += weights[key] * to_float(v_column[row(key, num_kv_heads, 0)]);
  out[row(query, num_heads, head) + column] = to_half(sum);
}

// One warp to a row, in place: the maximum and the sum in a first pass over the row, the weights in a second.
extern "C" __global__ void ladder_softmax_kernel(float* scores, long long num_rows, int num_columns) {
  const long long index = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (index >= num_rows) return;
  float* x = scores + index * num_columns;
  float maximum = minus_infinity(), sum = 0.0f;
  for (int i = threadIdx.x % 32; i < num_columns; i += 32) {
    const float larger = fmaxf(maximum, x[i]);
    sum = sum * __expf(maximum - larger) + __expf(x[i] - larger);
    maximum = larger;
  }
  float row_maximum = maximum;
  for (int mask = 16; mask > 0; mask /= 2) row_maximum = fmaxf(row_maximum, __shfl_xor_sync(0xffffffffu, row_maximum, mask));
  // A lane without a number has the maximum -inf and adds nothing.
  sum *= __expf(maximum - row_maximum);
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  for (int i = threadIdx.x % 32; i < num_columns; i += 32) x[i] = __expf(x[i] - row_maximum) / sum;
}

// ---- The same three kernels, but a CTA fetches a tile once, into shared memory, and all its threads read it there ----

// Grid: as ladder_scores_naive_kernel.
extern "C" __global__ void ladder_scores_tiled_kernel(float* scores, const Half* q, const Half* k, int num_tokens, int num_heads,
                                                      int num_kv_heads, float scale) {
  __shared__ float q_tile[kTile][kTile + 1], k_tile[kTile][kTile + 1];
  const int x = threadIdx.x, y = threadIdx.y, head = blockIdx.z, kv_head = head / (num_heads / num_kv_heads);
  const int first_key = blockIdx.x * kTile, first_query = blockIdx.y * kTile;
  float sum = 0.0f;
  for (int d = 0; d < HEAD_DIM; d += kTile) {
    q_tile[y][x] = first_query + y < num_tokens ? to_float(q[row(first_query + y, num_heads, head) + d + x]) : 0.0f;
    k_tile[y][x] = first_key + y < num_tokens ? to_float(k[row(first_key + y, num_kv_heads, kv_head) + d + x]) : 0.0f;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += q_tile[y][i] * k_tile[x][i];
    __syncthreads();
  }
  const int query = first_query + y, key = first_key + x;
  if (query < num_tokens && key < num_tokens) scores[((long long)head * num_tokens + query) * num_tokens + key] = sum * scale;
}

// Grid: as ladder_output_naive_kernel.
extern "C" __global__ void ladder_output_tiled_kernel(Half* out, const float* scores, const Half* v, int num_tokens, int num_heads,
                                                      int num_kv_heads) {
  __shared__ float weight_tile[kTile][kTile + 1], v_tile[kTile][kTile + 1];
  const int x = threadIdx.x, y = threadIdx.y, head = blockIdx.z, kv_head = head / (num_heads / num_kv_heads);
  const int column = blockIdx.x * kTile + x, query = blockIdx.y * kTile + y;
  const float* weights = scores + ((long long)head * num_tokens + query) * num_tokens;
  float sum = 0.0f;
  for (int first_key = 0; first_key < num_tokens; first_key += kTile) {
    weight_tile[y][x] = query < num_tokens && first_key + x < num_tokens ? weights[first_key + x] : 0.0f;
    v_tile[y][x] = first_key + y < num_tokens ? to_float(v[row(first_key + y, num_kv_heads, kv_head) + column]) : 0.0f;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += weight_tile[y][i] * v_tile[i][x];
    __syncthreads();
  }
  if (query < num_tokens) out[row(query, num_heads, head) + column] = to_half(sum);
}

// ---- One kernel, one pass over the keys: the scores never leave the CTA ----

// Grid: a CTA of 16 x 16 threads makes 16 rows of one head's output; a thread has one score of each tile, and every 16th column of its row.
extern "C" __global__ void ladder_online_kernel(Half* out, const Half* q, const Half* k, const Half* v, int num_tokens, int num_heads,
                                                int num_kv_heads, float scale) {
  __shared__ float q_tile[kTile][HEAD_DIM + 1], k_tile[kTile][HEAD_DIM + 1], v_tile[kTile][HEAD_DIM], weight_tile[kTile][kTile + 1];
  const int x = threadIdx.x, y = threadIdx.y, head = blockIdx.y, kv_head = head / (num_heads / num_kv_heads);
  const int query = blockIdx.x * kTile + y;
  for (int d = x; d < HEAD_DIM; d += kTile) q_tile[y][d] = query < num_tokens ? to_float(q[row(query, num_heads, head) + d]) : 0.0f;
  float maximum = minus_infinity(), sum = 0.0f, result[HEAD_DIM / kTile] = {};
  for (int first_key = 0; first_key < num_tokens; first_key += kTile) {
    __syncthreads();
    for (int d = x; d < HEAD_DIM; d += kTile) {
      const bool exists = first_key + y < num_tokens;
      k_tile[y][d] = exists ? to_float(k[row(first_key + y, num_kv_heads, kv_head) + d]) : 0.0f;
      v_tile[y][d] = exists ? to_float(v[row(first_key + y, num_kv_heads, kv_head) + d]) : 0.0f;
    }
    __syncthreads();
    float score = 0.0f;
    for (int d = 0; d < HEAD_DIM; ++d) score += q_tile[y][d] * k_tile[x][d];
    score = first_key + x < num_tokens ? score * scale : minus_infinity();
    // The row's 16 threads are one half of a warp. Every tile has a key, so the maximum is a number.
    float larger = fmaxf(maximum, score);
    for (int mask = kTile / 2; mask > 0; mask /= 2) larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, mask));
    const float weight = __expf(score - larger), shrink = __expf(maximum - larger);
    float tile_sum = weight;
    for (int mask = kTile / 2; mask > 0; mask /= 2) tile_sum += __shfl_xor_sync(0xffffffffu, tile_sum, mask);
    sum = sum * shrink + tile_sum;
    maximum = larger;
    weight_tile[y][x] = weight;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / kTile; ++i) {
      float part = 0.0f;
      for (int key = 0; key < kTile; ++key) part += weight_tile[y][key] * v_tile[key][x + i * kTile];
      result[i] = result[i] * shrink + part;
    }
  }
  if (query >= num_tokens) return;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / kTile; ++i) out[row(query, num_heads, head) + x + i * kTile] = to_half(result[i] / sum);
}

// ---- The same one pass, with both products on the tensor cores ----

// c += a b, of 16 x 16 and 16 x 8 numbers, spread over a warp as the PTX manual draws it.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two 8 x 8 matrices from shared memory, each transposed; lane i < 16 names the start of row i.
__device__ __forceinline__ void load_transposed(unsigned& low, unsigned& high, const Half* address) {
  asm volatile(
      "{ .reg .u64 at; .reg .u32 shared_at; cvta.to.shared.u64 at, %2; cvt.u32.u64 shared_at, at;\n"
      "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [shared_at]; }"
      : "=r"(low), "=r"(high)
      : "l"(address)
      : "memory");
}

constexpr int kWarps = 4, kQueries = 16 * kWarps, kKeys = 64, kPitch = HEAD_DIM + 8;  // the pitch spreads rows over the banks

// Grid: a CTA of four warps makes 64 rows of one head's output, 16 to a warp. A lane has rows lane / 4 and lane / 4 + 8 of them.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    ladder_tensor_core_kernel(Half* out, const Half* q, const Half* k, const Half* v, int num_tokens, int num_heads, int num_kv_heads,
                              float scale) {
  __shared__ __align__(16) Half k_tile[kKeys][kPitch], v_tile[kKeys][kPitch];
  const int lane = threadIdx.x % 32, head = blockIdx.y, kv_head = head / (num_heads / num_kv_heads);
  const int query = blockIdx.x * kQueries + threadIdx.x / 32 * 16 + lane / 4;
  scale *= 1.4426950408889634f;  // exp(x) = 2^(x log2(e))

  // The queries stay in registers.
  unsigned q_part[HEAD_DIM / 16][4];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = query + j % 2 * 8, d = i * 16 + j / 2 * 8 + lane % 4 * 2;
      q_part[i][j] = token < num_tokens ? *reinterpret_cast<const unsigned*>(q + row(token, num_heads, head) + d) : 0u;
    }
  }
  float maximum[2] = {minus_infinity(), minus_infinity()}, sum[2] = {}, result[HEAD_DIM / 8][4] = {};

  for (int first_key = 0; first_key < num_tokens; first_key += kKeys) {
    // Keys and values of the tile, 16 bytes to a thread and turn.
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * HEAD_DIM / 8; i += 32 * kWarps) {
      const int key = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
      const long long at = row(first_key + key, num_kv_heads, kv_head) + d;
      const bool exists = first_key + key < num_tokens;
      *reinterpret_cast<uint4*>(&k_tile[key][d]) = exists ? *reinterpret_cast<const uint4*>(k + at) : make_uint4(0u, 0u, 0u, 0u);
      *reinterpret_cast<uint4*>(&v_tile[key][d]) = exists ? *reinterpret_cast<const uint4*>(v + at) : make_uint4(0u, 0u, 0u, 0u);
    }
    __syncthreads();

    // Scores: queries times keys.
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        const Half* at = &k_tile[n * 8 + lane / 4][i * 16 + lane % 4 * 2];
        multiply(score[n], q_part[i], *reinterpret_cast<const unsigned*>(at), *reinterpret_cast<const unsigned*>(at + 8));
      }
    }

    // Softmax so far: a row's numbers are in four lanes.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float larger = maximum[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          const bool exists = first_key + n * 8 + lane % 4 * 2 + j % 2 < num_tokens;
          score[n][j] = exists ? score[n][j] * scale : minus_infinity();
          larger = fmaxf(larger, score[n][j]);
        }
      }
      for (int mask = 1; mask < 4; mask *= 2) larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, mask));
      const float shrink = exp2f(maximum[half] - larger);
      maximum[half] = larger;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          score[n][j] = exp2f(score[n][j] - larger);
          sum[half] += score[n][j];
        }
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        result[n][2 * half] *= shrink;
        result[n][2 * half + 1] *= shrink;
      }
    }

    // Output: weights, which lie in registers just as the product wants them, times values.
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const unsigned weights[4] = {pack(score[2 * i][0], score[2 * i][1]), pack(score[2 * i][2], score[2 * i][3]),
                                   pack(score[2 * i + 1][0], score[2 * i + 1][1]), pack(score[2 * i + 1][2], score[2 * i + 1][3])};
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        unsigned low, high;
        load_transposed(low, high, &v_tile[i * 16 + lane % 16][n * 8]);
        multiply(result[n], weights, low, high);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask < 4; mask *= 2) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], mask);
    if (query + 8 * half >= num_tokens) continue;
    const float inverse = 1.0f / sum[half];
    Half* out_row = out + row(query + 8 * half, num_heads, head);
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      *reinterpret_cast<unsigned*>(out_row + n * 8 + lane % 4 * 2) = pack(result[n][2 * half] * inverse, result[n][2 * half + 1] * inverse);
    }
  }
}
