// The C interface: DLTensors become TensorViews, exceptions become status codes. No logic of ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/c_api.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <string>

#include "core/check.h"
#include "core/runtime.h"
#include "quire/quire.h"

using quire::AttentionOptions;
using quire::AttentionVariant;
using quire::Device;
using quire::DeviceType;
using quire::DType;
using quire::RopeStyle;
using quire::ScaleGranularity;
using quire::Stream;
using quire::TensorView;
using quire::WeightEncoding;
using quire::WeightFormat;

namespace {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

int fail(QuireStatus status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {
    last_error().clear();  // no memory for the text; the status still says what it was
  }
  return status;
}

// Calls f; an exception becomes a status.
template <typename F>
int guarded(F&& f) noexcept {
  try {
    f();
    return QUIRE_OK;
  } catch (const quire::TypeError& error) {
    return fail(QUIRE_TYPE_ERROR, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(QUIRE_VALUE_ERROR, error.what());
  } catch (const quire::IndexError& error) {
    return fail(QUIRE_INDEX_ERROR, error.what());
  } catch (const quire::UnsupportedError& error) {
    return fail(QUIRE_UNSUPPORTED, error.what());
  } catch (const quire::CudaError& error) {
    return fail(QUIRE_CUDA_ERROR, error.what());
  } catch (const std::bad_alloc& error) {
    return fail(QUIRE_OUT_OF_MEMORY, error.what());
  } catch (const std::exception& error) {
    return fail(QUIRE_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(QUIRE_INTERNAL_ERROR, "an exception of an unknown type");
  }
}

[[noreturn]] void fail_value(const char* op, const char* arg, const std::string& expected, const std::string& got) {
  quire::Check(op).fail_value(arg, expected, got);
}

std::optional<DType> dtype_of(QuireDataType type) {
  if (type.lanes != 1) return std::nullopt;
  switch (type.code << 8 | type.bits) {
    case 0 << 8 | 8: return DType::kInt8;
    case 0 << 8 | 32: return DType::kInt32;
    case 0 << 8 | 64: return DType::kInt64;
    case 1 << 8 | 8: return DType::kUInt8;
    case 2 << 8 | 16: return DType::kFloat16;
    case 2 << 8 | 32: return DType::kFloat32;
    case 4 << 8 | 16: return DType::kBFloat16;
    case 6 << 8 | 8: return DType::kBool;
    case 10 << 8 | 8: return DType::kFloat8E4M3FN;
    case 12 << 8 | 8: return DType::kFloat8E5M2;
    default: return std::nullopt;
  }
}

Device device_of(const char* op, const char* arg, int device_type, int device_id) {
  switch (device_type) {
    case 1:                    // CPU
    case 3: return Device{};   // page-locked host memory
    case 2:                    // CUDA
    case 13:                   // managed
      if (!quire::kHasCuda) quire::throw_cpu_only_build(op);
      return Device{DeviceType::kCUDA, device_id};
    default: quire::Check(op).fail_unsupported(arg, "a tensor on cpu or cuda", "DLPack device type " + std::to_string(device_type));
  }
}

DType required_dtype(const char* op, const char* arg, QuireDataType type, const char* expected) {
  const std::optional<DType> dtype = dtype_of(type);
  if (!dtype)
    quire::Check(op).fail_dtype(arg, expected,
                                "DLPack type code " + std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits, " +
                                    std::to_string(type.lanes) + " lanes");
  return *dtype;
}

// The tensors of one call as views.
class Views {
 public:
  explicit Views(const char* op) : op_(op) {}

  const TensorView* optional(const QuireTensor* tensor, const char* arg) {
    if (tensor == nullptr) return nullptr;
    TensorView& view = views_[count_++];
    view.dtype = required_dtype(op_, arg, tensor->dtype,
                                "float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, int32, int64 or bool");
    if (tensor->ndim < 0 || tensor->ndim > quire::kMaxRank) fail_value(op_, arg, "a rank of 0 to 8", std::to_string(tensor->ndim));
    if (tensor->ndim > 0 && tensor->shape == nullptr) fail_value(op_, arg, "a shape", "null");
    view.device = device_of(op_, arg, tensor->device.device_type, tensor->device.device_id);
    view.ndim = tensor->ndim;
    std::int64_t numel = 1;
    for (int i = tensor->ndim - 1; i >= 0; --i) {
      const auto at = static_cast<std::size_t>(i);
      view.shape[at] = tensor->shape[i];
      view.strides[at] = tensor->strides != nullptr ? tensor->strides[i] : numel;
      if (tensor->shape[i] < 0) fail_value(op_, arg, "a shape of 0 or more", std::to_string(tensor->shape[i]));
      numel = quire::checked_mul(numel, tensor->shape[i], op_, arg);
    }
    quire::tame_strides(view, numel > 0);
    view.data = tensor->data == nullptr ? nullptr : static_cast<char*>(tensor->data) + tensor->byte_offset;
    return &view;
  }

  const TensorView& required(const QuireTensor* tensor, const char* arg) {
    if (tensor == nullptr) fail_value(op_, arg, "a tensor", "null");
    return *optional(tensor, arg);
  }

 private:
  const char* op_;
  TensorView views_[20];  // shared_prefix_attention has the most, 17
  std::size_t count_ = 0;
};

ScaleGranularity granularity_of(const char* op, int granularity) {
  switch (granularity) {
    case QUIRE_SCALE_TENSOR: return ScaleGranularity::kTensor;
    case QUIRE_SCALE_TOKEN: return ScaleGranularity::kToken;
    case QUIRE_SCALE_GROUP: return ScaleGranularity::kGroup;
    default: fail_value(op, "granularity", "0 (tensor), 1 (token) or 2 (group)", std::to_string(granularity));
  }
}

RopeStyle style_of(const char* op, int style) {
  switch (style) {
    case QUIRE_ROPE_NEOX: return RopeStyle::kNeox;
    case QUIRE_ROPE_GPTJ: return RopeStyle::kGptj;
    default: fail_value(op, "style", "0 (neox) or 1 (gptj)", std::to_string(style));
  }
}

AttentionVariant variant_of(const char* op, const char* wanted) {
  for (const AttentionVariant known : quire::kAttentionVariants)
    if (std::strcmp(wanted, quire::name(known)) == 0) return known;
  fail_value(op, "variant", "null or a name of AttentionVariant", wanted);
}

AttentionOptions options_of(const char* op, const QuireAttentionOptions* given, Views& views) {
  QuireAttentionOptions full = QUIRE_ATTENTION_OPTIONS_INIT;
  if (given != nullptr) {
    constexpr std::size_t kSmallest = offsetof(QuireAttentionOptions, variant);
    if (given->struct_size < kSmallest)
      fail_value(op, "options", "struct_size to be sizeof(QuireAttentionOptions)", std::to_string(given->struct_size));
    std::memcpy(&full, given, std::min(given->struct_size, sizeof(full)));
  }
  if (full.validate != QUIRE_VALIDATE_SHAPE && full.validate != QUIRE_VALIDATE_FULL)
    fail_value(op, "validate", "0 (shape) or 1 (full)", std::to_string(full.validate));
  AttentionOptions options;
  if (full.scale != 0.0) options.scale = full.scale;
  options.causal = full.causal != 0;
  options.window_left = full.window_left;
  options.window_right = full.window_right;
  options.softcap = full.softcap;
  options.alibi_slopes = views.optional(full.alibi_slopes, "alibi_slopes");
  options.sinks = views.optional(full.sinks, "sinks");
  options.q_scale = views.optional(full.q_scale, "q_scale");
  options.k_scale = views.optional(full.k_scale, "k_scale");
  options.v_scale = views.optional(full.v_scale, "v_scale");
  options.mask = views.optional(full.mask, "mask");
  options.mask_start = views.optional(full.mask_start, "mask_start");
  options.validate = full.validate == QUIRE_VALIDATE_FULL ? quire::Validate::kFull : quire::Validate::kShape;
  if (full.variant != nullptr) options.variant = variant_of(op, full.variant);
  options.batch_invariant = full.batch_invariant != 0;
  return options;
}

WeightEncoding encoding_of(const char* op, int encoding) {
  switch (encoding) {
    case QUIRE_WEIGHT_AWQ: return WeightEncoding::kAwq;
    case QUIRE_WEIGHT_GPTQ: return WeightEncoding::kGptq;
    case QUIRE_WEIGHT_GPTQ_V2: return WeightEncoding::kGptqV2;
    case QUIRE_WEIGHT_COMPRESSED_TENSORS: return WeightEncoding::kCompressedTensors;
    case QUIRE_WEIGHT_CODES: return WeightEncoding::kCodes;
    default: fail_value(op, "encoding", "0 (AWQ) to 4 (codes)", std::to_string(encoding));
  }
}

WeightFormat format_of(const char* op, const QuireWeightFormat* given) {
  if (given == nullptr) fail_value(op, "format", "a QuireWeightFormat", "null");
  if (given->struct_size < sizeof(QuireWeightFormat))
    fail_value(op, "format", "struct_size to be sizeof(QuireWeightFormat)", std::to_string(given->struct_size));
  WeightFormat format;
  format.in_features = given->in_features;
  format.out_features = given->out_features;
  format.bits = given->bits;
  format.group_size = given->group_size;
  format.num_rows = given->num_rows;
  format.scale_dtype = required_dtype(op, "scale_dtype", given->scale_dtype, "a dtype of the library");
  format.has_zeros = given->has_zeros != 0;
  return format;
}

void require_result(const char* op, const std::int64_t* num_bytes) {
  if (num_bytes == nullptr) fail_value(op, "num_bytes", "a pointer", "null");
}

using Plain = void (*)(const TensorView&, const TensorView&, Stream);
int plain(const char* op, Plain function, const QuireTensor* out, const QuireTensor* x, void* stream) {
  return guarded([&] {
    Views views(op);
    function(views.required(out, "out"), views.required(x, "x"), Stream(stream));
  });
}

using Quantized = void (*)(const TensorView&, const TensorView&, const TensorView&, ScaleGranularity, std::int64_t, Stream);
int quantized(const char* op, Quantized function, const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
              std::int64_t group_size, void* stream) {
  return guarded([&] {
    Views views(op);
    function(views.required(out, "out"), views.required(scales, "scales"), views.required(x, "x"), granularity_of(op, granularity),
             group_size, Stream(stream));
  });
}

using Size = std::int64_t (*)(std::int64_t, std::int64_t, std::int64_t, std::int64_t, Device);
int size(const char* op, Size function, std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
         int device_type, int device_id, std::int64_t* num_bytes) {
  return guarded([&] {
    require_result(op, num_bytes);
    *num_bytes = function(num_tokens, num_seqs, num_heads, head_dim, device_of(op, "device", device_type, device_id));
  });
}

}  // namespace

extern "C" {

int quire_abi_version(void) { return QUIRE_ABI_VERSION; }
const char* quire_version(void) { return quire::version(); }
const char* quire_last_error(void) { return last_error().c_str(); }
int quire_has_cuda(void) { return quire::has_cuda() ? 1 : 0; }
int quire_num_cuda_devices(void) { return quire::num_cuda_devices(); }
int quire_num_threads(void) { return quire::num_threads(); }
int quire_set_num_threads(int num_threads) {
  return guarded([&] { quire::set_num_threads(num_threads); });
}
int quire_check_errors(int device_type, int device_id) {
  return guarded([&] { quire::check_errors(device_of("check_errors", "device", device_type, device_id)); });
}

int quire_rms_norm(const QuireTensor* out, const QuireTensor* x, const QuireTensor* weight, double eps, double weight_offset,
                   void* stream) {
  return guarded([&] {
    Views v("rms_norm");
    quire::rms_norm(v.required(out, "out"), v.required(x, "x"), v.required(weight, "weight"), eps, weight_offset, Stream(stream));
  });
}

int quire_fused_add_rms_norm(const QuireTensor* x, const QuireTensor* residual, const QuireTensor* weight, double eps, double weight_offset,
                             void* stream) {
  return guarded([&] {
    Views v("fused_add_rms_norm");
    quire::fused_add_rms_norm(v.required(x, "x"), v.required(residual, "residual"), v.required(weight, "weight"), eps, weight_offset,
                              Stream(stream));
  });
}

int quire_layer_norm(const QuireTensor* out, const QuireTensor* x, const QuireTensor* weight, const QuireTensor* bias_or_null, double eps,
                     void* stream) {
  return guarded([&] {
    Views v("layer_norm");
    quire::layer_norm(v.required(out, "out"), v.required(x, "x"), v.required(weight, "weight"), v.optional(bias_or_null, "bias"), eps,
                      Stream(stream));
  });
}

int quire_rms_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, const QuireTensor* weight, double eps,
                             double weight_offset, int granularity, int64_t group_size, void* stream) {
  return guarded([&] {
    Views v("rms_norm");
    quire::rms_norm_quantized(v.required(out, "out"), v.required(scales, "scales"), v.required(x, "x"), v.required(weight, "weight"), eps,
                              weight_offset, granularity_of("rms_norm", granularity), group_size, Stream(stream));
  });
}

int quire_fused_add_rms_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* residual, const QuireTensor* x,
                                       const QuireTensor* weight, double eps, double weight_offset, int granularity, int64_t group_size,
                                       void* stream) {
  return guarded([&] {
    Views v("fused_add_rms_norm");
    quire::fused_add_rms_norm_quantized(v.required(out, "out"), v.required(scales, "scales"), v.required(residual, "residual"),
                                        v.required(x, "x"), v.required(weight, "weight"), eps, weight_offset,
                                        granularity_of("fused_add_rms_norm", granularity), group_size, Stream(stream));
  });
}

int quire_layer_norm_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, const QuireTensor* weight,
                               const QuireTensor* bias_or_null, double eps, int granularity, int64_t group_size, void* stream) {
  return guarded([&] {
    Views v("layer_norm");
    quire::layer_norm_quantized(v.required(out, "out"), v.required(scales, "scales"), v.required(x, "x"), v.required(weight, "weight"),
                                v.optional(bias_or_null, "bias"), eps, granularity_of("layer_norm", granularity), group_size,
                                Stream(stream));
  });
}

