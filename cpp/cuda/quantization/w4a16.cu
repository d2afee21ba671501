// quantized_matmul on CUDA: which kernel, and slices of tokens that a bounded workspace does for.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <random>
#include <string>

#include "core/explain.h"
#include "cuda/device_code.h"
#include "cuda/launch.h"
#include "cuda/quantization/w4a16_launch.h"

namespace quire::cuda {

namespace w4a16 {

std::uint64_t arrival_tag() {
  static const std::uint64_t tag = [] {
    std::random_device source;
    return (std::uint64_t{source()} << 32 | source()) & ~std::uint64_t{0xffff};
  }();
  return tag;
}

namespace {

/// Why wgmma's kernel cannot do it or is the slower one; null: it is taken. It rounds weights to the dtype of x, whose range float16 may not have
/// for scales of another dtype; the other kernel multiplies by scales in float32.
const char* prevents_wgmma(std::int64_t num_tokens, const Layout& layout, DType dtype, bool batch_invariant) {
  if (!has_hopper_code()) return "the device is no Hopper, or this build has no code for sm_90a";
  if (batch_invariant) return "batch_invariant: one kernel for any number of tokens";
  if (num_tokens <= kMaxFewTokens) return "so few tokens would leave its tiles mostly empty";
  if (layout.num_steps < 4) return "fewer than 256 input features";
  if (dtype != DType::kBFloat16 && layout.scale_dtype != DType::kFloat16)
    return "float16 may not have the range of scales of another dtype";
  return nullptr;
}

/// One token of a weight of less: mma is faster (10.2 µs to 10.9 at 8 MiB, the same at 30).
constexpr std::int64_t kSmallWeightBytes = std::int64_t{20} << 20;

/// The same for the kernel for few tokens.
const char* prevents_few(std::int64_t num_tokens, const Layout& layout, const WeightFormat& format, bool has_permutation,
                         bool batch_invariant) {
  if (!has_hopper_code()) return "the device is no Hopper, or this build has no code for sm_90a";
  if (batch_invariant) return "batch_invariant: one kernel for any number of tokens";
  if (num_tokens > kMaxFewTokens) return "more tokens than it has room for";
  if (num_tokens == 1) {
    if (std::max(format.num_rows, format.in_features) > kMaxFewOneColumns) return "shared memory has no room for x";
    return !has_permutation && layout.num_bytes < kSmallWeightBytes ? "one token of a small weight is mma's" : nullptr;
  }
  if (format.num_rows % kUnitColumns != 0) return "input features are no multiple of 64";
  return nullptr;
}

/// The first of `few` and `wgmma` that is null is the kernel that is taken; where neither is, it is mma.
void explain(const QuantizedMatmulParams& p, const Layout& layout, const char* few, const char* wgmma, const DeviceProperties& device,
             Explanation& explanation) {
  const auto add = [&](const std::string& reason) { explanation.reasons.push_back(reason); };
  if (few == nullptr) {
    const int source_columns = few_source_columns(p.num_tokens, p.weight.format, p.weight.permutation != nullptr);
    const FewChoice choice = choose_few(p.num_tokens, layout, source_columns, device.num_sms);
    explanation.variant = "few";
    add("tiles of " + (choice.tokens == 1 ? std::string("one token") : std::to_string(choice.tokens) + " tokens") + " and " +
        std::to_string(kBlockRows << choice.row_groups_log2) + " output features");
    if (choice.num_helpers > 0) add(std::to_string(choice.num_helpers) + " CTAs help the others with the last round of tiles");
    if (choice.cluster_ctas > 1) add("each tile's input features in " + std::to_string(choice.cluster_ctas) + " parts of a cluster");
  } else if (wgmma == nullptr) {
    const WgmmaChoice choice = choose_wgmma(p.num_tokens, layout, device.num_sms);
    explanation.variant = "wgmma";
    add("tiles of " + std::to_string(choice.tokens) + " tokens and " + std::to_string(kWgmmaRows) + " output features");
    if (choice.cluster_ctas > 1) add("each tile's input features in " + std::to_string(choice.cluster_ctas) + " parts of a cluster");
    if (choice.num_shared_tiles > 0 && choice.num_chunks > 1)
      add("input features of " + std::to_string(choice.num_shared_tiles) + " tiles in " + std::to_string(choice.num_chunks) + " parts");
  } else {
    const MmaChoice choice = choose_mma(p.num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, p.batch_invariant);
    explanation.variant = "mma";
    add(std::string("not few: ") + few);
    add(std::string("not wgmma: ") + wgmma);
    add("tiles of " + std::to_string(8 * choice.tiles) + " tokens, input features in " + std::to_string(choice.num_chunks) + " parts");
  }
  if (p.weight.permutation != nullptr) {
    const bool by_itself = few == nullptr && p.num_tokens == 1;
    add(std::string(by_itself ? "x is put" : "x is first put") + " in the weight's order of input features (act-order)");
  }
}

/// Tokens that are worked on at a time.
std::int64_t slice_tokens(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation) {
  num_tokens = std::max(num_tokens, std::int64_t{1});
  if (!has_permutation) return num_tokens;
  const std::int64_t most = std::max(kMaxGatheredBytes / gathered_bytes(1, format) / kBandTokens, std::int64_t{1}) * kBandTokens;
  return std::min(num_tokens, most);
}

std::int64_t slice_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                  bool batch_invariant) {
  if (num_tokens == 0) return 0;
  const DeviceProperties& device = current_device_properties();
  const Layout layout(nullptr, format);
  const MmaChoice mma = choose_mma(num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, batch_invariant);
  std::int64_t num_bytes = mma.partial_bytes + mma.arrival_bytes;
  if (prevents_few(num_tokens, layout, format, has_permutation, batch_invariant) == nullptr) {
    const FewChoice few = choose_few(num_tokens, layout, few_source_columns(num_tokens, format, has_permutation), device.num_sms);
    num_bytes = std::max(num_bytes, few.partial_bytes + few.arrival_bytes);
  }
  if (prevents_wgmma(num_tokens, layout, dtype, batch_invariant) == nullptr) {
    const WgmmaChoice wgmma = choose_wgmma(num_tokens, layout, device.num_sms);
    num_bytes = std::max(num_bytes, wgmma.partial_bytes + wgmma.arrival_bytes);
  }
  return num_bytes + (has_permutation ? gathered_bytes(num_tokens, format) : 0);
}

void multiply_slice(const QuantizedMatmulParams& params, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  const Layout layout(params.weight.data, params.weight.format);
  const bool aligned =
      params.weight.permutation != nullptr || (is_aligned(params.x, 16) && (params.num_tokens == 1 || params.x_stride > 0) &&
                                               keeps_alignment(params.num_tokens, params.x_stride, 2, 16));
  const char* few =
      prevents_few(params.num_tokens, layout, params.weight.format, params.weight.permutation != nullptr, params.batch_invariant);
  const char* wgmma = prevents_wgmma(params.num_tokens, layout, params.dtype, params.batch_invariant);
  if (!aligned) {
    const char* const obstacle = "rows of x do not begin at multiples of 16 bytes";
    if (few == nullptr && params.num_tokens > 1) few = obstacle;
    if (wgmma == nullptr) wgmma = obstacle;
  }
  if (Explanation* const explanation = explaining()) return explain(params, layout, few, wgmma, device, *explanation);
  if (few == nullptr) {
    const int source_columns = few_source_columns(params.num_tokens, params.weight.format, params.weight.permutation != nullptr);
    run_few(params, choose_few(params.num_tokens, layout, source_columns, device.num_sms), stream);
  } else if (wgmma == nullptr) {
    run_wgmma(params, choose_wgmma(params.num_tokens, layout, device.num_sms), stream);
  } else {
    run_mma(params, choose_mma(params.num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, params.batch_invariant), stream);
  }
}

}  // namespace
}  // namespace w4a16

std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             bool batch_invariant) {
  const std::int64_t slice = w4a16::slice_tokens(num_tokens, format, has_permutation);
  return std::max(w4a16::slice_workspace_size(slice, format, has_permutation, dtype, batch_invariant),
                  w4a16::slice_workspace_size(num_tokens % slice, format, has_permutation, dtype, batch_invariant));
}

void quantized_matmul(const QuantizedMatmulParams& params, Stream stream) {
  const std::int64_t slice = w4a16::slice_tokens(params.num_tokens, params.weight.format, params.weight.permutation != nullptr);
  for (std::int64_t first = 0; first < params.num_tokens; first += slice) {
    QuantizedMatmulParams part = params;
    part.num_tokens = std::min(params.num_tokens - first, slice);
    part.x = static_cast<const std::uint16_t*>(params.x) + first * params.x_stride;
    part.out = static_cast<std::uint16_t*>(params.out) + first * params.out_stride;
    w4a16::multiply_slice(part, stream);
    if (explaining() != nullptr) return;  // the other parts are alike
  }
}

}  // namespace quire::cuda
