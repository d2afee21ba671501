// Bindings of the attention ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/attention.h"

#include <limits>
#include <string>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"
#include "bindings/workspace.h"
#include "core/check.h"

namespace quire::bindings {
namespace {

// The scalar options; the tensor options are set once they are imported.
AttentionOptions parse_options(const char* op, nb::handle scale, nb::handle causal, nb::handle window, nb::handle softcap,
                               nb::handle variant, nb::handle batch_invariant, nb::handle validate) {
  AttentionOptions options;
  options.scale = to_optional_double(op, "scale", scale);
  options.causal = to_bool(causal);
  options.batch_invariant = to_bool(batch_invariant);
  if (nb::isinstance<nb::tuple>(window) || nb::isinstance<nb::list>(window)) {
    if (nb::len(window) != 2)
      throw std::invalid_argument(std::string("[") + op + "] window: expected an int or (left, right), got " + nb::str(window).c_str());
    options.window_left = to_int(op, "window", nb::object(window[0]));
    options.window_right = to_int(op, "window", nb::object(window[1]));
  } else if (!window.is_none()) {
    options.window_left = to_int(op, "window", window);
  }
  options.softcap = to_optional_double(op, "softcap", softcap).value_or(0.0);
  if (!variant.is_none()) {
    const std::string wanted = nb::str(variant).c_str();
    std::string names;
    for (const AttentionVariant known : kAttentionVariants) {
      if (wanted == name(known)) options.variant = known;
      names += std::string(names.empty() ? "\"" : ", \"") + name(known) + '"';
    }
    if (!options.variant)
      throw std::invalid_argument(std::string("[") + op + "] variant: expected None or one of " + names + ", got \"" + wanted + '"');
  }
  static PyObject* const shape = PyUnicode_InternFromString("shape");  // the default, which Python passes as this very object
  if (!validate.is_valid() || validate.ptr() == shape) return options;
  const std::string text = nb::str(validate).c_str();
  if (text != "shape" && text != "full")
    throw std::invalid_argument(std::string("[") + op + "] validate: expected \"shape\" or \"full\", got \"" + text + "\"");
  options.validate = text == "full" ? Validate::kFull : Validate::kShape;
  return options;
}

// Bytes for this call; 0 for shapes that the op itself will refuse.
template <typename Size>
std::int64_t workspace_bytes(Size size, const TensorView& q, std::int64_t num_seqs) {
  if (q.device.type == DeviceType::kCPU || q.ndim != 3 || q.numel() == 0 || num_seqs < 1 || q.size(2) < 8 || q.size(2) > 256) return 0;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;  // what the op takes; more it refuses by its own name
  if (num_seqs > kMost || q.size(0) > kMost / q.size(1)) return 0;
  return size(q.size(0), num_seqs, q.size(1), q.size(2), q.device);
}

// A view with two dimensions exchanged.
TensorView transposed(TensorView t, std::size_t a, std::size_t b) {
  std::swap(t.shape[a], t.shape[b]);
  std::swap(t.strides[a], t.strides[b]);
  return t;
}

// [num_seqs, num_heads, head_dim] of [num_seqs, num_heads, 1, head_dim] or, with `of_one` 1, [num_seqs, 1, num_heads, head_dim].
TensorView without_queries(TensorView t, std::size_t of_one) {
  for (std::size_t i = of_one; i < 3; ++i) t.shape[i] = t.shape[i + 1], t.strides[i] = t.strides[i + 1];
  t.ndim = 3;
  return t;
}

// The extent of a vector, if it is one that an op takes: no workspace is made for what will be refused.
std::int64_t length(const TensorView& t) { return t.ndim == 1 && (t.size(0) <= 1 || t.stride(0) == 1) ? t.size(0) : 0; }

std::int64_t size_argument(const char* op, const char* arg, nb::handle value) { return to_int(op, arg, value); }

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "paged_attention",
      [](nb::handle out, nb::handle lse, nb::handle q, nb::handle k_cache, nb::handle v_cache, nb::handle block_tables, nb::handle seq_lens,
         nb::handle query_start_loc, nb::handle workspace, nb::handle scale, nb::handle causal, nb::handle window, nb::handle softcap,
         nb::handle alibi_slopes, nb::handle sinks, nb::handle q_scale, nb::handle k_scale, nb::handle v_scale, nb::handle mask,
         nb::handle mask_start, nb::handle variant, nb::handle batch_invariant, nb::handle validate, nb::handle stream) {
        AttentionOptions options = parse_options("paged_attention", scale, causal, window, softcap, variant, batch_invariant, validate);
        Args args("paged_attention", stream,
                  {{out, "out", Access::kWrite},
                   {lse, "lse", Access::kWrite, true},
                   {q, "q"},
                   {k_cache, "k_cache"},
                   {v_cache, "v_cache"},
                   {block_tables, "block_tables"},
                   {seq_lens, "seq_lens"},
                   {query_start_loc, "query_start_loc", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true},
                   {alibi_slopes, "alibi_slopes", Access::kRead, true},
                   {sinks, "sinks", Access::kRead, true},
                   {q_scale, "q_scale", Access::kRead, true},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true},
                   {mask, "mask", Access::kRead, true},
                   {mask_start, "mask_start", Access::kRead, true}});
        options.alibi_slopes = args.optional(9);
        options.sinks = args.optional(10);
        options.q_scale = args.optional(11);
        options.k_scale = args.optional(12);
        options.v_scale = args.optional(13);
        options.mask = args.optional(14);
        options.mask_start = args.optional(15);
        const std::int64_t num_bytes = workspace_bytes(&paged_attention_workspace_size, args[2], length(args[6]));
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(8), num_bytes, args[2].device, s, lease);
          paged_attention(args[0], args.optional(1), args[2], args[3], args[4], args[5], args[6], args.optional(7), space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("lse").none(), nb::arg("q").none(), nb::arg("k_cache").none(), nb::arg("v_cache").none(),
      nb::arg("block_tables").none(), nb::arg("seq_lens").none(), nb::arg("query_start_loc").none(), nb::arg("workspace").none(),
      nb::arg("scale").none(), nb::arg("causal").none(), nb::arg("window").none(), nb::arg("softcap").none(),
      nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("q_scale").none(), nb::arg("k_scale").none(),
      nb::arg("v_scale").none(), nb::arg("mask").none(), nb::arg("mask_start").none(), nb::arg("variant").none(),
      nb::arg("batch_invariant").none(), nb::arg("validate").none(), nb::arg("stream").none());