int quire_silu_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("silu_and_mul", &quire::silu_and_mul, out, x, stream);
}
int quire_gelu_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("gelu_and_mul", &quire::gelu_and_mul, out, x, stream);
}
int quire_gelu_tanh_and_mul(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("gelu_tanh_and_mul", &quire::gelu_tanh_and_mul, out, x, stream);
}
int quire_gelu_new(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("gelu_new", &quire::gelu_new, out, x, stream);
}
int quire_gelu_fast(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("gelu_fast", &quire::gelu_fast, out, x, stream);
}
int quire_gelu_quick(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("gelu_quick", &quire::gelu_quick, out, x, stream);
}
int quire_relu_squared(const QuireTensor* out, const QuireTensor* x, void* stream) {
  return plain("relu_squared", &quire::relu_squared, out, x, stream);
}
int quire_silu_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                 int64_t group_size, void* stream) {
  return quantized("silu_and_mul", &quire::silu_and_mul_quantized, out, scales, x, granularity, group_size, stream);
}
int quire_gelu_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                 int64_t group_size, void* stream) {
  return quantized("gelu_and_mul", &quire::gelu_and_mul_quantized, out, scales, x, granularity, group_size, stream);
}
int quire_gelu_tanh_and_mul_quantized(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* x, int granularity,
                                      int64_t group_size, void* stream) {
  return quantized("gelu_tanh_and_mul", &quire::gelu_tanh_and_mul_quantized, out, scales, x, granularity, group_size, stream);
}

