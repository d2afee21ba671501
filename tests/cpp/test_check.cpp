// Validation helpers: layouts, overlap, messages.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <vector>

#include "core/check.h"
#include "quire/quire.h"

namespace quire {
namespace {

TensorView view(float* data, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides) {
  TensorView t;
  t.data = data;
  t.ndim = static_cast<int>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    t.shape[i] = shape[i];
    t.strides[i] = strides[i];
  }
  return t;
}

template <typename Error, typename F>
void expect_message(F&& f, const char* text) {
  try {
    f();
    FAIL() << "no exception; expected: " << text;
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), text);
  }
}

float memory[4096];

TEST(Check, MessagesNameOpArgumentExpectedAndGot) {
  const Check check("op");
  const TensorView t = view(memory, {4, 12}, {12, 1});
  expect_message<TypeError>([&] { check.dtype(t, "x", {DType::kInt32}); }, "[op] x: expected int32, got float32 [4, 12]");
  expect_message<TypeError>([&] { check.dtype(t, "x", {DType::kInt32, DType::kInt64}); },
                            "[op] x: expected int32 or int64, got float32 [4, 12]");
  expect_message<std::invalid_argument>([&] { check.shape(t, "x", {4, kAny, 3}); },
                                        "[op] x: expected float32 [4, *, 3], got float32 [4, 12]");
  expect_message<TypeError>([&] { check.tensor(t, "x", DType::kInt32, {4, kAny}); }, "[op] x: expected int32 [4, *], got float32 [4, 12]");
  expect_message<std::invalid_argument>([&] { check.tensor(t, "x", DType::kFloat32, {kAny}); },
                                        "[op] x: expected float32 [*], got float32 [4, 12]");
  expect_message<std::invalid_argument>([&] { check.device(t, "x", Device{DeviceType::kCUDA, 1}, "q"); },
                                        "[op] x: expected cuda:1 like q, got cpu");
  expect_message<std::invalid_argument>([&] { check.contiguous(view(memory, {4, 2}, {-3, 1}), "x"); },
                                        "[op] x: expected a contiguous tensor, got strides [-3, 1] for shape [4, 2]");
}

TEST(Check, Workspace) {
  const Check check("op");
  alignas(16) static std::uint8_t bytes[64];
  const TensorView x = view(memory, {4, 12}, {12, 1}), space(bytes, DType::kUInt8, {48});
  const auto checked = [&](const TensorView* t, std::int64_t num_bytes) {
    return check.workspace(t, num_bytes, Device{}, "x", {{&x, "x"}, {nullptr, "bias"}});
  };
  EXPECT_EQ(checked(nullptr, 0), nullptr);
  EXPECT_EQ(checked(&space, 0), nullptr);
  EXPECT_EQ(checked(&space, 48), bytes);
  expect_message<std::invalid_argument>([&] { checked(nullptr, 48); }, "[op] workspace: expected uint8 [48] or longer, got none");
  expect_message<std::invalid_argument>([&] { checked(&space, 49); }, "[op] workspace: expected uint8 [49] or longer, got uint8 [48]");
  expect_message<TypeError>([&] { checked(&x, 48); }, "[op] workspace: expected uint8, got float32 [4, 12]");
  const TensorView odd(bytes + 1, DType::kUInt8, {48}), shared(memory, DType::kUInt8, {48});
  EXPECT_THROW(checked(&odd, 16), std::invalid_argument);
  EXPECT_THROW(checked(&shared, 16), std::invalid_argument);
}

TEST(Check, OutputsMustNotOverlapThemselves) {
  const Check check("op");
  EXPECT_NO_THROW(check.writable(view(memory, {4, 3}, {5, 1}), "out"));
  EXPECT_NO_THROW(check.writable(view(memory, {3, 4}, {1, 5}), "out"));
  EXPECT_NO_THROW(check.writable(view(memory, {1, 3}, {0, 1}), "out"));
  EXPECT_NO_THROW(check.writable(view(memory, {0, 3}, {0, 0}), "out"));
  EXPECT_THROW(check.writable(view(memory, {4, 3}, {0, 1}), "out"), std::invalid_argument);
  EXPECT_THROW(check.writable(view(memory, {4, 3}, {2, 1}), "out"), std::invalid_argument);
  EXPECT_THROW(check.writable(view(memory + 64, {4, 3}, {-3, 1}), "out"), std::invalid_argument);
  TensorView read_only = view(memory, {4, 3}, {3, 1});
  read_only.read_only = true;
  EXPECT_THROW(check.writable(read_only, "out"), std::invalid_argument);
  EXPECT_THROW(check.writable(view(nullptr, {4, 3}, {3, 1}), "out"), std::invalid_argument);
}

