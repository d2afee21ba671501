// Validation that ops with a quantized result share.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"

#include <algorithm>
#include <string>

#include "core/check.h"

namespace quire {

QuantParams check_quantized(const Check& check, const TensorView& out, const TensorView& scales, const TensorView& like,
                            const char* like_arg, ScaleGranularity granularity, std::int64_t group_size) {
  check.dtype(out, "out", {DType::kFloat8E4M3FN, DType::kInt8});
  if (out.ndim != like.ndim || !std::equal(out.shape.begin(), out.shape.begin() + out.ndim, like.shape.begin()))
    check.fail_value("out", std::string("the shape of ") + like_arg + ", " + describe(like), describe(out));
  check.device(out, "out", like.device, "x");
  check.inner_contiguous(out, "out");
  check.writable(out, "out");

  QuantParams params;
  params.granularity = granularity;
  params.dtype = out.dtype;
  check.dtype(scales, "scales", {DType::kFloat32});
  check.device(scales, "scales", like.device, "x");
  check.disjoint(out, "out", scales, "scales", false);
  const std::int64_t width = like.size(-1);
  if (granularity == ScaleGranularity::kTensor) {
    check.shape(scales, "scales", {1});
    check.accessible(scales, "scales");
    params.group_size = width;
  } else {
    params.group_size = granularity == ScaleGranularity::kToken ? width : group_size;
    if (granularity == ScaleGranularity::kGroup && (group_size < 1 || width % group_size != 0))
      check.fail_value("group_size", "a divisor of the last dimension " + std::to_string(width), std::to_string(group_size));
    TensorView expected = like;
    expected.dtype = DType::kFloat32;
    expected.shape[static_cast<std::size_t>(like.ndim - 1)] = width == 0 ? 0 : width / params.group_size;
    if (granularity == ScaleGranularity::kToken) expected.shape[static_cast<std::size_t>(like.ndim - 1)] = 1;
    if (scales.ndim != like.ndim || !std::equal(scales.shape.begin(), scales.shape.begin() + scales.ndim, expected.shape.begin()))
      check.fail_value("scales", describe(expected), describe(scales));
    check.writable(scales, "scales");
    params.scale_rows = row_layout(scales);
    params.group_stride = scales.stride(-1);
  }
  params.scales = scales.as<float>();
  return params;
}

}  // namespace quire