int quire_rotary_embedding(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k_or_null,
                           const QuireTensor* cos_sin_cache, int style, void* stream) {
  return guarded([&] {
    Views v("rotary_embedding");
    quire::rotary_embedding(v.required(positions, "positions"), v.required(q, "q"), v.optional(k_or_null, "k"),
                            v.required(cos_sin_cache, "cos_sin_cache"), style_of("rotary_embedding", style), Stream(stream));
  });
}

int quire_qk_norm_rope(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k_or_null, const QuireTensor* q_weight,
                       const QuireTensor* k_weight_or_null, const QuireTensor* cos_sin_cache, double eps, double weight_offset, int style,
                       void* stream) {
  return guarded([&] {
    Views v("qk_norm_rope");
    quire::qk_norm_rope(v.required(positions, "positions"), v.required(q, "q"), v.optional(k_or_null, "k"),
                        v.required(q_weight, "q_weight"), v.optional(k_weight_or_null, "k_weight"),
                        v.required(cos_sin_cache, "cos_sin_cache"), eps, weight_offset, style_of("qk_norm_rope", style), Stream(stream));
  });
}

int quire_rope_and_write_kv(const QuireTensor* positions, const QuireTensor* q, const QuireTensor* k, const QuireTensor* v,
                            const QuireTensor* cos_sin_cache, const QuireTensor* k_cache, const QuireTensor* v_cache,
                            const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null, const QuireTensor* v_scale_or_null,
                            const QuireTensor* k_out_or_null, const QuireTensor* q_weight_or_null, const QuireTensor* k_weight_or_null,
                            double eps, double weight_offset, int style, void* stream) {
  return guarded([&] {
    Views views("rope_and_write_kv");
    quire::rope_and_write_kv(
        views.required(positions, "positions"), views.required(q, "q"), views.required(k, "k"), views.required(v, "v"),
        views.required(cos_sin_cache, "cos_sin_cache"), views.required(k_cache, "k_cache"), views.required(v_cache, "v_cache"),
        views.required(slot_mapping, "slot_mapping"), views.optional(k_scale_or_null, "k_scale"),
        views.optional(v_scale_or_null, "v_scale"), views.optional(k_out_or_null, "k_out"), views.optional(q_weight_or_null, "q_weight"),
        views.optional(k_weight_or_null, "k_weight"), eps, weight_offset, style_of("rope_and_write_kv", style), Stream(stream));
  });
}

