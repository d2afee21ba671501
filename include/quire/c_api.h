/* The plain C interface, for C, Rust, Go, Zig and whatever else calls C.
 * SPDX-License-Identifier: Apache-2.0
 *
 * Each function is the one of the same name in the C++ headers, whose comment is its reference: formula, shapes, dtypes, what may be null, what
 * may alias. Tensors are pointers to DLPack's DLTensor; nothing is kept of them after the call. `stream` is a cudaStream_t, and null the legacy
 * default stream; for CPU tensors it does not matter. Nothing synchronises but quire_check_errors and validate = QUIRE_VALIDATE_FULL.
 *
 * Every function that can fail returns a status, and quire_last_error() then says why, in the calling thread. A call that its validation refuses
 * has written nothing. */
#ifndef QUIRE_C_API_H_
#define QUIRE_C_API_H_

#include <stddef.h>
#include <stdint.h>

#include "quire/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when a function or a struct here changes in a way that a caller must know; what is added at the end of a struct that begins with its size
 * does not count. */
#define QUIRE_ABI_VERSION 1

/* DLPack's DLTensor: that type itself where <dlpack/dlpack.h> is included before, else a declaration of the same layout. */
#ifdef DLPACK_DLPACK_H_
typedef DLDevice QuireDevice;
typedef DLDataType QuireDataType;
typedef DLTensor QuireTensor;
#else
typedef struct {
  int32_t device_type; /* 1: CPU, 2: CUDA, 3: page-locked host memory, 13: CUDA managed memory */
  int32_t device_id;
} QuireDevice;

typedef struct {
  uint8_t code; /* 0: int, 1: uint, 2: float, 4: bfloat, 6: bool, 10: float8_e4m3fn, 12: float8_e5m2 */
  uint8_t bits;
  uint16_t lanes; /* 1 */
} QuireDataType;

typedef struct {
  void* data;
  QuireDevice device;
  int32_t ndim;
  QuireDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; null: contiguous */
  uint64_t byte_offset;
} QuireTensor;
#endif

typedef enum {
  QUIRE_OK = 0,
  QUIRE_VALUE_ERROR = 1,   /* shape, layout, alias and value mistakes */
  QUIRE_TYPE_ERROR = 2,    /* a dtype that the op does not take */
  QUIRE_INDEX_ERROR = 3,   /* bad contents of an index tensor */
  QUIRE_UNSUPPORTED = 4,   /* not built, not available, no such size */
  QUIRE_OUT_OF_MEMORY = 5, /* memory could not be had */
  QUIRE_CUDA_ERROR = 6,    /* a CUDA call failed */
  QUIRE_INTERNAL_ERROR = 7 /* anything else */
} QuireStatus;

typedef enum { QUIRE_SCALE_TENSOR = 0, QUIRE_SCALE_TOKEN = 1, QUIRE_SCALE_GROUP = 2 } QuireScaleGranularity;
typedef enum { QUIRE_ROPE_NEOX = 0, QUIRE_ROPE_GPTJ = 1 } QuireRopeStyle;
/* How a checkpoint stores codes and zeros: WeightEncoding. */
typedef enum {
  QUIRE_WEIGHT_AWQ = 0,
  QUIRE_WEIGHT_GPTQ = 1,
  QUIRE_WEIGHT_GPTQ_V2 = 2,
  QUIRE_WEIGHT_COMPRESSED_TENSORS = 3,
  QUIRE_WEIGHT_CODES = 4
} QuireWeightEncoding;
typedef enum { QUIRE_VALIDATE_SHAPE = 0, QUIRE_VALIDATE_FULL = 1 } QuireValidate;

/* Options of attention; start from QUIRE_ATTENTION_OPTIONS_INIT. A null pointer to options is the same. */
typedef struct {
  size_t struct_size; /* sizeof(QuireAttentionOptions) */
  double scale;       /* 0: 1 / sqrt(head_dim) */
  int32_t causal;
  int32_t validate;     /* QuireValidate */
  int64_t window_left;  /* negative: no limit */
  int64_t window_right; /* negative: no limit */
  double softcap;       /* 0: none */
  const QuireTensor* alibi_slopes;
  const QuireTensor* sinks;
  const QuireTensor* k_scale;
  const QuireTensor* v_scale;
  const QuireTensor* mask;
  const QuireTensor* mask_start;
  const char* variant; /* null: the fastest kernel, as far as known; else a name of AttentionVariant such as "wgmma" */
  const QuireTensor* q_scale; /* of float8 queries */
  int64_t batch_invariant;    /* 1: a row's bits depend on its own tokens alone */
} QuireAttentionOptions;

#define QUIRE_ATTENTION_OPTIONS_INIT \
  {sizeof(QuireAttentionOptions), 0.0, 1, QUIRE_VALIDATE_SHAPE, -1, -1, 0.0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0}

