// One call of an op from JAX: XLA's call frame, or the shapes of a traced call, as TensorViews and options.
// SPDX-License-Identifier: Apache-2.0
//
// An op is entered through a function of a Call, the same for a frame and for shapes. Operands are numbered as the op's full list; absent
// ones are told by the bits of the attribute "operands", absent results by those of "results".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "bindings/jax/xla_ffi.h"
#include "quire/attention.h"
#include "quire/position_encoding.h"
#include "quire/quantization.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire::jax {

/// A named static argument of a call. Text is not copied.
struct Attribute {
  enum class Kind { kInteger, kNumber, kText };
  std::string_view name;
  Kind kind = Kind::kInteger;
  std::int64_t integer = 0;
  double number = 0.0;
  std::string_view text{};
};

class Call {
 public:
  static constexpr std::size_t kMaxOperands = 16, kMaxResults = 4, kMaxAttributes = 24;

  explicit Call(const char* op) : op_(op) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const char* op() const { return op_; }
  Stream stream() const { return stream_; }

  const TensorView& operand(std::size_t i) const;
  const TensorView* optional_operand(std::size_t i) const { return operands_[i] ? &*operands_[i] : nullptr; }
  const TensorView& result(std::size_t i) const;
  const TensorView* optional_result(std::size_t i) const { return results_[i] ? &*results_[i] : nullptr; }
  /// Result i, what an op writes in place: the memory of operand j, or else a copy that is made here.
  const TensorView& in_place(std::size_t i, std::size_t j) const;
  const TensorView* optional_in_place(std::size_t i, std::size_t j) const { return operands_[j] ? &in_place(i, j) : nullptr; }

  double number(std::string_view name) const;
  std::int64_t integer(std::string_view name) const;
  std::string_view text(std::string_view name) const;
  std::optional<double> optional_number(std::string_view name) const;

  void add(const Attribute& attribute);
  void set_stream(Stream stream) { stream_ = stream; }
  /// The next operand or result that the bits of its attribute call present.
  void add_operand(const TensorView& view);
  void add_result(const TensorView& view);

 private:
  const Attribute* find(std::string_view name) const;
  const Attribute& get(std::string_view name, Attribute::Kind kind) const;

  const char* op_;
  Stream stream_ = Stream::legacy_default();
  std::array<std::optional<TensorView>, kMaxOperands> operands_{};
  std::array<std::optional<TensorView>, kMaxResults> results_{};
  std::array<Attribute, kMaxAttributes> attributes_{};
  std::size_t num_attributes_ = 0, next_operand_ = 0, next_result_ = 0;
};

/// Options that several families have.
ScaleGranularity granularity_of(const Call& call);
RopeStyle rope_style_of(const Call& call);

using Op = void (*)(const Call&);
using Handler = xla::Error* (*)(xla::CallFrame*);

/// Answers a call frame: metadata, or the op on the frame's buffers. Exceptions become XLA's errors.
xla::Error* handle(const char* name, Op op, DeviceType device, xla::CallFrame* frame);

/// What is registered with XLA under one name.
struct Target {
  const char* name;
  Op op;
  Handler cpu, cuda;
};

// The name of a target as a template argument.
template <std::size_t N>
struct Name {
  constexpr Name(const char (&text_)[N]) {  // NOLINT: meant to convert
    for (std::size_t i = 0; i < N; ++i) text[i] = text_[i];
  }
  char text[N]{};
};

template <Name kName, Op kOp>
constexpr Target target() {
  return {kName.text, kOp, [](xla::CallFrame* frame) { return handle(kName.text, kOp, DeviceType::kCPU, frame); },
          [](xla::CallFrame* frame) { return handle(kName.text, kOp, DeviceType::kCUDA, frame); }};
}

std::span<const Target> norm_targets();
std::span<const Target> activation_targets();
std::span<const Target> position_encoding_targets();
std::span<const Target> kv_cache_targets();
std::span<const Target> attention_targets();
std::span<const Target> quantization_targets();

}  // namespace quire::jax