int quire_write_kv(const QuireTensor* k_cache, const QuireTensor* v_cache, const QuireTensor* k, const QuireTensor* v,
                   const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null, const QuireTensor* v_scale_or_null, void* stream) {
  return guarded([&] {
    Views views("write_kv");
    quire::write_kv(views.required(k_cache, "k_cache"), views.required(v_cache, "v_cache"), views.required(k, "k"), views.required(v, "v"),
                    views.required(slot_mapping, "slot_mapping"), views.optional(k_scale_or_null, "k_scale"),
                    views.optional(v_scale_or_null, "v_scale"), Stream(stream));
  });
}

int quire_gather_kv(const QuireTensor* k, const QuireTensor* v, const QuireTensor* k_cache, const QuireTensor* v_cache,
                    const QuireTensor* slot_mapping, const QuireTensor* k_scale_or_null, const QuireTensor* v_scale_or_null, void* stream) {
  return guarded([&] {
    Views views("gather_kv");
    quire::gather_kv(views.required(k, "k"), views.required(v, "v"), views.required(k_cache, "k_cache"), views.required(v_cache, "v_cache"),
                     views.required(slot_mapping, "slot_mapping"), views.optional(k_scale_or_null, "k_scale"),
                     views.optional(v_scale_or_null, "v_scale"), Stream(stream));
  });
}

