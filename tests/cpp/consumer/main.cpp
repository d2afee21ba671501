// The smallest program on quire's C++ API: a norm, a decode step over a paged cache, and an error.
// SPDX-License-Identifier: Apache-2.0
#include <quire/quire.h>

#include <cstdint>
#include <cstdio>
#include <vector>

using quire::DType;
using quire::TensorView;

// The memory is yours; a TensorView only describes it.
TensorView view(std::vector<float>& data, std::initializer_list<std::int64_t> shape) { return {data.data(), DType::kFloat32, shape}; }

int main() {
  const quire::Stream stream = quire::Stream::legacy_default();  // Ops on CPU tensors ignore it.
  std::printf("quire %s, CPU kernels: %s\n", quire::version(), quire::cpu_isa().c_str());

  std::vector<float> x = {3, 4}, weight = {1, 1}, out(2);
  quire::rms_norm(view(out, {1, 2}), view(x, {1, 2}), view(weight, {2}), /*eps=*/0.0, /*weight_offset=*/0.0, stream);
  std::printf("rms_norm: %.4f %.4f\n", out[0], out[1]);

  // A cache of 4 blocks of 2 slots, one kv_head of 8. The sequence's 3 tokens lie in blocks 3 and 1: slots 6, 7 and 2.
  std::vector<float> k_pool(4 * 2 * 8), v_pool(4 * 2 * 8), keys(3 * 8, 1.0f), values(3 * 8), q(2 * 8, 1.0f), attended(2 * 8);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i / 8);
  std::vector<std::int64_t> slots = {6, 7, 2};
  std::vector<std::int32_t> blocks = {3, 1}, lengths = {3};
  const TensorView k_cache = view(k_pool, {4, 2, 1, 8}), v_cache = view(v_pool, {4, 2, 1, 8});
  const TensorView slot_mapping(slots.data(), DType::kInt64, {3});
  const TensorView block_tables(blocks.data(), DType::kInt32, {1, 2}), seq_lens(lengths.data(), DType::kInt32, {1});
  quire::write_kv(k_cache, v_cache, view(keys, {3, 1, 8}), view(values, {3, 1, 8}), slot_mapping, nullptr, nullptr, stream);
  quire::paged_attention(view(attended, {1, 2, 8}), /*lse=*/nullptr, view(q, {1, 2, 8}), k_cache, v_cache, block_tables, seq_lens,
                         /*query_start_loc=*/nullptr, /*workspace=*/nullptr, quire::AttentionOptions{}, stream);
  std::printf("paged_attention: %.4f\n", attended[0]);  // All keys are equal, so it is the mean of the values 0, 1, 2.

  try {
    quire::rms_norm(view(out, {1, 2}), slot_mapping, view(weight, {2}), 0.0, 0.0, stream);
  } catch (const quire::TypeError& error) {
    std::printf("TypeError: %s\n", error.what());
  }
}
