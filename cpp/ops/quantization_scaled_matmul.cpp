// Public entries of products of quantized matrices: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/runtime.h"
#include "ops/quantization.h"
#include "ops/quantization_checks.h"

namespace quire {

namespace {

// Where the sums of b's rows lie in the workspace, if they are computed: at its end.
constexpr std::int64_t kSumAlignment = 256;
std::int64_t scaled_workspace_size(const Check& check, std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks,
                                   const MatmulOptions& options, Device device) {
  std::int64_t num_bytes = 0;
  on_device(
      check.op(), device, Stream::legacy_default(),
      [&] { num_bytes = cpu::scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, options.batch_invariant); },
      [&](auto) { num_bytes = cuda::scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, options.batch_invariant); });
  return ceil_div(num_bytes, kSumAlignment) * kSumAlignment;
}

// [1]: one; otherwise [rows] or [rows, 1].
bool is_per_row(const TensorView& t, std::int64_t rows) {
  return (t.ndim == 1 && t.size(0) == rows) || (t.ndim == 2 && t.size(0) == rows && t.size(1) == 1);
}
bool is_single(const TensorView& t) { return t.ndim >= 1 && t.ndim <= 2 && t.numel() == 1; }

void check_scale_b(const Check& check, const TensorView& t, ScaledMatmulParams& p) {
  check.dtype(t, "scale_b", {DType::kFloat32});
  check.accessible(t, "scale_b");
  p.scale_b = t.as<const float>();
  if (is_single(t)) return;
  if (is_per_row(t, p.n)) {
    p.granularity_b = ScaleGranularity::kToken;
    p.scale_b_row_stride = t.stride(0);
    return;
  }
  const std::int64_t row_blocks = ceil_div(p.n, kScaleBlock), k_blocks = ceil_div(p.k, kScaleBlock);
  if (t.ndim != 2 || t.size(0) != row_blocks || t.size(1) != k_blocks)
    check.fail_value("scale_b", "float32 [1], " + shape_text({p.n, 1}) + " or " + shape_text({row_blocks, k_blocks}), describe(t));
  p.granularity_b = ScaleGranularity::kGroup;
  p.scale_b_row_stride = t.stride(0);
  p.scale_b_group_stride = t.stride(1);
}

void check_scale_a(const Check& check, const TensorView& t, const TensorView& a, ScaledMatmulParams& p) {
  check.dtype(t, "scale_a", {DType::kFloat32});
  check.accessible(t, "scale_a");
  p.scale_a = t.as<const float>();
  const bool by_group = p.granularity_b == ScaleGranularity::kGroup;
  if (!by_group && is_single(t)) return;
  TensorView expected = a;
  expected.dtype = DType::kFloat32;
  expected.shape[static_cast<std::size_t>(a.ndim - 1)] = by_group ? ceil_div(p.k, kScaleBlock) : 1;
  if (t.ndim != a.ndim || !std::equal(t.shape.begin(), t.shape.begin() + t.ndim, expected.shape.begin()))
    check.fail_value("scale_a", (by_group ? "" : "float32 [1] or ") + describe(expected), describe(t));
  std::int64_t rows = 0;
  p.scale_a_row_stride = check_rows(check, t, "scale_a", rows);
  p.scale_a_group_stride = by_group ? t.stride(-1) : 0;
  p.granularity_a = by_group ? ScaleGranularity::kGroup : ScaleGranularity::kToken;
}

void check_zero_point(const Check& check, const TensorView* t, const TensorView& a, ScaledMatmulParams& p) {
  if (t == nullptr) return;
  if (p.dtype != DType::kInt8) check.fail_value("zero_point", "none for float8", describe(*t));
  if (p.granularity_b == ScaleGranularity::kGroup) check.fail_unsupported("zero_point", "none with scales of blocks", describe(*t));
  check.dtype(*t, "zero_point", {DType::kInt32});
  check.device(*t, "zero_point", a.device, "a");
  check.accessible(*t, "zero_point");
  p.zero_point = t->as<const std::int32_t>();
  if (is_single(*t)) return;
  TensorView expected = a;
  expected.dtype = DType::kInt32;
  expected.shape[static_cast<std::size_t>(a.ndim - 1)] = 1;
  if (t->ndim != a.ndim || !std::equal(t->shape.begin(), t->shape.begin() + t->ndim, expected.shape.begin()))
    check.fail_value("zero_point", "int32 [1] or " + describe(expected), describe(*t));
  std::int64_t rows = 0;
  p.zero_point_stride = check_rows(check, *t, "zero_point", rows);
}