int quire_copy_blocks(const QuireTensor* cache, const QuireTensor* pairs, void* stream) {
  return guarded([&] {
    Views v("copy_blocks");
    quire::copy_blocks(v.required(cache, "cache"), v.required(pairs, "pairs"), Stream(stream));
  });
}

int quire_swap_blocks(const QuireTensor* dst, const QuireTensor* src, const QuireTensor* pairs, void* stream) {
  return guarded([&] {
    Views v("swap_blocks");
    quire::swap_blocks(v.required(dst, "dst"), v.required(src, "src"), v.required(pairs, "pairs"), Stream(stream));
  });
}

int quire_paged_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q, const QuireTensor* k_cache,
                          const QuireTensor* v_cache, const QuireTensor* block_tables, const QuireTensor* seq_lens,
                          const QuireTensor* query_start_loc_or_null, const QuireTensor* workspace_or_null,
                          const QuireAttentionOptions* options_or_null, void* stream) {
  return guarded([&] {
    Views v("paged_attention");
    const AttentionOptions options = options_of("paged_attention", options_or_null, v);
    quire::paged_attention(v.required(out, "out"), v.optional(lse_or_null, "lse"), v.required(q, "q"), v.required(k_cache, "k_cache"),
                           v.required(v_cache, "v_cache"), v.required(block_tables, "block_tables"), v.required(seq_lens, "seq_lens"),
                           v.optional(query_start_loc_or_null, "query_start_loc"), v.optional(workspace_or_null, "workspace"), options,
                           Stream(stream));
  });
}

