// Reads XLA's call frames and turns exceptions into XLA's errors.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/jax/call.h"

#include <bit>
#include <cstring>
#include <stdexcept>

#include "core/runtime.h"
#include "cuda/runtime.h"
#include "ops/kv_cache.h"
#include "quire/error.h"

namespace quire::jax {
namespace {

[[noreturn]] void fail(const char* op, std::string_view what, const char* expected) {
  throw std::logic_error(std::string("[") + op + "] " + std::string(what) + ": expected " + expected + ", got a call of another form");
}

DType dtype_of(const char* op, xla::DataType type) {
  switch (type) {
    case xla::kPred: return DType::kBool;
    case xla::kS8: return DType::kInt8;
    case xla::kS32: return DType::kInt32;
    case xla::kS64: return DType::kInt64;
    case xla::kU8: return DType::kUInt8;
    case xla::kF16: return DType::kFloat16;
    case xla::kF32: return DType::kFloat32;
    case xla::kBF16: return DType::kBFloat16;
    case xla::kF8E5M2: return DType::kFloat8E5M2;
    case xla::kF8E4M3FN: return DType::kFloat8E4M3FN;
    default:
      throw TypeError(
          std::string("[") + op +
          "] array: expected float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, int32, int64 or bool, got XLA "
          "type " +
          std::to_string(type));
  }
}

// XLA's buffers are dense and row-major.
void read_buffer(TensorView& view, const char* op, const xla::Buffer& buffer, Device device) {
  if (buffer.rank > kMaxRank)
    throw std::invalid_argument(std::string("[") + op + "] array: expected a rank of at most 8, got " + std::to_string(buffer.rank));
  view.data = buffer.data;
  view.dtype = dtype_of(op, buffer.dtype);
  view.device = device;
  view.ndim = static_cast<int>(buffer.rank);
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    view.shape[at] = buffer.dims[i];
    view.strides[at] = stride;
    stride *= buffer.dims[i];
  }
}

void read_attributes(Call& call, const xla::Attributes& attributes) {
  for (std::int64_t i = 0; i < attributes.size; ++i) {
    Attribute& attribute = call.add({attributes.names[i]->ptr, attributes.names[i]->len});
    if (attributes.types[i] == xla::kAttrString) {
      const auto& span = *static_cast<const xla::ByteSpan*>(attributes.attrs[i]);
      attribute.kind = Attribute::Kind::kText;
      attribute.text = {span.ptr, span.len};
    } else if (attributes.types[i] == xla::kAttrScalar) {
      const auto& scalar = *static_cast<const xla::Scalar*>(attributes.attrs[i]);
      if (scalar.dtype == xla::kS64) {
        attribute.integer = *static_cast<const std::int64_t*>(scalar.value);
      } else if (scalar.dtype == xla::kF64) {
        attribute.kind = Attribute::Kind::kNumber;
        attribute.number = *static_cast<const double*>(scalar.value);
      } else {
        fail(call.op(), attribute.name, "int64 or float64");
      }
    } else {
      fail(call.op(), attribute.name, "a scalar or text");
    }
  }
}

const xla::Buffer& buffer_at(const Call& call, const xla::Buffers& buffers, std::int64_t i) {
  if (buffers.types[i] != xla::kArgBuffer) fail(call.op(), "arguments", "buffers");
  return *static_cast<const xla::Buffer*>(buffers.buffers[i]);
}

xla::Error* make_error(const xla::Api* api, xla::ErrorCode code, const char* message) {
  xla::ErrorCreateArgs args{sizeof(xla::ErrorCreateArgs), nullptr, message, code};
  return api->error_create(&args);
}

}  // namespace

const TensorView& Call::operand(std::size_t i) const {
  if (operands_[i] == nullptr) fail(op_, "operand " + std::to_string(i), "an array");
  return *operands_[i];
}

const TensorView& Call::result(std::size_t i) const {
  if (results_[i] == nullptr) fail(op_, "result " + std::to_string(i), "an array");
  return *results_[i];
}

const TensorView& Call::in_place(std::size_t i, std::size_t j) const {
  const TensorView &out = result(i), &in = operand(j);
  if (out.data == in.data) return out;
  // XLA gives the two one memory, but where it fuses the call with slices of them, as of a scan's inputs and results.
  if (out.numel() != in.numel() || out.dtype != in.dtype) fail(op_, "result " + std::to_string(i), "the form of its operand");
  const std::int64_t num_bytes = out.numel() * itemsize(out.dtype);
  if (num_bytes == 0) return out;
  on_device(
      op_, out.device, stream_, [&] { std::memcpy(out.data, in.data, static_cast<std::size_t>(num_bytes)); },
      [&](auto stream) { cuda::copy_memory(out.data, num_bytes, in.data, num_bytes, num_bytes, 1, stream); });
  return out;
}