  m.def(
      "decode_by_heads",
      [](nb::handle out, nb::handle q, nb::handle k, nb::handle v, nb::handle block_tables, nb::handle seq_lens, nb::handle scale,
         nb::handle causal, nb::handle window, nb::handle softcap, nb::handle sinks, nb::handle mask, nb::handle mask_start) {
        const char* const op = "paged_attention";
        AttentionOptions options = parse_options(op, scale, causal, window, softcap, nb::none(), nb::bool_(false), nb::handle());
        Args args(op, nb::none(),
                  {{out, "out", Access::kWrite},
                   {q, "q"},
                   {k, "k_cache"},
                   {v, "v_cache"},
                   {block_tables, "block_tables"},
                   {seq_lens, "seq_lens"},
                   {sinks, "sinks", Access::kRead, true},
                   {mask, "mask", Access::kRead, true},
                   {mask_start, "mask_start", Access::kRead, true}});
        const Check check(op);
        check.shape(args[0], "out", {kAny, 1, kAny, kAny});
        check.shape(args[1], "q", {kAny, kAny, 1, kAny});
        check.rank(args[2], "k_cache", 4, 4);
        check.rank(args[3], "v_cache", 4, 4);
        const TensorView result = without_queries(args[0], 1), query = without_queries(args[1], 2);
        const TensorView keys = transposed(args[2], 1, 2), values = transposed(args[3], 1, 2);
        options.sinks = args.optional(6);
        options.mask = args.optional(7);
        options.mask_start = args.optional(8);
        const std::int64_t num_bytes = workspace_bytes(&paged_attention_workspace_size, query, length(args[5]));
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, nullptr, num_bytes, query.device, s, lease);
          paged_attention(result, nullptr, query, keys, values, args[4], args[5], nullptr, space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("v").none(), nb::arg("block_tables").none(),
      nb::arg("seq_lens").none(), nb::arg("scale").none(), nb::arg("causal").none(), nb::arg("window").none(), nb::arg("softcap").none(),
      nb::arg("sinks").none(), nb::arg("mask").none(), nb::arg("mask_start").none(),
      "paged_attention of one query of each sequence, as models have them: q [num_seqs, num_heads, 1, head_dim], k and v [num_seqs, "
      "num_kv_heads, num_keys, head_dim], a block to each sequence, out [num_seqs, 1, num_heads, head_dim]. On the current stream.");

  m.def(
      "shared_prefix_attention",
      [](nb::handle out, nb::handle lse, nb::handle q, nb::handle k_cache, nb::handle v_cache, nb::handle prefix_blocks,
         nb::handle block_tables, nb::handle seq_lens, nb::handle query_start_loc, nb::handle workspace, nb::handle scale,
         nb::handle causal, nb::handle window, nb::handle softcap, nb::handle alibi_slopes, nb::handle sinks, nb::handle q_scale,
         nb::handle k_scale, nb::handle v_scale, nb::handle mask, nb::handle mask_start, nb::handle validate, nb::handle stream) {
        AttentionOptions options =
            parse_options("shared_prefix_attention", scale, causal, window, softcap, nb::none(), nb::bool_(false), validate);
        Args args("shared_prefix_attention", stream,
                  {{out, "out", Access::kWrite},
                   {lse, "lse", Access::kWrite, true},
                   {q, "q"},
                   {k_cache, "k_cache"},
                   {v_cache, "v_cache"},
                   {prefix_blocks, "prefix_blocks"},
                   {block_tables, "block_tables"},
                   {seq_lens, "seq_lens"},
                   {query_start_loc, "query_start_loc", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true},
                   {alibi_slopes, "alibi_slopes", Access::kRead, true},
                   {sinks, "sinks", Access::kRead, true},
                   {q_scale, "q_scale", Access::kRead, true},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true},
                   {mask, "mask", Access::kRead, true},
                   {mask_start, "mask_start", Access::kRead, true}});
        options.alibi_slopes = args.optional(10);
        options.sinks = args.optional(11);
        options.q_scale = args.optional(12);
        options.k_scale = args.optional(13);
        options.v_scale = args.optional(14);
        options.mask = args.optional(15);
        options.mask_start = args.optional(16);
        const std::int64_t num_bytes = workspace_bytes(&shared_prefix_attention_workspace_size, args[2], length(args[7]));
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(9), num_bytes, args[2].device, s, lease);
          shared_prefix_attention(args[0], args.optional(1), args[2], args[3], args[4], args[5], args[6], args[7], args.optional(8), space,
                                  options, s);
        });
      },
      nb::arg("out").none(), nb::arg("lse").none(), nb::arg("q").none(), nb::arg("k_cache").none(), nb::arg("v_cache").none(),
      nb::arg("prefix_blocks").none(), nb::arg("block_tables").none(), nb::arg("seq_lens").none(), nb::arg("query_start_loc").none(),
      nb::arg("workspace").none(), nb::arg("scale").none(), nb::arg("causal").none(), nb::arg("window").none(), nb::arg("softcap").none(),
      nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("q_scale").none(), nb::arg("k_scale").none(),
      nb::arg("v_scale").none(), nb::arg("mask").none(), nb::arg("mask_start").none(), nb::arg("validate").none(),
      nb::arg("stream").none());

  m.def(
      "attention",
      [](nb::handle out, nb::handle lse, nb::handle q, nb::handle k, nb::handle v, nb::handle query_start_loc, nb::handle kv_start_loc,
         nb::handle workspace, nb::handle scale, nb::handle causal, nb::handle window, nb::handle softcap, nb::handle alibi_slopes,
         nb::handle sinks, nb::handle q_scale, nb::handle k_scale, nb::handle v_scale, nb::handle mask, nb::handle mask_start,
         nb::handle variant, nb::handle batch_invariant, nb::handle validate, nb::handle stream) {
        AttentionOptions options = parse_options("attention", scale, causal, window, softcap, variant, batch_invariant, validate);
        Args args("attention", stream,
                  {{out, "out", Access::kWrite},
                   {lse, "lse", Access::kWrite, true},
                   {q, "q"},
                   {k, "k"},
                   {v, "v"},
                   {query_start_loc, "query_start_loc", Access::kRead, true},
                   {kv_start_loc, "kv_start_loc", Access::kRead, true},
                   {workspace, "workspace", Access::kWrite, true},
                   {alibi_slopes, "alibi_slopes", Access::kRead, true},
                   {sinks, "sinks", Access::kRead, true},
                   {q_scale, "q_scale", Access::kRead, true},
                   {k_scale, "k_scale", Access::kRead, true},
                   {v_scale, "v_scale", Access::kRead, true},
                   {mask, "mask", Access::kRead, true},
                   {mask_start, "mask_start", Access::kRead, true}});
        options.alibi_slopes = args.optional(8);
        options.sinks = args.optional(9);
        options.q_scale = args.optional(10);
        options.k_scale = args.optional(11);
        options.v_scale = args.optional(12);
        options.mask = args.optional(13);
        options.mask_start = args.optional(14);
        const TensorView* const loc = args.optional(5);
        const std::int64_t num_bytes = workspace_bytes(&attention_workspace_size, args[2], loc == nullptr ? 1 : length(*loc) - 1);
        args.run([&](Stream s) {
          WorkspaceLease lease;
          const TensorView* const space = choose_workspace(args, args.optional(7), num_bytes, args[2].device, s, lease);
          attention(args[0], args.optional(1), args[2], args[3], args[4], args.optional(5), args.optional(6), space, options, s);
        });
      },
      nb::arg("out").none(), nb::arg("lse").none(), nb::arg("q").none(), nb::arg("k").none(), nb::arg("v").none(),
      nb::arg("query_start_loc").none(), nb::arg("kv_start_loc").none(), nb::arg("workspace").none(), nb::arg("scale").none(),
      nb::arg("causal").none(), nb::arg("window").none(), nb::arg("softcap").none(), nb::arg("alibi_slopes").none(),
      nb::arg("sinks").none(), nb::arg("q_scale").none(), nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("mask").none(),
      nb::arg("mask_start").none(), nb::arg("variant").none(), nb::arg("batch_invariant").none(), nb::arg("validate").none(),
      nb::arg("stream").none());

  m.def(
      "merge_attention",
      [](nb::handle out, nb::handle out_lse, nb::handle out_a, nb::handle lse_a, nb::handle out_b, nb::handle lse_b, nb::handle stream) {
        Args args("merge_attention", stream,
                  {{out, "out", Access::kWrite},
                   {out_lse, "out_lse", Access::kWrite, true},
                   {out_a, "out_a"},
                   {lse_a, "lse_a"},
                   {out_b, "out_b"},
                   {lse_b, "lse_b"}});
        args.run([&](Stream s) { merge_attention(args[0], args.optional(1), args[2], args[3], args[4], args[5], s); });
      },
      nb::arg("out").none(), nb::arg("out_lse").none(), nb::arg("out_a").none(), nb::arg("lse_a").none(), nb::arg("out_b").none(),
      nb::arg("lse_b").none(), nb::arg("stream").none());

  const auto bind_size = [&](const char* op, auto function) {
    m.def(
        op,
        [op, function](nb::handle num_tokens, nb::handle num_seqs, nb::handle num_heads, nb::handle head_dim, nb::handle device) {
          return function(size_argument(op, "num_tokens", num_tokens), size_argument(op, "num_seqs", num_seqs),
                          size_argument(op, "num_heads", num_heads), size_argument(op, "head_dim", head_dim), to_device(op, device));
        },
        nb::arg("num_tokens").none(), nb::arg("num_seqs").none(), nb::arg("num_heads").none(), nb::arg("head_dim").none(),
        nb::arg("device").none());
  };
  bind_size("paged_attention_workspace_size", &paged_attention_workspace_size);
  bind_size("attention_workspace_size", &attention_workspace_size);
  bind_size("shared_prefix_attention_workspace_size", &shared_prefix_attention_workspace_size);
}

}  // namespace quire::bindings