int quire_shared_prefix_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q, const QuireTensor* k_cache,
                                  const QuireTensor* v_cache, const QuireTensor* prefix_blocks, const QuireTensor* block_tables,
                                  const QuireTensor* seq_lens, const QuireTensor* query_start_loc_or_null,
                                  const QuireTensor* workspace_or_null, const QuireAttentionOptions* options_or_null, void* stream) {
  return guarded([&] {
    Views v("shared_prefix_attention");
    const AttentionOptions options = options_of("shared_prefix_attention", options_or_null, v);
    quire::shared_prefix_attention(v.required(out, "out"), v.optional(lse_or_null, "lse"), v.required(q, "q"),
                                   v.required(k_cache, "k_cache"), v.required(v_cache, "v_cache"),
                                   v.required(prefix_blocks, "prefix_blocks"), v.required(block_tables, "block_tables"),
                                   v.required(seq_lens, "seq_lens"), v.optional(query_start_loc_or_null, "query_start_loc"),
                                   v.optional(workspace_or_null, "workspace"), options, Stream(stream));
  });
}

int quire_attention(const QuireTensor* out, const QuireTensor* lse_or_null, const QuireTensor* q, const QuireTensor* k,
                    const QuireTensor* v, const QuireTensor* query_start_loc_or_null, const QuireTensor* kv_start_loc_or_null,
                    const QuireTensor* workspace_or_null, const QuireAttentionOptions* options_or_null, void* stream) {
  return guarded([&] {
    Views views("attention");
    const AttentionOptions options = options_of("attention", options_or_null, views);
    quire::attention(views.required(out, "out"), views.optional(lse_or_null, "lse"), views.required(q, "q"), views.required(k, "k"),
                     views.required(v, "v"), views.optional(query_start_loc_or_null, "query_start_loc"),
                     views.optional(kv_start_loc_or_null, "kv_start_loc"), views.optional(workspace_or_null, "workspace"), options,
                     Stream(stream));
  });
}

int quire_merge_attention(const QuireTensor* out, const QuireTensor* out_lse_or_null, const QuireTensor* out_a, const QuireTensor* lse_a,
                          const QuireTensor* out_b, const QuireTensor* lse_b, void* stream) {
  return guarded([&] {
    Views v("merge_attention");
    quire::merge_attention(v.required(out, "out"), v.optional(out_lse_or_null, "out_lse"), v.required(out_a, "out_a"),
                           v.required(lse_a, "lse_a"), v.required(out_b, "out_b"), v.required(lse_b, "lse_b"), Stream(stream));
  });
}

