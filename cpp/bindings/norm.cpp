// Bindings of the norm ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/norm.h"

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"

namespace quire::bindings {

void bind_norm(nb::module_& m) {
  m.def(
      "rms_norm",
      [](nb::handle out, nb::handle x, nb::handle weight, nb::handle eps, nb::handle weight_offset, nb::handle stream) {
        const double e = to_double("rms_norm", "eps", eps), offset = to_double("rms_norm", "weight_offset", weight_offset);
        Args args("rms_norm", stream, {{out, "out", Access::kWrite}, {x, "x"}, {weight, "weight"}});
        args.run([&](Stream s) { rms_norm(args[0], args[1], args[2], e, offset, s); });
      },
      nb::arg("out").none(), nb::arg("x").none(), nb::arg("weight").none(), nb::arg("eps").none(), nb::arg("weight_offset").none(),
      nb::arg("stream").none());

  m.def(
      "fused_add_rms_norm",
      [](nb::handle x, nb::handle residual, nb::handle weight, nb::handle eps, nb::handle weight_offset, nb::handle stream) {
        const double e = to_double("fused_add_rms_norm", "eps", eps),
                     offset = to_double("fused_add_rms_norm", "weight_offset", weight_offset);
        Args args("fused_add_rms_norm", stream, {{x, "x", Access::kWrite}, {residual, "residual", Access::kWrite}, {weight, "weight"}});
        args.run([&](Stream s) { fused_add_rms_norm(args[0], args[1], args[2], e, offset, s); });
      },
      nb::arg("x").none(), nb::arg("residual").none(), nb::arg("weight").none(), nb::arg("eps").none(), nb::arg("weight_offset").none(),
      nb::arg("stream").none());

  m.def(
      "layer_norm",
      [](nb::handle out, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps, nb::handle stream) {
        const double e = to_double("layer_norm", "eps", eps);
        Args args("layer_norm", stream, {{out, "out", Access::kWrite}, {x, "x"}, {weight, "weight"}, {bias, "bias", Access::kRead, true}});
        args.run([&](Stream s) { layer_norm(args[0], args[1], args[2], args.optional(3), e, s); });
      },
      nb::arg("out").none(), nb::arg("x").none(), nb::arg("weight").none(), nb::arg("bias").none(), nb::arg("eps").none(),
      nb::arg("stream").none());

  m.def(
      "rms_norm_quantized",
      [](nb::handle out, nb::handle scales, nb::handle x, nb::handle weight, nb::handle eps, nb::handle weight_offset,
         nb::handle granularity, nb::handle group_size, nb::handle stream) {
        const char* const op = "rms_norm";
        const double e = to_double(op, "eps", eps), offset = to_double(op, "weight_offset", weight_offset);
        const ScaleGranularity scaling = to_granularity(op, granularity);
        const std::int64_t size = to_int(op, "group_size", group_size);
        Args args(op, stream, {{out, "out", Access::kWrite}, {scales, "scales", scale_access(scaling)}, {x, "x"}, {weight, "weight"}});
        args.run([&](Stream s) { rms_norm_quantized(args[0], args[1], args[2], args[3], e, offset, scaling, size, s); });
      },
      nb::arg("out").none(), nb::arg("scales").none(), nb::arg("x").none(), nb::arg("weight").none(), nb::arg("eps").none(),
      nb::arg("weight_offset").none(), nb::arg("granularity").none(), nb::arg("group_size").none(), nb::arg("stream").none());

  m.def(
      "fused_add_rms_norm_quantized",
      [](nb::handle out, nb::handle scales, nb::handle x, nb::handle residual, nb::handle weight, nb::handle eps, nb::handle weight_offset,
         nb::handle granularity, nb::handle group_size, nb::handle stream) {
        const char* const op = "fused_add_rms_norm";
        const double e = to_double(op, "eps", eps), offset = to_double(op, "weight_offset", weight_offset);
        const ScaleGranularity scaling = to_granularity(op, granularity);
        const std::int64_t size = to_int(op, "group_size", group_size);
        Args args(op, stream,
                  {{out, "out", Access::kWrite},
                   {scales, "scales", scale_access(scaling)},
                   {residual, "residual", Access::kWrite},
                   {x, "x"},
                   {weight, "weight"}});
        args.run([&](Stream s) { fused_add_rms_norm_quantized(args[0], args[1], args[2], args[3], args[4], e, offset, scaling, size, s); });
      },
      nb::arg("out").none(), nb::arg("scales").none(), nb::arg("x").none(), nb::arg("residual").none(), nb::arg("weight").none(),
      nb::arg("eps").none(), nb::arg("weight_offset").none(), nb::arg("granularity").none(), nb::arg("group_size").none(),
      nb::arg("stream").none());

  m.def(
      "layer_norm_quantized",
      [](nb::handle out, nb::handle scales, nb::handle x, nb::handle weight, nb::handle bias, nb::handle eps, nb::handle granularity,
         nb::handle group_size, nb::handle stream) {
        const char* const op = "layer_norm";
        const double e = to_double(op, "eps", eps);
        const ScaleGranularity scaling = to_granularity(op, granularity);
        const std::int64_t size = to_int(op, "group_size", group_size);
        Args args(op, stream,
                  {{out, "out", Access::kWrite},
                   {scales, "scales", scale_access(scaling)},
                   {x, "x"},
                   {weight, "weight"},
                   {bias, "bias", Access::kRead, true}});
        args.run([&](Stream s) { layer_norm_quantized(args[0], args[1], args[2], args[3], args.optional(4), e, scaling, size, s); });
      },
      nb::arg("out").none(), nb::arg("scales").none(), nb::arg("x").none(), nb::arg("weight").none(), nb::arg("bias").none(),
      nb::arg("eps").none(), nb::arg("granularity").none(), nb::arg("group_size").none(), nb::arg("stream").none());
}

}  // namespace quire::bindings