/* What a packed weight is: WeightFormat. */
typedef struct {
  size_t struct_size; /* sizeof(QuireWeightFormat) */
  int64_t in_features;
  int64_t out_features;
  int64_t group_size;        /* 32, 64, 128, or 0: all rows */
  int64_t num_rows;          /* in_features, unless a permutation leaves rows empty */
  int32_t bits;              /* 2, 3, 4, 8 */
  int32_t has_zeros;         /* 0 or 1 */
  QuireDataType scale_dtype; /* float16, bfloat16, float32 */
} QuireWeightFormat;

/* ---- the library ---- */

/* QUIRE_ABI_VERSION of the library that is loaded: compare it with the header's. */
QUIRE_API int quire_abi_version(void);
/* "0.1.0" */
QUIRE_API const char* quire_version(void);
/* Why the last call in this thread that failed did so, "[op] argument: expected ..., got ..."; empty before. Valid until the next failure. */
QUIRE_API const char* quire_last_error(void);
QUIRE_API int quire_has_cuda(void);
QUIRE_API int quire_num_cuda_devices(void);
QUIRE_API int quire_num_threads(void);
QUIRE_API int quire_set_num_threads(int num_threads);
/* QUIRE_INDEX_ERROR if an op on the device met an index out of range since the last call. device_type: 1 CPU, 2 CUDA. Waits for a GPU. */
QUIRE_API int quire_check_errors(int device_type, int device_id);

/* ---- quire/norm.h ---- */

QUIRE_API int quire_rms_norm(const QuireTensor* out, const QuireTensor* x, const QuireTensor* weight, double eps, double weight_offset,
                             void* stream);
QUIRE_API int quire_fused_add_rms_norm(const QuireTensor* x, const QuireTensor* residual, const QuireTensor* weight, double eps,
                                       double weight_offset, void* stream);
QUIRE_API int quire_layer_norm(const QuireTensor* out, const QuireTensor* x, const QuireTensor* weight, const QuireTensor* bias_or_null,
                               double eps, void* stream);
/* granularity: QuireScaleGranularity */
QUIRE_API int quire_rms_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, const QuireTensor* weight,
                                       double eps, double weight_offset, int granularity, int64_t group_size, void* stream);
QUIRE_API int quire_fused_add_rms_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* residual,
                                                 const QuireTensor* x, const QuireTensor* weight, double eps, double weight_offset,
                                                 int granularity, int64_t group_size, void* stream);
QUIRE_API int quire_layer_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, const QuireTensor* weight,
                                         const QuireTensor* bias_or_null, double eps, int granularity, int64_t group_size, void* stream);

/* ---- quire/activation.h ---- */

QUIRE_API int quire_silu_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_gelu_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_gelu_tanh_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_gelu_new(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_gelu_fast(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_gelu_quick(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_relu_squared(const QuireTensor* out, const QuireTensor* x, void* stream);
QUIRE_API int quire_silu_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                           int64_t group_size, void* stream);
QUIRE_API int quire_gelu_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                           int64_t group_size, void* stream);
QUIRE_API int quire_gelu_tanh_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                                int64_t group_size, void* stream);

/* ---- quire/position_encoding.h; style: QuireRopeStyle ---- */

QUIRE_API int quire_rotary_embedding(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k_or_null,
                                     const QuireTensor* cos_sin_cache, int style, void* stream);
QUIRE_API int quire_qk_norm_rope(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k_or_null,
                                 const QuireTensor* q_weight, const QuireTensor* k_weight_or_null, const QuireTensor* cos_sin_cache,
                                 double eps, double weight_offset, int style, void* stream);
QUIRE_API int quire_rope_and_write_kv(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k, const QuireTensor* v,
                                      const QuireTensor* cos_sin_cache, const QuireTensor* k_cache, const QuireTensor* v_cache,
                                      const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null,
                                      const QuireTensor* v_scale_or_null, const QuireTensor* k_out_or_null,
                                      const QuireTensor* q_weight_or_null, const QuireTensor* k_weight_or_null, double eps,
                                      double weight_offset, int style, void* stream);

/* ---- quire/kv_cache.h ---- */

QUIRE_API int quire_write_kv(const QuireTensor* k_cache, const QuireTensor* v_cache, const QuireTensor* k, const QuireTensor* v,
                             const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null, const QuireTensor* v_scale_or_null,
                             void* stream);
QUIRE_API int quire_gather_kv(const QuireTensor* k, const QuireTensor* v, const QuireTensor* k_cache, const QuireTensor* v_cache,
                              const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null, const QuireTensor* v_scale_or_null,
                              void* stream);
QUIRE_API int quire_copy_blocks(const QuireTensor* cache, const QuireTensor* pairs, void* stream);
QUIRE_API int quire_swap_blocks(const QuireTensor* dst, const QuireTensor* src, const QuireTensor* pairs, void* stream);

/* ---- quire/attention.h ---- */