void run_column_sums(const Check& check, std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride,
                     Device device, Stream stream) {
  on_device(
      check.op(), device, stream, [&] { cpu::column_sums(sums, b, n, k, stride); },
      [&](auto s) { cuda::column_sums(sums, b, n, k, stride, s); });
}

}  // namespace

std::int64_t scaled_matmul_workspace_size(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks, bool computes_sums,
                                          const MatmulOptions& options, Device device) {
  const Check check("scaled_matmul_workspace_size");
  if (dtype != DType::kFloat8E4M3FN && dtype != DType::kInt8) check.fail_dtype("dtype", "float8_e4m3fn or int8", name(dtype));
  check_count(check, "m", m, 0);
  check_count(check, "n", n, 0);
  check_count(check, "k", k, 1);
  if (m == 0 || n == 0) return 0;
  return scaled_workspace_size(check, m, n, k, dtype, has_blocks, options, device) +
         (computes_sums ? n * std::int64_t{sizeof(std::int32_t)} : 0);
}

namespace {

struct ScaledMatmulCall {
  ScaledMatmulParams params;
  std::int32_t* sums_to_compute = nullptr;  // of b's rows, in the workspace
};

// All that may be refused, before anything is launched.
ScaledMatmulCall check_scaled_matmul(const Check& check, const TensorView& out, const TensorView& a, const TensorView& b,
                                     const MatmulScales& scales, const TensorView* bias, const TensorView* workspace,
                                     const MatmulOptions& options) {
  check.dtype(a, "a", {DType::kFloat8E4M3FN, DType::kInt8});
  check.same_dtype(b, "b", a, "a");
  check.rank(a, "a", 1, kMaxRank);
  check.shape(b, "b", {kAny, a.size(-1)});
  check.device(b, "b", a.device, "a");
  for (const auto& [t, arg] : {std::pair{&a, "a"}, std::pair{&b, "b"}}) {
    check.inner_contiguous(*t, arg);
    check.accessible(*t, arg);
  }
  ScaledMatmulCall call;
  ScaledMatmulParams& p = call.params;
  p.dtype = a.dtype;
  p.n = b.size(0);
  p.k = a.size(-1);
  check_count(check, "b", p.n, 0);
  check_count(check, "a", p.k, 1);
  if (p.dtype == DType::kInt8 && p.k > 65536) check.fail_unsupported("a", "up to 65536 columns of int8", describe(a));
  check_product(check, out, a, "a", p.n);
  check.float_dtype(out, "out");
  p.out_dtype = out.dtype;
  p.a_stride = check_rows(check, a, "a", p.m);
  // One row's stride is never stepped along, but it has a part in which kernel runs, and so in the bits of a batch-invariant result.
  if (p.m == 1) p.a_stride = a.ndim >= 2 ? a.stride(-2) : p.k;
  std::int64_t out_rows = 0;
  p.out_stride = check_rows(check, out, "out", out_rows);
  check_count(check, "a", p.m, 0);
  p.b_stride = b.stride(0);
  check.device(scales.scale_a, "scale_a", a.device, "a");
  check.device(scales.scale_b, "scale_b", a.device, "a");
  check_scale_b(check, scales.scale_b, p);
  check_scale_a(check, scales.scale_a, a, p);
  check_zero_point(check, scales.zero_point, a, p);
  if (scales.column_sums != nullptr) {
    check.vector(*scales.column_sums, "column_sums", DType::kInt32, p.n, a.device, "a");
    if (p.zero_point != nullptr) p.column_sums = scales.column_sums->as<const std::int32_t>();
  }
  check_bias(check, bias, p.n, a, "a", p.bias, p.bias_dtype);
  const std::initializer_list<std::pair<const TensorView*, const char*>> inputs = {{&a, "a"},
                                                                                   {&b, "b"},
                                                                                   {&scales.scale_a, "scale_a"},
                                                                                   {&scales.scale_b, "scale_b"},
                                                                                   {scales.zero_point, "zero_point"},
                                                                                   {scales.column_sums, "column_sums"},
                                                                                   {bias, "bias"}};
  for (const auto& [t, arg] : inputs)
    if (t != nullptr) check.disjoint(out, "out", *t, arg, false);
  p.out = out.data;
  p.a = a.data;
  p.b = b.data;
  p.batch_invariant = options.batch_invariant;
  if (p.m == 0 || p.n == 0) return call;
  const bool computes_sums = p.zero_point != nullptr && p.column_sums == nullptr;
  const std::int64_t own_bytes =
      scaled_workspace_size(check, p.m, p.n, p.k, p.dtype, p.granularity_b == ScaleGranularity::kGroup, options, a.device);
  const std::int64_t num_bytes = own_bytes + (computes_sums ? p.n * std::int64_t{sizeof(std::int32_t)} : 0);
  p.workspace = check.workspace(workspace, num_bytes, a.device, "a", inputs);
  if (num_bytes > 0) check.disjoint(*workspace, "workspace", out, "out", false);
  if (computes_sums) {
    call.sums_to_compute = reinterpret_cast<std::int32_t*>(static_cast<char*>(p.workspace) + own_bytes);
    p.column_sums = call.sums_to_compute;
  }
  return call;
}

void run_scaled_matmul(const Check& check, const ScaledMatmulCall& call, Device device, Stream stream) {
  const ScaledMatmulParams& p = call.params;
  if (p.m == 0 || p.n == 0) return;
  if (call.sums_to_compute != nullptr && explaining() == nullptr)
    run_column_sums(check, call.sums_to_compute, static_cast<const std::int8_t*>(p.b), p.n, p.k, p.b_stride, device, stream);
  dispatch_device(check.op(), device, stream, [&] { cpu::scaled_matmul(p); }, [&](auto s) { cuda::scaled_matmul(p, s); }, Explains::kBoth);
}

}  // namespace

