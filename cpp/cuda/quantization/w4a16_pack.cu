// Packed weights on CUDA: from a checkpoint's tensors to the layout of w4a16.cuh, and from there to floats.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/dispatch.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/quantization/w4a16.cuh"

namespace quire::cuda {

namespace w4a16 {
namespace {

constexpr int kThreads = 256;

/// Where word `index` of all codes is, and what it holds.
struct Word {
  std::int64_t unit, step;  // unit: of 16 rows
  int lane, word;           // word: as w4a16.cuh counts them, over both blocks of 8 bits

  __device__ Word(const Layout& layout, std::int64_t index) {
    const int unit_words = unit_bytes(layout.bits) / 4;
    const int within = static_cast<int>(index % unit_words);
    const std::int64_t units = index / unit_words;
    const std::int64_t block = units / kBlockUnits;
    unit = block / layout.num_steps * kBlockUnits + units % kBlockUnits;
    step = block % layout.num_steps;
    lane = within % 128 / 4;
    word = within / 128 * 4 + within % 4;
  }
  /// The number of a code of this word, its place in the word, its row and its column.
  struct Code {
    std::int64_t n, k;
    int shift;
  };
  __device__ Code code(const Layout& layout, int number) const {
    const int group = lane / 4, quad = lane % 4;
    const int half = number & 1;
    int i, substep, shift;
    if (layout.bits == 4) {
      i = number >> 1;
      substep = word;
      shift = 4 * i + 16 * half;
    } else {
      i = 2 * (word & 1) + (number >> 1);
      substep = word >> 1;
      shift = 8 * number;
    }
    return Code{unit * kUnitRows + group + 8 * (i & 1), step * kUnitColumns + 16 * substep + 2 * quad + half + 8 * (i >> 1), shift};
  }
};

/// One thread makes a word of codes.
__global__ void __launch_bounds__(kThreads)
    pack_codes_kernel(std::uint32_t* words, Layout layout, WeightSource source, std::int64_t num_rows, std::int64_t num_words) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_words) return;
  const Word word(layout, index);
  std::uint32_t value = 0;
  for (int number = 0; number < 32 / layout.bits; ++number) {
    const Word::Code code = word.code(layout, number);
    if (code.n < num_rows) value |= source.code(code.k, code.n) << code.shift;
  }
  words[index] = value;
}

/// One thread makes an entry: scales and zeros of two rows and a group.
template <typename Scale>
__global__ void __launch_bounds__(kThreads) pack_scales_kernel(std::uint8_t* entries, Layout layout, WeightSource source,
                                                               std::int64_t num_rows, std::int64_t num_groups, std::int64_t num_entries) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_entries) return;
  const std::int64_t row_group = index % 8, unit_in_block = index / 8 % kBlockUnits, rest = index / (8 * kBlockUnits);
  const std::int64_t group = rest % layout.num_groups;
  const std::int64_t n0 = (rest / layout.num_groups * kBlockUnits + unit_in_block) * kUnitRows + row_group;
  auto* scales = reinterpret_cast<Scale*>(entries + index * layout.entry_bytes);
  auto* zeros = reinterpret_cast<std::uint16_t*>(scales + 2);
  for (int i = 0; i < 2; ++i) {
    const std::int64_t n = n0 + 8 * i;
    const bool valid = n < num_rows && group < num_groups;
    scales[i] = valid ? static_cast<const Scale*>(source.scales)[source.scale_index(group, n)] : Scale{};
    if (layout.has_zeros) {
      zeros[i] = valid ? static_cast<std::uint16_t>(source.zero(group, n)) : std::uint16_t{};
      if (sizeof(Scale) == 4) zeros[2 + i] = 0;
    }
  }
}

