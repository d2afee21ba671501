// What quire.jax needs of the extension: the handlers as capsules, and the ops' validation for shapes alone.
// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/jax/call.h"
#include "bindings/scalar_args.h"
#include "core/explain.h"

namespace quire::bindings {
namespace {

std::vector<jax::Target> all_targets() {
  std::vector<jax::Target> all;
  for (const std::span<const jax::Target> family : {jax::norm_targets(), jax::activation_targets(), jax::position_encoding_targets(),
                                                    jax::kv_cache_targets(), jax::attention_targets(), jax::quantization_targets()})
    all.insert(all.end(), family.begin(), family.end());
  return all;
}

nb::capsule capsule_of(jax::Handler handler) { return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET"); }

// A tensor that is never touched: each has addresses of its own, so that overlap checks pass.
TensorView view_without_memory(const char* op, nb::handle array, std::uintptr_t& next) {
  const nb::tuple pair = nb::cast<nb::tuple>(array);
  TensorView view;
  view.dtype = to_dtype(op, "array", pair[0]);
  const auto shape = nb::cast<std::vector<std::int64_t>>(pair[1]);
  if (shape.size() > static_cast<std::size_t>(kMaxRank))
    throw std::invalid_argument(std::string("[") + op + "] array: expected a rank of at most 8, got " + std::to_string(shape.size()));
  view.ndim = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    view.shape[i] = shape[i];
    view.strides[i] = stride;
    stride *= shape[i];
  }
  view.data = reinterpret_cast<void*>(next);
  next += static_cast<std::uintptr_t>(stride * itemsize(view.dtype) + 511) / 256 * 256;
  return view;
}

void validate(const std::string& name, const nb::list& operands, const nb::list& results, const nb::dict& aliases,
              const nb::dict& attributes) {
  for (const jax::Target& target : all_targets()) {
    if (name != target.name) continue;
    jax::Call call(target.name);
    std::deque<std::string> texts;  // what attributes point to
    for (const auto& [key, value] : attributes) {
      jax::Attribute& attribute = call.add(texts.emplace_back(nb::cast<std::string>(key)));
      if (nb::isinstance<nb::str>(value)) {
        attribute.kind = jax::Attribute::Kind::kText;
        attribute.text = texts.emplace_back(nb::cast<std::string>(value));
      } else if (nb::isinstance<nb::float_>(value)) {
        attribute.kind = jax::Attribute::Kind::kNumber;
        attribute.number = nb::cast<double>(value);
      } else {
        attribute.integer = nb::cast<std::int64_t>(value);
      }
    }
    std::uintptr_t next = std::uintptr_t{1} << 40;
    std::vector<TensorView> views;
    for (const nb::handle operand : operands) call.add_operand() = views.emplace_back(view_without_memory(target.name, operand, next));
    for (std::size_t i = 0; i < nb::len(results); ++i) {
      TensorView view = view_without_memory(target.name, nb::object(results[i]), next);
      const nb::object source = aliases.attr("get")(i);
      if (!source.is_none()) view.data = views.at(nb::cast<std::size_t>(source)).data;
      call.add_result() = view;
    }
    validate_only([&] { target.op(call); });
    return;
  }
  throw std::invalid_argument("[jax_validate] name: expected a target of quire.jax, got " + name);
}

}  // namespace

void bind_jax(nb::module_& m) {
  m.def(
      "jax_targets",
      [] {
        nb::list targets;
        for (const jax::Target& target : all_targets())
          targets.append(nb::make_tuple(target.name, capsule_of(target.cpu), capsule_of(target.cuda)));
        return targets;
      },
      nb::sig("def jax_targets() -> list[tuple[str, object, object]]"),
      "XLA FFI handlers: (name, capsule for the CPU, capsule for CUDA) of every op that quire.jax has.");
  m.def("jax_validate", &validate,
        nb::sig("def jax_validate(name: str, operands: list[tuple[str, tuple[int, ...]]], results: list[tuple[str, tuple[int, ...]]], "
                "aliases: dict[int, int], attributes: dict[str, str | int | float]) -> None"),
        nb::arg("name"), nb::arg("operands"), nb::arg("results"), nb::arg("aliases"), nb::arg("attributes"),
        "Validates a call of a target for arrays of (dtype, shape) without memory; aliases: result to the operand whose memory it takes.");
}

}  // namespace quire::bindings