TEST(Check, OverlapKnowsInterleavedViews) {
  // Halves of the columns of one matrix; K and V of an interleaved pool; neighbouring heads.
  EXPECT_FALSE(may_overlap(view(memory, {4, 8}, {16, 1}), view(memory + 8, {4, 8}, {16, 1})));
  EXPECT_TRUE(may_overlap(view(memory, {4, 8}, {16, 1}), view(memory + 7, {4, 8}, {16, 1})));
  EXPECT_FALSE(may_overlap(view(memory, {3, 2, 4}, {16, 4, 1}), view(memory + 8, {3, 2, 4}, {16, 4, 1})));
  EXPECT_FALSE(may_overlap(view(memory, {3, 2, 4}, {16, 8, 1}), view(memory + 4, {3, 2, 4}, {16, 8, 1})));
  EXPECT_TRUE(may_overlap(view(memory, {3, 2, 4}, {16, 8, 1}), view(memory + 2, {3, 2, 4}, {16, 8, 1})));
  EXPECT_FALSE(may_overlap(view(memory, {4}, {1}), view(memory + 4, {4}, {1})));
  EXPECT_TRUE(may_overlap(view(memory, {4}, {1}), view(memory + 3, {4}, {1})));
  EXPECT_FALSE(may_overlap(view(memory, {0}, {1}), view(memory, {4}, {1})));
  // An outer stride that is no multiple of an inner one: the views meet although their periods would fit.
  EXPECT_TRUE(may_overlap(view(memory + 2, {2, 3, 2}, {40, 16, 4}), view(memory, {2, 3, 2}, {40, 16, 4})));
  EXPECT_TRUE(may_overlap(view(memory, {2, 3, 2}, {40, 16, 4}), view(memory + 2, {2, 3, 2}, {40, 16, 4})));
  // Heads-first views of K beside V in one row.
  EXPECT_FALSE(may_overlap(view(memory, {2, 3, 4, 5}, {120, 10, 30, 1}), view(memory + 5, {2, 3, 4, 5}, {120, 10, 30, 1})));
  // A view shifted by whole rows overlaps, although its columns would fit.
  EXPECT_TRUE(may_overlap(view(memory, {4, 8}, {8, 1}), view(memory + 8, {4, 8}, {8, 1})));
}

TEST(RowLayout, WalksEveryOuterDimension) {
  const TensorView t = view(memory, {2, 3, 4, 5}, {1000, 50, 10, 1});
  const RowLayout rows = row_layout(t);
  std::int64_t row = 0;
  for (std::int64_t i = 0; i < 2; ++i)
    for (std::int64_t j = 0; j < 3; ++j)
      for (std::int64_t k = 0; k < 4; ++k) EXPECT_EQ(rows.offset(row++), i * 1000 + j * 50 + k * 10);
  const RowLayout folded = row_layout(view(memory, {2, 3, 4, 5}, {120, 40, 10, 1}));
  EXPECT_EQ(folded.inner_extents[0] * folded.inner_extents[1], 1);
  EXPECT_EQ(folded.offset(7), 70);
  const RowLayout two = row_layout(view(memory, {2, 3, 4, 5}, {500, 40, 10, 1}));
  EXPECT_EQ(two.offset(13), 500 + 10);
  EXPECT_EQ(row_layout(view(memory, {5}, {1})).offset(0), 0);
}

TEST(CheckedMul, RefusesOverflow) {
  EXPECT_EQ(checked_mul(1 << 20, 1 << 20, "op", "x"), std::int64_t{1} << 40);
  EXPECT_THROW(checked_mul(std::int64_t{1} << 40, std::int64_t{1} << 40, "op", "x"), std::invalid_argument);
}

TEST(Stream, CannotBeMadeOfZeroByAccident) {
  static_assert(!std::is_constructible_v<Stream, int>);
  static_assert(!std::is_constructible_v<Stream, std::nullptr_t>);
  static_assert(!std::is_convertible_v<void*, Stream>);
  EXPECT_EQ(Stream::legacy_default().handle(), nullptr);
}

TEST(Buffer, IsAlignedAndRefusesImpossibleSizes) {
  const auto buffer = Buffer::allocate(100, Device{});
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % 64, 0u);
  EXPECT_THROW(Buffer::allocate(-1, Device{}), std::invalid_argument);
  EXPECT_THROW(Buffer::allocate(std::int64_t{1} << 60, Device{}), OutOfMemoryError);
}

TEST(Ops, ValidateForCppCallersToo) {
  TensorView x(memory, DType::kFloat32, {2, 8}), weight(memory + 64, DType::kFloat32, {8}), out(memory + 128, DType::kFloat32, {2, 8});
  EXPECT_NO_THROW(rms_norm(out, x, weight, 1e-6, 0.0, Stream::legacy_default()));
  weight.shape[0] = 7;
  expect_message<std::invalid_argument>([&] { rms_norm(out, x, weight, 1e-6, 0.0, Stream::legacy_default()); },
                                        "[rms_norm] weight: expected float32 [8], got float32 [7]");
}

TEST(Ops, CpuOnlyBuildRefusesCudaTensors) {
  if (has_cuda()) GTEST_SKIP() << "this build has CUDA";
  const Device cuda{DeviceType::kCUDA, 0};
  TensorView x(memory, DType::kFloat32, {2, 8}, cuda), weight(memory, DType::kFloat32, {8}, cuda),
      out(memory + 128, DType::kFloat32, {2, 8}, cuda);
  EXPECT_THROW(rms_norm(out, x, weight, 1e-6, 0.0, Stream::legacy_default()), UnsupportedError);
}

}  // namespace
}  // namespace quire