int quire_paged_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim, int device_type,
                                         int device_id, int64_t* num_bytes) {
  return size("paged_attention_workspace_size", &quire::paged_attention_workspace_size, num_tokens, num_seqs, num_heads, head_dim,
              device_type, device_id, num_bytes);
}
int quire_shared_prefix_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim, int device_type,
                                                 int device_id, int64_t* num_bytes) {
  return size("shared_prefix_attention_workspace_size", &quire::shared_prefix_attention_workspace_size, num_tokens, num_seqs, num_heads,
              head_dim, device_type, device_id, num_bytes);
}
int quire_attention_workspace_size(int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t head_dim, int device_type,
                                   int device_id, int64_t* num_bytes) {
  return size("attention_workspace_size", &quire::attention_workspace_size, num_tokens, num_seqs, num_heads, head_dim, device_type,
              device_id, num_bytes);
}

int quire_quantize(const QuireTensor* out, const QuireTensor* scales, const QuireTensor* zero_points_or_null, const QuireTensor* x,
                   int granularity, int64_t group_size, int computes, double scale_bound, void* stream) {
  return guarded([&] {
    Views v("quantize");
    quire::quantize(v.required(out, "out"), v.required(scales, "scales"), v.optional(zero_points_or_null, "zero_points"),
                    v.required(x, "x"), granularity_of("quantize", granularity), group_size, computes != 0, scale_bound, Stream(stream));
  });
}

int quire_dequantize(const QuireTensor* out, const QuireTensor* q, const QuireTensor* scales, const QuireTensor* zero_points_or_null,
                     int granularity, int64_t group_size, void* stream) {
  return guarded([&] {
    Views v("dequantize");
    quire::dequantize(v.required(out, "out"), v.required(q, "q"), v.required(scales, "scales"),
                      v.optional(zero_points_or_null, "zero_points"), granularity_of("dequantize", granularity), group_size,
                      Stream(stream));
  });
}

int quire_dequantize_blocks(const QuireTensor* out, const QuireTensor* w, const QuireTensor* scales, int64_t block_rows,
                            int64_t block_columns, void* stream) {
  return guarded([&] {
    Views v("dequantize_blocks");
    quire::dequantize_blocks(v.required(out, "out"), v.required(w, "w"), v.required(scales, "scales"), block_rows, block_columns,
                             Stream(stream));
  });
}

int quire_packed_weight_size(const QuireWeightFormat* format, int device_type, int device_id, int64_t* num_bytes) {
  const char* const op = "packed_weight_size";
  return guarded([&] {
    require_result(op, num_bytes);
    *num_bytes = quire::packed_weight_size(format_of(op, format), device_of(op, "device", device_type, device_id));
  });
}

int quire_pack_weight(const QuireTensor* data, const QuireWeightFormat* format, const QuireTensor* permutation_or_null, int encoding,
                      const QuireTensor* codes, const QuireTensor* scales, const QuireTensor* zeros_or_null,
                      const QuireTensor* groups_or_null, void* stream) {
  const char* const op = "pack_weight";
  return guarded([&] {
    Views v(op);
    quire::pack_weight({format_of(op, format), v.required(data, "weight"), v.optional(permutation_or_null, "permutation")},
                       {encoding_of(op, encoding), v.required(codes, "codes"), v.required(scales, "scales"),
                        v.optional(zeros_or_null, "zeros"), v.optional(groups_or_null, "groups")},
                       Stream(stream));
  });
}

int quire_dequantize_weight(const QuireTensor* out, const QuireTensor* data, const QuireWeightFormat* format,
                            const QuireTensor* permutation_or_null, void* stream) {
  const char* const op = "dequantize_weight";
  return guarded([&] {
    Views v(op);
    quire::dequantize_weight(v.required(out, "out"),
                             {format_of(op, format), v.required(data, "weight"), v.optional(permutation_or_null, "permutation")},
                             Stream(stream));
  });
}

