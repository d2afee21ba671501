// XLA handlers of the quantization ops. The workspace is a result that XLA allocates and nobody reads.
// SPDX-License-Identifier: Apache-2.0
#include "quire/quantization.h"

#include <array>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "bindings/jax/call.h"
#include "core/explain.h"
#include "ops/quantization.h"

namespace quire::jax {
namespace {

// Operands: x, scale, zero_point. Results: out, and where there is no scale among the operands the computed scales and zero points.
void quantize_rows(const Call& call) {
  const std::int64_t group_size = call.integer("group_size");
  const std::optional<double> bound = call.optional_number("scale_ub");
  const TensorView* const given = call.optional_operand(1);
  quantize(call.result(0), given != nullptr ? *given : call.result(1),
           given != nullptr ? call.optional_operand(2) : call.optional_result(2), call.operand(0), granularity_of(call), group_size,
           given == nullptr, bound.value_or(std::numeric_limits<double>::infinity()), call.stream());
}

// Operands: q, scale, zero_point. Result: out.
void dequantize_rows(const Call& call) {
  if (call.text("granularity") != "block")
    return dequantize(call.result(0), call.operand(0), call.operand(1), call.optional_operand(2), granularity_of(call),
                      call.integer("group_size"), call.stream());
  dequantize_blocks(call.result(0), call.operand(0), call.operand(1), kScaleBlock, kScaleBlock, call.stream());
}

bool validates() { return is_validation(explaining()); }

// What stands for the workspace while a call is traced, before XLA allocates it: behind all other addresses, and large.
TensorView untouched_workspace(Device device) {
  constexpr std::uintptr_t kFar = std::uintptr_t{1} << 60;
  return TensorView(reinterpret_cast<void*>(kFar), DType::kUInt8, {std::int64_t{1} << 50}, device);
}

// What a packed weight is, from the attributes that begin behind `bits`, and which backend's layout it has.
struct Packed {
  WeightFormat format;
  DeviceType layout = DeviceType::kCPU;

  explicit Packed(const Call& call) {
    format.bits = static_cast<int>(call.integer("bits"));
    format.group_size = call.integer("group_size");
    format.has_zeros = call.integer("has_zeros") != 0;
    format.in_features = call.integer("in_features");
    layout = call.text("layout") == "cuda" ? DeviceType::kCUDA : DeviceType::kCPU;
    format.num_rows = call.integer("num_rows");
    format.out_features = call.integer("out_features");
    const std::string_view scale_dtype = call.text("scale_dtype");
    format.scale_dtype = scale_dtype == "float32" ? DType::kFloat32 : scale_dtype == "float16" ? DType::kFloat16 : DType::kBFloat16;
  }

  // Traced arrays are nowhere: they are taken to be where the weight is packed for.
  void place(std::span<std::optional<TensorView>> views, std::span<const TensorView* const> given) const {
    for (std::size_t i = 0; i < views.size(); ++i) {
      if (given[i] == nullptr) continue;
      views[i] = *given[i];
      if (validates()) views[i]->device.type = layout;
    }
  }

  void check_layout(const char* op, const TensorView& data) const {
    if (data.device.type != layout)
      throw std::invalid_argument(std::string("[") + op + "] w: expected a weight packed for " +
                                  (layout == DeviceType::kCUDA ? "cpu, got one for cuda" : "cuda, got one for cpu"));
  }
};

// Operands: x, weight, permutation, bias. Results: out, workspace.
void multiply_packed(const Call& call) {
  const MatmulOptions options{call.integer("batch_invariant") != 0};
  const Packed packed(call);
  std::array<std::optional<TensorView>, 6> views;
  const TensorView* const given[] = {&call.result(0),          &call.operand(0),         &call.operand(1),
                                     call.optional_operand(2), call.optional_operand(3), call.optional_result(1)};
  packed.place(views, given);
  const auto view = [&](std::size_t i) { return views[i] ? &*views[i] : nullptr; };
  if (validates()) views[5] = untouched_workspace(views[0]->device);
  packed.check_layout("quantized_matmul", *views[1]);
  quantized_matmul(*view(0), *view(1), PackedWeight{packed.format, *view(2), view(3)}, view(4), view(5), options, call.stream());
}

// Operands: weight, permutation. Result: out.
void dequantize_packed(const Call& call) {
  const Packed packed(call);
  std::array<std::optional<TensorView>, 3> views;
  const TensorView* const given[] = {&call.result(0), &call.operand(0), call.optional_operand(1)};
  packed.place(views, given);
  packed.check_layout("dequantize", *views[1]);
  dequantize_weight(*views[0], PackedWeight{packed.format, *views[1], views[2] ? &*views[2] : nullptr}, call.stream());
}

// Operands: a, b, scale_a, scale_b, zero_point, column_sums, bias. Results: out, workspace.
void multiply_scaled(const Call& call) {
  const MatmulOptions options{call.integer("batch_invariant") != 0};
  const TensorView untouched = untouched_workspace(call.operand(0).device);
  scaled_matmul(call.result(0), call.operand(0), call.operand(1),
                MatmulScales{call.operand(2), call.operand(3), call.optional_operand(4), call.optional_operand(5)},
                call.optional_operand(6), validates() ? &untouched : call.optional_result(1), options, call.stream());
}

// Operands: x, weight, scale, input_scale, input_zero_point, column_sums, bias. Results: out, workspace.
void multiply_quantizing(const Call& call) {
  const MatmulOptions options{call.integer("batch_invariant") != 0};
  const TensorView untouched = untouched_workspace(call.operand(0).device);
  quantize_and_multiply(
      call.result(0), call.operand(0), call.operand(1),
      {granularity_of(call), call.operand(2), call.optional_operand(3), call.optional_operand(4), call.optional_operand(5)},
      call.optional_operand(6), validates() ? &untouched : call.optional_result(1), options, call.stream());
}

constexpr Target kTargets[] = {
    target<"quantize_fp8", &quantize_rows>(),          target<"quantize_int8", &quantize_rows>(),
    target<"dequantize_fp8", &dequantize_rows>(),      target<"dequantize_int8", &dequantize_rows>(),
    target<"quantized_matmul", &multiply_packed>(),    target<"scaled_matmul", &multiply_scaled>(),
    target<"dequantize_weight", &dequantize_packed>(), target<"quantize_and_multiply", &multiply_quantizing>(),
};

}  // namespace

std::span<const Target> quantization_targets() { return kTargets; }

}  // namespace quire::jax