void scaled_matmul(const TensorView& out, const TensorView& a, const TensorView& b, const MatmulScales& scales, const TensorView* bias,
                   const TensorView* workspace, const MatmulOptions& options, Stream stream) {
  const Check check("scaled_matmul");
  run_scaled_matmul(check, check_scaled_matmul(check, out, a, b, scales, bias, workspace, options), a.device, stream);
}

namespace {

// How quantize_and_multiply divides its workspace: what scaled_matmul needs, the activations, their scales.
struct QuantizedActivations {
  std::int64_t product_bytes = 0, x_bytes = 0, scale_bytes = 0;
  std::int64_t num_bytes() const { return product_bytes + x_bytes + scale_bytes; }
};

QuantizedActivations divide_workspace(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, ScaleGranularity granularity,
                                      bool computes_sums, const MatmulOptions& options, Device device) {
  const auto aligned = [](std::int64_t num_bytes) { return ceil_div(num_bytes, kSumAlignment) * kSumAlignment; };
  const std::int64_t groups = granularity == ScaleGranularity::kTensor  ? 0
                              : granularity == ScaleGranularity::kToken ? 1
                                                                        : ceil_div(k, kScaleBlock);
  const bool has_blocks = granularity == ScaleGranularity::kGroup;
  return {aligned(scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, computes_sums, options, device)), aligned(m * k),
          aligned(m * groups * std::int64_t{sizeof(float)})};
}

// Row-major, of the rows of x and so many columns.
TensorView rows_like(const TensorView& x, void* data, DType dtype, std::int64_t columns) {
  TensorView t = x;
  t.data = data;
  t.dtype = dtype;
  t.read_only = false;
  std::int64_t stride = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    if (i == x.ndim - 1) t.shape[at] = columns;
    t.strides[at] = stride;
    stride *= t.shape[at];
  }
  return t;
}

}  // namespace