int quire_quantize_weight(const QuireTensor* codes, const QuireTensor* scales, const QuireTensor* zeros_or_null, const QuireTensor* w,
                          int bits, int64_t group_size, void* stream) {
  return guarded([&] {
    Views v("quantize_weight");
    quire::quantize_weight(v.required(codes, "codes"), v.required(scales, "scales"), v.optional(zeros_or_null, "zeros"), v.required(w, "w"),
                           bits, group_size, Stream(stream));
  });
}

int quire_quantized_matmul(const QuireTensor* out, const QuireTensor* x, const QuireTensor* data, const QuireWeightFormat* format,
                           const QuireTensor* permutation_or_null, const QuireTensor* bias_or_null, const QuireTensor* workspace_or_null,
                           int batch_invariant, void* stream) {
  const char* const op = "quantized_matmul";
  return guarded([&] {
    Views v(op);
    quire::quantized_matmul(v.required(out, "out"), v.required(x, "x"),
                            {format_of(op, format), v.required(data, "weight"), v.optional(permutation_or_null, "permutation")},
                            v.optional(bias_or_null, "bias"), v.optional(workspace_or_null, "workspace"), {batch_invariant != 0},
                            Stream(stream));
  });
}

int quire_quantized_matmul_workspace_size(int64_t num_tokens, const QuireWeightFormat* format, int has_permutation, QuireDataType dtype,
                                          int batch_invariant, int device_type, int device_id, int64_t* num_bytes) {
  const char* const op = "quantized_matmul_workspace_size";
  return guarded([&] {
    require_result(op, num_bytes);
    *num_bytes = quire::quantized_matmul_workspace_size(num_tokens, format_of(op, format), has_permutation != 0,
                                                        required_dtype(op, "dtype", dtype, "a dtype of the library"),
                                                        {batch_invariant != 0}, device_of(op, "device", device_type, device_id));
  });
}

int quire_scaled_matmul(const QuireTensor* out, const QuireTensor* a, const QuireTensor* b, const QuireTensor* scale_a,
                        const QuireTensor* scale_b, const QuireTensor* zero_point_or_null, const QuireTensor* column_sums_or_null,
                        const QuireTensor* bias_or_null, const QuireTensor* workspace_or_null, int batch_invariant, void* stream) {
  return guarded([&] {
    Views v("scaled_matmul");
    quire::scaled_matmul(v.required(out, "out"), v.required(a, "a"), v.required(b, "b"),
                         {v.required(scale_a, "scale_a"), v.required(scale_b, "scale_b"), v.optional(zero_point_or_null, "zero_point"),
                          v.optional(column_sums_or_null, "column_sums")},
                         v.optional(bias_or_null, "bias"), v.optional(workspace_or_null, "workspace"), {batch_invariant != 0},
                         Stream(stream));
  });
}

int quire_scaled_matmul_workspace_size(int64_t m, int64_t n, int64_t k, QuireDataType dtype, int has_blocks, int computes_sums,
                                       int batch_invariant, int device_type, int device_id, int64_t* num_bytes) {
  const char* const op = "scaled_matmul_workspace_size";
  return guarded([&] {
    require_result(op, num_bytes);
    *num_bytes =
        quire::scaled_matmul_workspace_size(m, n, k, required_dtype(op, "dtype", dtype, "a dtype of the library"), has_blocks != 0,
                                            computes_sums != 0, {batch_invariant != 0}, device_of(op, "device", device_type, device_id));
  });
}

int quire_column_sums(const QuireTensor* sums, const QuireTensor* b, void* stream) {
  return guarded([&] {
    Views v("column_sums");
    quire::column_sums(v.required(sums, "sums"), v.required(b, "b"), Stream(stream));
  });
}

}  // extern "C"
