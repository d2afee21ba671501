// One call of an op from JAX: XLA's call frame, or the shapes of a traced call, as TensorViews and options.
// SPDX-License-Identifier: Apache-2.0
//
// An op is entered through a function of a Call, the same for a frame and for shapes. Operands are numbered as the op's full list; absent
// ones are told by the bits of the attribute "operands", absent results by those of "results".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

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

/// Up to N things in place, of which those that are not there cost nothing: a call is made and dropped for each dispatch.
template <typename T, std::size_t N>
class InPlace {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);

 public:
  std::size_t size() const { return size_; }
  bool is_full() const { return size_ == N; }
  const T& operator[](std::size_t i) const { return reinterpret_cast<const T*>(memory_)[i]; }
  T& emplace_back() { return *std::construct_at(reinterpret_cast<T*>(memory_) + size_++); }

 private:
  alignas(T) std::byte memory_[N * sizeof(T)];
  std::size_t size_ = 0;
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
  const TensorView* optional_operand(std::size_t i) const { return operands_[i]; }
  const TensorView& result(std::size_t i) const;
  const TensorView* optional_result(std::size_t i) const { return results_[i]; }
  /// Result i, what an op writes in place: the memory of operand j, or else a copy that is made here.
  const TensorView& in_place(std::size_t i, std::size_t j) const;
  const TensorView* optional_in_place(std::size_t i, std::size_t j) const { return operands_[j] != nullptr ? &in_place(i, j) : nullptr; }

  double number(std::string_view name) const;
  std::int64_t integer(std::string_view name) const;
  std::string_view text(std::string_view name) const;
  std::optional<double> optional_number(std::string_view name) const;

  /// The next attribute, for the caller to fill in.
  Attribute& add(std::string_view name);
  void set_stream(Stream stream) { stream_ = stream; }
  /// The next operand or result that the bits of its attribute call present, for the caller to fill in. All attributes come before them.
  TensorView& add_operand();
  TensorView& add_result();

 private:
  const Attribute* find(std::string_view name) const;
  const Attribute& get(std::string_view name, Attribute::Kind kind) const;

  const char* op_;
  Stream stream_ = Stream::legacy_default();
  std::array<const TensorView*, kMaxOperands> operands_{};
  std::array<const TensorView*, kMaxResults> results_{};
  InPlace<TensorView, kMaxOperands + kMaxResults> views_;
  InPlace<Attribute, kMaxAttributes> attributes_;
  std::optional<std::uint64_t> coming_operands_, coming_results_;  // bits of those that are still to come
  mutable std::size_t next_attribute_ = 0;
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

}  // namespace quire::jax