QUIRE_API int quire_paged_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q,
                                    const QuireTensor* k_cache, const QuireTensor* v_cache, const QuireTensor* block_tables,
                                    const QuireTensor* seq_lens, const QuireTensor* query_start_loc_or_null,
                                    const QuireTensor* workspace_or_null, const QuireAttentionOptions* options_or_null, void* stream);
QUIRE_API int quire_shared_prefix_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q,
                                            const QuireTensor* k_cache, const QuireTensor* v_cache, const QuireTensor* prefix_blocks,
                                            const QuireTensor* block_tables, const QuireTensor* seq_lens,
                                            const QuireTensor* query_start_loc_or_null, const QuireTensor* workspace_or_null,
                                            const QuireAttentionOptions* options_or_null, void* stream);
QUIRE_API int quire_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q, const QuireTensor* k,
                              const QuireTensor* v, const QuireTensor* query_start_loc_or_null, const QuireTensor* kv_start_loc_or_null,
                              const QuireTensor* workspace_or_null, const QuireAttentionOptions* options_or_null, void* stream);
QUIRE_API int quire_merge_attention(const QuireTensor* out, const QuireTensor* out_lse_or_null, const QuireTensor* out_a,
                                    const QuireTensor* lse_a, const QuireTensor* out_b, const QuireTensor* lse_b, void* stream);

/* Bytes of workspace, to *num_bytes. device_type: 1 CPU, 2 CUDA. */
QUIRE_API int quire_paged_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim,
                                                   int device_type, int device_id, int64_t* num_bytes);
QUIRE_API int quire_shared_prefix_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim,
                                                           int device_type, int device_id, int64_t* num_bytes);
QUIRE_API int quire_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim, int device_type,
                                             int device_id, int64_t* num_bytes);

/* ---- quire/quantization.h; granularity: QuireScaleGranularity, encoding: QuireWeightEncoding ---- */

/* computes: 1 if scales and zero_points are written, 0 if they are read. scale_bound: INFINITY for none. */
QUIRE_API int quire_quantize(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* zero_points_or_null,
                             const QuireTensor* x, int granularity, int64_t group_size, int computes, double scale_bound, void* stream);
QUIRE_API int quire_dequantize(const QuireTensor* out, const QuireTensor* q, const QuireTensor* scales,
                               const QuireTensor* zero_points_or_null, int granularity, int64_t group_size, void* stream);
QUIRE_API int quire_dequantize_blocks(const QuireTensor* out, const QuireTensor* w, const QuireTensor* scales, int64_t block_rows,
                                      int64_t block_columns, void* stream);
/* Bytes of a packed weight, to *num_bytes. device_type: 1 CPU, 2 CUDA. */
QUIRE_API int quire_packed_weight_size(const QuireWeightFormat* format, int device_type, int device_id, int64_t* num_bytes);
QUIRE_API int quire_pack_weight(const QuireTensor* data, const QuireWeightFormat* format, const QuireTensor* permutation_or_null,
                                int encoding, const QuireTensor* codes, const QuireTensor* scales, const QuireTensor* zeros_or_null,
                                const QuireTensor* groups_or_null, void* stream);
QUIRE_API int quire_dequantize_weight(const QuireTensor* out, const QuireTensor* data, const QuireWeightFormat* format,
                                      const QuireTensor* permutation_or_null, void* stream);
QUIRE_API int quire_quantize_weight(const QuireTensor* codes, const QuireTensor* scales, const QuireTensor* zeros_or_null,
                                    const QuireTensor* w, int bits, int64_t group_size, void* stream);
QUIRE_API int quire_quantized_matmul(const QuireTensor* out, const QuireTensor* x, const QuireTensor* data, const QuireWeightFormat* format,
                                     const QuireTensor* permutation_or_null, const QuireTensor* bias_or_null,
                                     const QuireTensor* workspace_or_null, int batch_invariant, void* stream);
QUIRE_API int quire_quantized_matmul_workspace_size(int64_t num_tokens, const QuireWeightFormat* format, int has_permutation,
                                                    QuireDataType dtype, int batch_invariant, int device_type, int device_id,
                                                    int64_t* num_bytes);
QUIRE_API int quire_scaled_matmul(const QuireTensor* out, const QuireTensor* a, const QuireTensor* b, const QuireTensor* scale_a,
                                  const QuireTensor* scale_b, const QuireTensor* zero_point_or_null, const QuireTensor* column_sums_or_null,
                                  const QuireTensor* bias_or_null, const QuireTensor* workspace_or_null, int batch_invariant, void* stream);
QUIRE_API int quire_scaled_matmul_workspace_size(int64_t m, int64_t n, int64_t k, QuireDataType dtype, int has_blocks, int computes_sums,
                                                 int batch_invariant, int device_type, int device_id, int64_t* num_bytes);
QUIRE_API int quire_column_sums(const QuireTensor* sums, const QuireTensor* b, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_C_API_H_ */
