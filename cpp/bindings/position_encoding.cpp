// Binding of rotary_embedding.
// SPDX-License-Identifier: Apache-2.0
#include "quire/position_encoding.h"

#include <string>

#include "bindings/bindings.h"
#include "bindings/tensor_args.h"

namespace quire::bindings {

void bind_position_encoding(nb::module_& m) {
  m.def(
      "rotary_embedding",
      [](nb::handle positions, nb::handle q, nb::handle k, nb::handle cos_sin_cache, nb::handle style, nb::handle stream) {
        const std::string text = nb::str(style).c_str();
        if (text != "neox" && text != "gptj")
          throw std::invalid_argument("[rotary_embedding] style: expected \"neox\" or \"gptj\", got \"" + text + "\"");
        const RopeStyle rope_style = text == "neox" ? RopeStyle::kNeox : RopeStyle::kGptj;
        Args args("rotary_embedding", stream,
                  {{positions, "positions"}, {q, "q", Access::kWrite}, {k, "k", Access::kWrite, true}, {cos_sin_cache, "cos_sin_cache"}});
        args.run([&](Stream s) { rotary_embedding(args[0], args[1], args.optional(2), args[3], rope_style, s); });
      },
      nb::arg("positions").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("cos_sin_cache").none(), nb::arg("style").none(),
      nb::arg("stream").none());
}

}  // namespace quire::bindings
