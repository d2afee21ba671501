/* Calls the C interface of an installed quire and prints what comes back.
 * SPDX-License-Identifier: Apache-2.0 */
#include <quire/c_api.h>
#include <stdio.h>

static QuireTensor floats(float* data, int32_t ndim, int64_t* shape) {
  QuireTensor tensor = {data, {1, 0}, ndim, {2, 32, 1}, shape, NULL, 0};
  return tensor;
}

static QuireTensor ints(int32_t* data, int32_t ndim, int64_t* shape) {
  QuireTensor tensor = {data, {1, 0}, ndim, {0, 32, 1}, shape, NULL, 0};
  return tensor;
}

int main(void) {
  if (quire_abi_version() != QUIRE_ABI_VERSION) return 1;
  printf("quire %s, ABI %d\n", quire_version(), quire_abi_version());

  float x_data[2] = {3.0f, 4.0f}, weight_data[2] = {1.0f, 1.0f}, out_data[2];
  int64_t row[2] = {1, 2}, hidden[1] = {2};
  QuireTensor x = floats(x_data, 2, row), weight = floats(weight_data, 1, hidden), out = floats(out_data, 2, row);
  if (quire_rms_norm(&out, &x, &weight, 0.0, 0.0, NULL) != QUIRE_OK) return 2;
  printf("rms_norm: %.4f %.4f\n", (double)out_data[0], (double)out_data[1]);

  float q_data[8] = {1, 1, 1, 1, 1, 1, 1, 1}, cache_data[32], attention_data[8], lse_data[1];
  for (int i = 0; i < 32; ++i) cache_data[i] = (float)(i / 8);
  int32_t table_data[1] = {0}, len_data[1] = {3};
  int64_t q_shape[3] = {1, 1, 8}, cache_shape[4] = {1, 4, 1, 8}, one_one[2] = {1, 1}, one[1] = {1};
  QuireTensor q = floats(q_data, 3, q_shape), cache = floats(cache_data, 4, cache_shape), result = floats(attention_data, 3, q_shape);
  QuireTensor lse = floats(lse_data, 2, one_one), table = ints(table_data, 2, one_one), len = ints(len_data, 1, one);
  QuireAttentionOptions options = QUIRE_ATTENTION_OPTIONS_INIT;
  options.window_left = 0;
  int64_t num_bytes = -1;
  if (quire_paged_attention_workspace_size(1, 1, 1, 8, 1, 0, &num_bytes) != QUIRE_OK || num_bytes != 0) return 3;
  if (quire_paged_attention(&result, &lse, &q, &cache, &cache, &table, &len, NULL, NULL, &options, NULL) != QUIRE_OK) return 4;
  printf("paged_attention: %.4f\n", (double)attention_data[0]);

  const int status = quire_rms_norm(&out, &len, &weight, 0.0, 0.0, NULL);
  printf("%d: %s\n", status, quire_last_error());
  return 0;
}
