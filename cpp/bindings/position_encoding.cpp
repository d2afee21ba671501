// Binding of rotary_embedding.
// SPDX-License-Identifier: Apache-2.0
#include "quire/position_encoding.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"

namespace quire::bindings {

namespace {

RopeStyle to_style(const char* op, nb::handle style) {
  const std::string text = nb::str(style).c_str();
  if (text != "neox" && text != "gptj")
    throw std::invalid_argument(std::string("[") + op + "] style: expected \"neox\" or \"gptj\", got \"" + text + "\"");
  return text == "neox" ? RopeStyle::kNeox : RopeStyle::kGptj;
}

}  // namespace

void bind_position_encoding(nb::module_& m) {
  m.def(
      "rotary_embedding",
      [](nb::handle positions, nb::handle q, nb::handle k, nb::handle cos_sin_cache, nb::handle style, nb::handle stream) {
        const RopeStyle rope_style = to_style("rotary_embedding", style);
        Args args("rotary_embedding", stream,
                  {{positions, "positions"}, {q, "q", Access::kWrite}, {k, "k", Access::kWrite, true}, {cos_sin_cache, "cos_sin_cache"}});
        args.run([&](Stream s) { rotary_embedding(args[0], args[1], args.optional(2), args[3], rope_style, s); });
      },
      nb::arg("positions").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("cos_sin_cache").none(), nb::arg("style").none(),
      nb::arg("stream").none());

  m.def(
      "qk_norm_rope",
      [](nb::handle positions, nb::handle q, nb::handle k, nb::handle q_weight, nb::handle k_weight, nb::handle cos_sin_cache,
         nb::handle eps, nb::handle weight_offset, nb::handle style, nb::handle stream) {
        const char* const op = "qk_norm_rope";
        const double e = to_double(op, "eps", eps), offset = to_double(op, "weight_offset", weight_offset);
        const RopeStyle rope_style = to_style(op, style);
        Args args(op, stream,
                  {{positions, "positions"},
                   {q, "q", Access::kWrite},
                   {k, "k", Access::kWrite, true},
                   {q_weight, "q_weight"},
                   {k_weight, "k_weight", Access::kRead, true},
                   {cos_sin_cache, "cos_sin_cache"}});
        args.run([&](Stream s) {
          qk_norm_rope(args[0], args[1], args.optional(2), args[3], args.optional(4), args[5], e, offset, rope_style, s);
        });
      },
      nb::arg("positions").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("q_weight").none(), nb::arg("k_weight").none(),
      nb::arg("cos_sin_cache").none(), nb::arg("eps").none(), nb::arg("weight_offset").none(), nb::arg("style").none(),
      nb::arg("stream").none());

  m.def(
      "rope_and_write_kv",
      [](nb::handle positions, nb::handle q, nb::handle k, nb::handle v, nb::handle cos_sin_cache, nb::handle k_cache, nb::handle v_cache,
         nb::handle slot_mapping, nb::handle k_scale, nb::handle v_scale, nb::handle k_out, nb::handle q_weight, nb::handle k_weight,
         nb::handle eps, nb::handle weight_offset, nb::handle style, nb::handle stream) {
        const char* const op = "rope_and_write_kv";
        const double e = to_double(op, "eps", eps), offset = to_double(op, "weight_offset", weight_offset);
        const RopeStyle rope_style = to_style(op, style);
        Args args(op, stream,
                  {{positions, "positions"},
                   {q, "q", Access::kWrite},
                   {k, "k"},
                   {v, "v"},
                   {cos_sin_cache, "cos_sin_cache"},
                   {k_cache, "k_cache", Access::kWrite},
                   {v_cache, "v_cache", Access::kWrite},
                   {slot_mapping, "slot_mapping"},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true},
                   {k_out, "k_out", Access::kWrite, true},
                   {q_weight, "q_weight", Access::kRead, true},
                   {k_weight, "k_weight", Access::kRead, true}});
        args.run([&](Stream s) {
          rope_and_write_kv(args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7], args.optional(8), args.optional(9),
                            args.optional(10), args.optional(11), args.optional(12), e, offset, rope_style, s);
        });
      },
      nb::arg("positions").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("v").none(), nb::arg("cos_sin_cache").none(),
      nb::arg("k_cache").none(), nb::arg("v_cache").none(), nb::arg("slot_mapping").none(), nb::arg("k_scale").none(),
      nb::arg("v_scale").none(), nb::arg("k_out").none(), nb::arg("q_weight").none(), nb::arg("k_weight").none(), nb::arg("eps").none(),
      nb::arg("weight_offset").none(), nb::arg("style").none(), nb::arg("stream").none());
}

}  // namespace quire::bindings