// XLA orders attributes by name: ops that read them in this order find each at the first look.
const Attribute* Call::find(std::string_view name) const {
  for (std::size_t looks = 0; looks < attributes_.size(); ++looks) {
    if (next_attribute_ == attributes_.size()) next_attribute_ = 0;
    const Attribute& attribute = attributes_[next_attribute_++];
    if (attribute.name == name) return &attribute;
  }
  return nullptr;
}

const Attribute& Call::get(std::string_view name, Attribute::Kind kind) const {
  const Attribute* const found = find(name);
  if (found == nullptr || found->kind != kind) fail(op_, name, "an attribute of this name and kind");
  return *found;
}

double Call::number(std::string_view name) const { return get(name, Attribute::Kind::kNumber).number; }
std::int64_t Call::integer(std::string_view name) const { return get(name, Attribute::Kind::kInteger).integer; }
std::string_view Call::text(std::string_view name) const { return get(name, Attribute::Kind::kText).text; }

std::optional<double> Call::optional_number(std::string_view name) const {
  const Attribute* const found = find(name);
  if (found == nullptr) return std::nullopt;
  if (found->kind != Attribute::Kind::kNumber) fail(op_, name, "a number");
  return found->number;
}

Attribute& Call::add(std::string_view name) {
  if (attributes_.is_full()) fail(op_, "attributes", "fewer");
  Attribute& attribute = attributes_.emplace_back();
  attribute.name = name;
  return attribute;
}

TensorView& Call::add_operand() {
  if (!coming_operands_) coming_operands_ = static_cast<std::uint64_t>(integer("operands"));
  const auto place = static_cast<std::size_t>(std::countr_zero(*coming_operands_));
  if (place >= kMaxOperands) fail(op_, "operands", "fewer");
  *coming_operands_ &= *coming_operands_ - 1;
  TensorView& view = views_.emplace_back();
  operands_[place] = &view;
  return view;
}

TensorView& Call::add_result() {
  if (!coming_results_) coming_results_ = static_cast<std::uint64_t>(integer("results"));
  const auto place = static_cast<std::size_t>(std::countr_zero(*coming_results_));
  if (place >= kMaxResults) fail(op_, "results", "fewer");
  *coming_results_ &= *coming_results_ - 1;
  TensorView& view = views_.emplace_back();
  results_[place] = &view;
  return view;
}

ScaleGranularity granularity_of(const Call& call) {
  const std::string_view text = call.text("granularity");
  return text == "tensor" ? ScaleGranularity::kTensor : text == "token" ? ScaleGranularity::kToken : ScaleGranularity::kGroup;
}

RopeStyle rope_style_of(const Call& call) { return call.text("style") == "neox" ? RopeStyle::kNeox : RopeStyle::kGptj; }

xla::Error* handle(const char* name, Op op, DeviceType device_type, xla::CallFrame* frame) {
  for (xla::Extension* extension = frame->extension_start; extension != nullptr; extension = extension->next) {
    if (extension->type != xla::kExtensionMetadata) continue;
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(extension)->metadata;
    metadata.api_version.major_version = xla::kApiMajor;
    metadata.api_version.minor_version = xla::kApiMinor;
    metadata.traits = xla::kCommandBufferCompatible;
    return nullptr;
  }
  const xla::Api* const api = frame->api;
  try {
    Call call(name);
    Device device{device_type, 0};
    if (device_type == DeviceType::kCUDA) {
      xla::StreamGetArgs stream{sizeof(xla::StreamGetArgs), nullptr, frame->ctx, nullptr};
      if (xla::Error* const error = api->stream_get(&stream)) return error;
      call.set_stream(Stream(stream.stream));
      // XLA makes the stream's device current before it calls a handler.
      if constexpr (kHasCuda) device.index = cuda::current_device();
    }
    read_attributes(call, frame->attrs);
    for (std::int64_t i = 0; i < frame->args.size; ++i) read_buffer(call.add_operand(), name, buffer_at(call, frame->args, i), device);
    for (std::int64_t i = 0; i < frame->rets.size; ++i) read_buffer(call.add_result(), name, buffer_at(call, frame->rets, i), device);
    op(call);
    return nullptr;
  } catch (const UnsupportedError& error) {
    return make_error(api, xla::kUnimplemented, error.what());
  } catch (const std::invalid_argument& error) {
    return make_error(api, xla::kInvalidArgument, error.what());
  } catch (const std::bad_alloc& error) {
    return make_error(api, xla::kResourceExhausted, error.what());
  } catch (const std::exception& error) {
    return make_error(api, xla::kInternal, error.what());
  }
}

}  // namespace quire::jax
