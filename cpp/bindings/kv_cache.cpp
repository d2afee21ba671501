// Bindings of the KV-cache ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/kv_cache.h"

#include "bindings/bindings.h"
#include "bindings/tensor_args.h"

namespace quire::bindings {

void bind_kv_cache(nb::module_& m) {
  m.def(
      "write_kv",
      [](nb::handle k, nb::handle v, nb::handle k_cache, nb::handle v_cache, nb::handle slot_mapping, nb::handle k_scale,
         nb::handle v_scale, nb::handle stream) {
        Args args("write_kv", stream,
                  {{k_cache, "k_cache", Access::kWrite},
                   {v_cache, "v_cache", Access::kWrite},
                   {k, "k"},
                   {v, "v"},
                   {slot_mapping, "slot_mapping"},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true}});
        args.run([&](Stream s) { write_kv(args[0], args[1], args[2], args[3], args[4], args.optional(5), args.optional(6), s); });
      },
      nb::arg("k").none(), nb::arg("v").none(), nb::arg("k_cache").none(), nb::arg("v_cache").none(), nb::arg("slot_mapping").none(),
      nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("stream").none());

  m.def(
      "gather_kv",
      [](nb::handle k, nb::handle v, nb::handle k_cache, nb::handle v_cache, nb::handle slot_mapping, nb::handle k_scale,
         nb::handle v_scale, nb::handle stream) {
        Args args("gather_kv", stream,
                  {{k, "k", Access::kWrite},
                   {v, "v", Access::kWrite},
                   {k_cache, "k_cache"},
                   {v_cache, "v_cache"},
                   {slot_mapping, "slot_mapping"},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true}});
        args.run([&](Stream s) { gather_kv(args[0], args[1], args[2], args[3], args[4], args.optional(5), args.optional(6), s); });
      },
      nb::arg("k").none(), nb::arg("v").none(), nb::arg("k_cache").none(), nb::arg("v_cache").none(), nb::arg("slot_mapping").none(),
      nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("stream").none());

  m.def(
      "copy_blocks",
      [](nb::handle cache, nb::handle pairs, nb::handle stream) {
        Args args("copy_blocks", stream, {{cache, "cache", Access::kWrite}, {pairs, "pairs"}});
        args.run([&](Stream s) { copy_blocks(args[0], args[1], s); });
      },
      nb::arg("cache").none(), nb::arg("pairs").none(), nb::arg("stream").none());

  m.def(
      "swap_blocks",
      [](nb::handle dst, nb::handle src, nb::handle pairs, nb::handle stream) {
        Args args("swap_blocks", stream, {{dst, "dst", Access::kWrite}, {src, "src"}, {pairs, "pairs"}});
        args.run([&](Stream s) { swap_blocks(args[0], args[1], args[2], s); });
      },
      nb::arg("dst").none(), nb::arg("src").none(), nb::arg("pairs").none(), nb::arg("stream").none());
}

}  // namespace quire::bindings