std::int64_t quantize_and_multiply_workspace_size(std::int64_t num_tokens, std::int64_t n, std::int64_t k, DType dtype,
                                                  ScaleGranularity granularity, bool computes_sums, const MatmulOptions& options,
                                                  Device device) {
  check_count(Check("quantized_matmul_workspace_size"), "num_tokens", num_tokens, 0);
  return divide_workspace(num_tokens, n, k, dtype, granularity, computes_sums, options, device).num_bytes();
}

void quantize_and_multiply(const TensorView& out, const TensorView& x, const TensorView& w, const QuantizedProduct& product,
                           const TensorView* bias, const TensorView* workspace, const MatmulOptions& options, Stream stream) {
  const Check check("quantized_matmul");
  check.rank(x, "x", 1, 4);
  check.float_dtype(x, "x");
  check.shape(w, "weight", {kAny, kAny});
  check.device(x, "x", w.device, "weight");
  if (x.size(-1) != w.size(1)) check.fail_value("x", "a last dimension of " + std::to_string(w.size(1)), describe(x));
  check.inner_contiguous(x, "x");
  check.accessible(x, "x");
  std::int64_t num_tokens = 0;
  check_rows(check, x, "x", num_tokens);
  check_count(check, "x", num_tokens, 0);
  check_product(check, out, x, "x", w.size(0));
  const bool computes_sums = product.zero_point != nullptr && product.column_sums == nullptr;
  const QuantizedActivations parts =
      divide_workspace(num_tokens, w.size(0), w.size(1), w.dtype, product.granularity, computes_sums, options, x.device);
  void* const memory = check.workspace(workspace, parts.num_bytes(), x.device, "x",
                                       {{&x, "x"},
                                        {&out, "out"},
                                        {&w, "weight"},
                                        {&product.w_scale, "scale"},
                                        {product.x_scale, "input_scale"},
                                        {product.zero_point, "input_zero_point"},
                                        {product.column_sums, "column_sums"},
                                        {bias, "bias"}});
  auto* const bytes = static_cast<std::byte*>(memory);
  const bool computes = product.granularity != ScaleGranularity::kTensor;
  const std::int64_t groups = product.granularity == ScaleGranularity::kGroup ? ceil_div(w.size(1), kScaleBlock) : 1;
  const auto at = [&](std::int64_t offset) { return bytes == nullptr ? nullptr : bytes + offset; };
  const TensorView a = rows_like(x, at(parts.product_bytes), w.dtype, w.size(1));
  TensorView scale = rows_like(x, at(parts.product_bytes + parts.x_bytes), DType::kFloat32, groups);
  if (!computes) {
    if (product.x_scale == nullptr) check.fail_value("input_scale", "one", "none");
    scale = *product.x_scale;
  }
  const TensorView space(memory, DType::kUInt8, {parts.product_bytes}, x.device);
  const ScaledMatmulCall call =
      check_scaled_matmul(check, out, a, w, {scale, product.w_scale, product.zero_point, product.column_sums}, bias, &space, options);
  quantize(a, scale, product.zero_point, x, product.granularity, kScaleBlock, computes, std::numeric_limits<double>::infinity(), stream);
  run_scaled_matmul(Check("scaled_matmul"), call, x.device, stream);  // what is explained
}

void column_sums(const TensorView& sums, const TensorView& b, Stream stream) {
  const Check check("column_sums");
  check.dtype(b, "b", {DType::kInt8});
  check.shape(b, "b", {kAny, kAny});
  check.inner_contiguous(b, "b");
  check.accessible(b, "b");
  check.vector(sums, "sums", DType::kInt32, b.size(0), b.device, "b");
  check.writable(sums, "sums");
  check.disjoint(sums, "sums", b, "b", false);
  if (b.size(1) > 65536) check.fail_unsupported("b", "up to 65536 columns", describe(b));
  if (b.size(0) == 0) return;
  run_column_sums(check, sums.as<std::int32_t>(), b.as<const std::int8_t>(), b.size(0), b.size(1), b.stride(0), b.device, stream);
}

}  // namespace quire
