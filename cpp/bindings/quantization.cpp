// Bindings of the quantization ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/quantization.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"
#include "bindings/workspace.h"
#include "ops/quantization.h"

namespace quire::bindings {
namespace {

WeightEncoding to_encoding(const char* op, nb::handle value) {
  const std::string text = nb::str(value).c_str();
  if (text == "awq") return WeightEncoding::kAwq;
  if (text == "gptq") return WeightEncoding::kGptq;
  if (text == "gptq_v2") return WeightEncoding::kGptqV2;
  if (text == "compressed-tensors") return WeightEncoding::kCompressedTensors;
  if (text == "codes") return WeightEncoding::kCodes;
  throw std::invalid_argument(std::string("[") + op +
                              "] encoding: expected \"awq\", \"gptq\", \"gptq_v2\", \"compressed-tensors\" or \"codes\", got \"" + text +
                              "\"");
}

int to_bits(const char* op, nb::handle value) {
  const std::int64_t bits = to_int(op, "bits", value);
  return bits < 0 || bits > 64 ? 0 : static_cast<int>(bits);
}

// A format, and the backend whose layout a weight of it has.
struct Format : WeightFormat {
  DeviceType layout = DeviceType::kCPU;
};

DeviceType to_layout(nb::handle value) {
  const std::string text = nb::str(value).c_str();
  if (text == "cpu") return DeviceType::kCPU;
  if (text == "cuda") return DeviceType::kCUDA;
  throw std::invalid_argument("[WeightFormat] layout: expected \"cpu\" or \"cuda\", got \"" + text + "\"");
}

// A packed weight that was copied to a device of the other kind is not in its layout.
void check_layout(const char* op, const Format& format, const TensorView& data) {
  if (data.device.type == format.layout) return;
  const bool is_cuda = data.device.type == DeviceType::kCUDA;
  throw std::invalid_argument(std::string("[") + op + "] weight: expected one packed for " + (is_cuda ? "cuda" : "cpu") + ", got one for " +
                              (is_cuda ? "cpu" : "cuda"));
}

// The number of rows of [..., width]; 0 for shapes that the op itself refuses.
std::int64_t rows_of(const TensorView& t) {
  if (t.ndim < 1 || t.size(-1) < 1) return 0;
  const std::int64_t rows = t.numel() / t.size(-1);
  return rows > INT32_MAX ? 0 : rows;
}

}  // namespace

void bind_quantization(nb::module_& m) {
  nb::class_<Format>(m, "WeightFormat", "What a packed weight is: the fields of quire::WeightFormat.")
      .def(
          "__init__",
          [](Format* self, nb::handle in_features, nb::handle out_features, nb::handle bits, nb::handle group_size, nb::handle num_rows,
             nb::handle scale_dtype, nb::handle has_zeros, nb::handle layout) {
            const char* const op = "WeightFormat";
            new (self) Format{{to_int(op, "in_features", in_features), to_int(op, "out_features", out_features), to_bits(op, bits),
                               to_int(op, "group_size", group_size), to_int(op, "num_rows", num_rows), to_dtype(op, "scales", scale_dtype),
                               to_bool(has_zeros)},
                              to_layout(layout)};
          },
          nb::arg("in_features").none(), nb::arg("out_features").none(), nb::arg("bits").none(), nb::arg("group_size").none(),
          nb::arg("num_rows").none(), nb::arg("scale_dtype").none(), nb::arg("has_zeros").none(), nb::arg("layout").none())
      .def_prop_ro("in_features", [](const Format& f) { return f.in_features; })
      .def_prop_ro("out_features", [](const Format& f) { return f.out_features; })
      .def_prop_ro("bits", [](const Format& f) { return f.bits; })
      .def_prop_ro("group_size", [](const Format& f) { return f.group_size; })
      .def_prop_ro("num_rows", [](const Format& f) { return f.num_rows; })
      .def_prop_ro("num_groups", [](const Format& f) { return f.num_groups(); })
      .def_prop_ro("scale_dtype", [](const Format& f) { return nb::str(name(f.scale_dtype)); })
      .def_prop_ro("has_zeros", [](const Format& f) { return f.has_zeros; })
      .def_prop_ro("layout", [](const Format& f) { return f.layout == DeviceType::kCUDA ? "cuda" : "cpu"; });

  m.def(
      "packed_weight_size",
      [](const Format& format, nb::handle device) { return packed_weight_size(format, to_device("packed_weight_size", device)); },
      nb::arg("format"), nb::arg("device").none());

  m.def(
      "pack_weight",
      [](nb::handle data, const Format& format, nb::handle permutation, nb::handle encoding, nb::handle codes, nb::handle scales,
         nb::handle zeros, nb::handle groups, nb::handle stream) {
        const WeightEncoding how = to_encoding("pack_weight", encoding);
        const SourceNames source = source_names(how);
        Args args("pack_weight", stream,
                  {{data, "weight", Access::kWrite},
                   {codes, source.codes},
                   {scales, source.scales},
                   {zeros, source.zeros, Access::kRead, true},
                   {groups, "groups", Access::kRead, true},
                   {permutation, "permutation", Access::kRead, true}});
        args.run([&](Stream s) {
          pack_weight({format, args[0], args.optional(5)}, {how, args[1], args[2], args.optional(3), args.optional(4)}, s);
        });
      },
      nb::arg("data").none(), nb::arg("format"), nb::arg("permutation").none(), nb::arg("encoding").none(), nb::arg("codes").none(),
      nb::arg("scales").none(), nb::arg("zeros").none(), nb::arg("groups").none(), nb::arg("stream").none());

  m.def(
      "dequantize_weight",
      [](nb::handle out, nb::handle data, const Format& format, nb::handle permutation, nb::handle stream) {
        Args args("dequantize_weight", stream,
                  {{out, "out", Access::kWrite}, {data, "weight"}, {permutation, "permutation", Access::kRead, true}});
        check_layout("dequantize_weight", format, args[1]);
        args.run([&](Stream s) { dequantize_weight(args[0], {format, args[1], args.optional(2)}, s); });
      },
      nb::arg("out").none(), nb::arg("data").none(), nb::arg("format"), nb::arg("permutation").none(), nb::arg("stream").none());

  m.def(
      "quantize_weight",
      [](nb::handle codes, nb::handle scales, nb::handle zeros, nb::handle w, nb::handle bits, nb::handle group_size, nb::handle stream) {
        const char* const op = "quantize_weight";
        const int b = to_bits(op, bits);
        const std::int64_t group = to_int(op, "group_size", group_size);
        Args args(op, stream,
                  {{codes, "codes", Access::kWrite}, {scales, "scales", Access::kWrite}, {zeros, "zeros", Access::kWrite, true}, {w, "w"}});
        args.run([&](Stream s) { quantize_weight(args[0], args[1], args.optional(2), args[3], b, group, s); });
      },
      nb::arg("codes").none(), nb::arg("scales").none(), nb::arg("zeros").none(), nb::arg("w").none(), nb::arg("bits").none(),
      nb::arg("group_size").none(), nb::arg("stream").none());

  for (const char* const op : {"quantize_fp8", "quantize_int8"})
    m.def(
        op,
        [op](nb::handle out, nb::handle scales, nb::handle zero_points, nb::handle x, nb::handle granularity, nb::handle group_size,
             nb::handle computes, nb::handle scale_bound, nb::handle stream) {
          const ScaleGranularity scaling = to_granularity(op, granularity);
          const std::int64_t size = to_int(op, "group_size", group_size);
          const bool writes = to_bool(computes);
          const double bound = to_double(op, "scale_ub", scale_bound);
          const Access access = writes ? Access::kWrite : Access::kRead;
          Args args(op, stream,
                    {{out, "out", Access::kWrite}, {scales, "scales", access}, {x, "x"}, {zero_points, "zero_points", access, true}});
          args.run([&](Stream s) { quantize(args[0], args[1], args.optional(3), args[2], scaling, size, writes, bound, s); });
        },
        nb::arg("out").none(), nb::arg("scales").none(), nb::arg("zero_points").none(), nb::arg("x").none(), nb::arg("granularity").none(),
        nb::arg("group_size").none(), nb::arg("computes").none(), nb::arg("scale_bound").none(), nb::arg("stream").none());

  for (const char* const op : {"dequantize_fp8", "dequantize_int8"})
    m.def(
        op,
        [op](nb::handle out, nb::handle q, nb::handle scales, nb::handle zero_points, nb::handle granularity, nb::handle group_size,
             nb::handle stream) {
          const bool by_block = std::string(nb::str(granularity).c_str()) == "block";
          const ScaleGranularity scaling = by_block ? ScaleGranularity::kGroup : to_granularity(op, granularity);
          const std::int64_t size = to_int(op, "group_size", group_size);
          Args args(op, stream,
                    {{out, "out", Access::kWrite}, {q, "q"}, {scales, "scales"}, {zero_points, "zero_points", Access::kRead, true}});
          args.run([&](Stream s) {
            if (!by_block) return dequantize(args[0], args[1], args[2], args.optional(3), scaling, size, s);
            if (args.optional(3) != nullptr)
              throw std::invalid_argument(std::string("[") + op + "] zero_points: expected none with granularity \"block\", got a tensor");
            dequantize_blocks(args[0], args[1], args[2], kScaleBlock, kScaleBlock, s);
          });
        },
        nb::arg("out").none(), nb::arg("q").none(), nb::arg("scales").none(), nb::arg("zero_points").none(), nb::arg("granularity").none(),
        nb::arg("group_size").none(), nb::arg("stream").none());

  m.def(
      "quantized_matmul",
      [](nb::handle out, nb::handle x, nb::handle data, const Format& format, nb::handle permutation, nb::handle bias, nb::handle workspace,
         nb::handle batch_invariant, nb::handle stream) {
        const MatmulOptions options{to_bool(batch_invariant)};
        Args args("quantized_matmul", stream,
                  {{out, "out", Access::kWrite},
                   {x, "x"},
                   {data, "weight"},
                   {permutation, "permutation", Access::kRead, true},
                   {bias, "bias", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true}});
        check_layout("quantized_matmul", format, args[2]);
        const TensorView& input = args[1];
        const bool sized = input.device.type == DeviceType::kCUDA && (input.dtype == DType::kFloat16 || input.dtype == DType::kBFloat16);
        const std::int64_t num_bytes =
            sized ? quantized_matmul_workspace_size(rows_of(input), format, args.optional(3) != nullptr, input.dtype, options, input.device)
                  : 0;
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(5), num_bytes, input.device, s, lease);
          quantized_matmul(args[0], input, {format, args[2], args.optional(3)}, args.optional(4), space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("x").none(), nb::arg("data").none(), nb::arg("format"), nb::arg("permutation").none(),
      nb::arg("bias").none(), nb::arg("workspace").none(), nb::arg("batch_invariant").none(), nb::arg("stream").none());

  m.def(
      "quantize_and_multiply",
      [](nb::handle out, nb::handle x, nb::handle w, nb::handle w_scale, nb::handle granularity, nb::handle x_scale, nb::handle zero_point,
         nb::handle column_sums, nb::handle bias, nb::handle workspace, nb::handle batch_invariant, nb::handle stream) {
        const char* const op = "quantized_matmul";
        const MatmulOptions options{to_bool(batch_invariant)};
        const ScaleGranularity scaling = to_granularity(op, granularity);
        Args args(op, stream,
                  {{out, "out", Access::kWrite},
                   {x, "x"},
                   {w, "weight"},
                   {w_scale, "scale"},
                   {x_scale, "input_scale", Access::kRead, true},
                   {zero_point, "input_zero_point", Access::kRead, true},
                   {column_sums, "column_sums", Access::kRead, true},
                   {bias, "bias", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true}});
        const TensorView &input = args[1], &weight = args[2];
        const bool computes_sums = args.optional(5) != nullptr && args.optional(6) == nullptr;
        // 0 for what the op itself will refuse.
        const bool sized = weight.ndim == 2 && input.ndim >= 1 && input.ndim <= 4 && input.size(-1) == weight.size(1);
        const std::int64_t num_bytes =
            sized ? quantize_and_multiply_workspace_size(rows_of(input), weight.size(0), weight.size(1), weight.dtype, scaling,
                                                         computes_sums, options, input.device)
                  : 0;
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(8), num_bytes, input.device, s, lease);
          quantize_and_multiply(args[0], input, weight, {scaling, args[3], args.optional(4), args.optional(5), args.optional(6)},
                                args.optional(7), space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("x").none(), nb::arg("w").none(), nb::arg("w_scale").none(), nb::arg("granularity").none(),
      nb::arg("x_scale").none(), nb::arg("zero_point").none(), nb::arg("column_sums").none(), nb::arg("bias").none(),
      nb::arg("workspace").none(), nb::arg("batch_invariant").none(), nb::arg("stream").none());

  m.def(
      "quantize_and_multiply_workspace_size",
      [](nb::handle num_tokens, nb::handle n, nb::handle k, nb::handle dtype, nb::handle granularity, nb::handle computes_sums,
         nb::handle batch_invariant, nb::handle device) {
        const char* const op = "quantized_matmul_workspace_size";
        return quantize_and_multiply_workspace_size(to_int(op, "num_tokens", num_tokens), to_int(op, "n", n), to_int(op, "k", k),
                                                    to_dtype(op, "dtype", dtype), to_granularity(op, granularity), to_bool(computes_sums),
                                                    {to_bool(batch_invariant)}, to_device(op, device));
      },
      nb::arg("num_tokens").none(), nb::arg("n").none(), nb::arg("k").none(), nb::arg("dtype").none(), nb::arg("granularity").none(),
      nb::arg("computes_sums").none(), nb::arg("batch_invariant").none(), nb::arg("device").none());

  m.def(
      "quantized_matmul_workspace_size",
      [](nb::handle num_tokens, const Format& format, nb::handle has_permutation, nb::handle dtype, nb::handle batch_invariant,
         nb::handle device) {
        const char* const op = "quantized_matmul_workspace_size";
        return quantized_matmul_workspace_size(to_int(op, "num_tokens", num_tokens), format, to_bool(has_permutation),
                                               to_dtype(op, "dtype", dtype), {to_bool(batch_invariant)}, to_device(op, device));
      },
      nb::arg("num_tokens").none(), nb::arg("format"), nb::arg("has_permutation").none(), nb::arg("dtype").none(),
      nb::arg("batch_invariant").none(), nb::arg("device").none());

  m.def(
      "scaled_matmul",
      [](nb::handle out, nb::handle a, nb::handle b, nb::handle scale_a, nb::handle scale_b, nb::handle zero_point, nb::handle column_sums,
         nb::handle bias, nb::handle workspace, nb::handle batch_invariant, nb::handle stream) {
        const MatmulOptions options{to_bool(batch_invariant)};
        Args args("scaled_matmul", stream,
                  {{out, "out", Access::kWrite},
                   {a, "a"},
                   {b, "b"},
                   {scale_a, "scale_a"},
                   {scale_b, "scale_b"},
                   {zero_point, "zero_point", Access::kRead, true},
                   {column_sums, "column_sums", Access::kRead, true},
                   {bias, "bias", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true}});
        const TensorView &left = args[1], &right = args[2], &scale = args[4];
        const bool computes_sums = args.optional(5) != nullptr && args.optional(6) == nullptr;
        const bool sized = (left.dtype == DType::kFloat8E4M3FN || left.dtype == DType::kInt8) && right.ndim == 2 && left.ndim >= 1 &&
                           left.size(-1) >= 1 && left.size(-1) <= INT32_MAX && right.size(0) <= INT32_MAX;
        // As many bytes as any of the scales' layouts needs.
        const bool has_blocks = scale.ndim == 2 && scale.numel() > 1 && !(scale.size(0) == right.size(0) && scale.size(1) == 1);
        const std::int64_t num_bytes = sized ? scaled_matmul_workspace_size(rows_of(left), right.size(0), left.size(-1), left.dtype,
                                                                            has_blocks, computes_sums, options, left.device)
                                             : 0;
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(8), num_bytes, left.device, s, lease);
          scaled_matmul(args[0], left, right, {args[3], scale, args.optional(5), args.optional(6)}, args.optional(7), space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale_a").none(), nb::arg("scale_b").none(),
      nb::arg("zero_point").none(), nb::arg("column_sums").none(), nb::arg("bias").none(), nb::arg("workspace").none(),
      nb::arg("batch_invariant").none(), nb::arg("stream").none());

  m.def(
      "scaled_matmul_workspace_size",
      [](nb::handle m_, nb::handle n, nb::handle k, nb::handle dtype, nb::handle has_blocks, nb::handle computes_sums,
         nb::handle batch_invariant, nb::handle device) {
        const char* const op = "scaled_matmul_workspace_size";
        return scaled_matmul_workspace_size(to_int(op, "m", m_), to_int(op, "n", n), to_int(op, "k", k), to_dtype(op, "dtype", dtype),
                                            to_bool(has_blocks), to_bool(computes_sums), {to_bool(batch_invariant)}, to_device(op, device));
      },
      nb::arg("m").none(), nb::arg("n").none(), nb::arg("k").none(), nb::arg("dtype").none(), nb::arg("has_blocks").none(),
      nb::arg("computes_sums").none(), nb::arg("batch_invariant").none(), nb::arg("device").none());

  m.def(
      "column_sums",
      [](nb::handle sums, nb::handle b, nb::handle stream) {
        Args args("column_sums", stream, {{sums, "sums", Access::kWrite}, {b, "b"}});
        args.run([&](Stream s) { column_sums(args[0], args[1], s); });
      },
      nb::arg("sums").none(), nb::arg("b").none(), nb::arg("stream").none());
}

}  // namespace quire::bindings