/// One thread turns a word of codes into floats.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_weight_kernel(T* out, std::int64_t out_stride, Layout layout, PackedParams weight, std::int64_t num_words) {
  const std::int64_t index = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_words) return;
  const Word word(layout, index);
  const std::uint32_t value = reinterpret_cast<const std::uint32_t*>(layout.codes)[index];
  const int first_column = word.code(layout, 0).k % kUnitColumns;
  const std::int64_t group = layout.group_size == 0 ? 0 : (word.step * kUnitColumns + first_column) / layout.group_size;
  const std::uint8_t* entry = layout.scales + layout.entry_offset(word.unit, group) + word.lane / 4 * layout.entry_bytes;
  RowPair rows = layout.scale_dtype == DType::kFloat32 ? load_entry<Entry::kFloat, 4>(entry, layout)
                 : layout.has_zeros                    ? load_entry<Entry::kZeros, 4>(entry, layout)
                                                       : load_entry<Entry::kScales, 4>(entry, layout);
  if (!layout.has_zeros) rows.zero[0] = rows.zero[1] = layout.bits == 4 ? 8 : 128;
  for (int number = 0; number < 32 / layout.bits; ++number) {
    const Word::Code code = word.code(layout, number);
    if (code.n >= weight.format.out_features || code.k >= weight.format.num_rows) continue;
    std::int64_t k = code.k;
    if (weight.permutation != nullptr) k = weight.permutation[k];
    if (k < 0 || k >= weight.format.in_features) continue;
    const int upper = code.n % kUnitRows >= 8 ? 1 : 0;
    const auto q = static_cast<std::int32_t>(value >> code.shift & (layout.bits == 4 ? 15u : 255u));
    const float difference = static_cast<float>(q - static_cast<std::int32_t>(upper ? rows.zero[1] : rows.zero[0]));
    out[code.n * out_stride + k] = from_float<T>(difference * (upper ? rows.scale[1] : rows.scale[0]));
  }
}

dim3 blocks_of(std::int64_t count) { return dim3(static_cast<unsigned>(ceil_div(count, kThreads))); }

}  // namespace
}  // namespace w4a16

std::int64_t packed_weight_size(const WeightFormat& format) { return w4a16::Layout(nullptr, format).num_bytes; }

void pack_weight(void* data, const WeightFormat& format, const WeightSource& source, Stream stream) {
  const w4a16::Layout layout(data, format);
  auto* bytes = static_cast<std::uint8_t*>(data);
  const std::int64_t num_words = (layout.scales - layout.codes) / 4;
  w4a16::pack_codes_kernel<<<w4a16::blocks_of(num_words), w4a16::kThreads, 0, cuda_stream(stream)>>>(
      reinterpret_cast<std::uint32_t*>(bytes), layout, source, format.out_features, num_words);
  QUIRE_CHECK_LAUNCH("pack_codes_kernel", stream);
  std::uint8_t* entries = bytes + (layout.scales - layout.codes);
  const std::int64_t num_entries = (layout.num_bytes - (layout.scales - layout.codes)) / layout.entry_bytes;
  const auto pack = [&](auto kernel) {
    kernel<<<w4a16::blocks_of(num_entries), w4a16::kThreads, 0, cuda_stream(stream)>>>(entries, layout, source, format.out_features,
                                                                                       format.num_groups(), num_entries);
    QUIRE_CHECK_LAUNCH("pack_scales_kernel", stream);
  };
  format.scale_dtype == DType::kFloat32 ? pack(w4a16::pack_scales_kernel<std::uint32_t>) : pack(w4a16::pack_scales_kernel<std::uint16_t>);
}

void dequantize_weight(void* out, DType dtype, std::int64_t out_stride, const PackedParams& weight, Stream stream) {
  const w4a16::Layout layout(weight.data, weight.format);
  const std::int64_t num_words = (layout.scales - layout.codes) / 4;
  const WeightFormat& f = weight.format;
  if (weight.permutation != nullptr) {
    // A feature that no row is of is 0.
    const auto item = static_cast<std::size_t>(itemsize(dtype));
    const std::int64_t pitch = f.out_features == 1 ? f.in_features : out_stride;  // one row's stride may be anything
    QUIRE_CUDA_CHECK(cudaMemset2DAsync(out, static_cast<std::size_t>(pitch) * item, 0, static_cast<std::size_t>(f.in_features) * item,
                                       static_cast<std::size_t>(f.out_features), cuda_stream(stream)));
  }
  dispatch_float(dtype, "dequantize_weight", [&](auto constant) {
    using T = Element<decltype(constant)::value>;
    w4a16::dequantize_weight_kernel<T><<<w4a16::blocks_of(num_words), w4a16::kThreads, 0, cuda_stream(stream)>>>(
        static_cast<T*>(out), out_stride, layout, weight, num_words);
    QUIRE_CHECK_LAUNCH("dequantize_weight_kernel", stream);
  });
}

}  // namespace quire::cuda
