// The CPU backend's thread pool: fork-join over index ranges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

namespace quire::cpu {

/// A non-owning reference to a callable; it lives only as long as the call that it is passed to.
template <typename Signature>
class FunctionRef;

template <typename Result, typename... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
  FunctionRef(F&& f)  // implicit on purpose: call sites pass lambdas
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) -> Result { return (*static_cast<std::remove_reference_t<F>*>(object))(args...); }) {}

  Result operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  Result (*call_)(void*, Args...);
};

/// While it lives, this thread computes as IEEE 754 has it by default. A caller may have set its thread to take subnormals for zero, as
/// XLA does, which 8-bit floats below 2^-6 pass through on their way to float32.
class DefaultFloatMode {
 public:
  DefaultFloatMode();
  ~DefaultFloatMode();
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  std::uint64_t callers_;
};

/// Calls body(begin, end) so that [0, count) is covered once, on as many threads as give each at least `grain` items; returns when
/// all is done, in DefaultFloatMode. With one thread's worth of work it is a plain call. A nested call runs serially. body must not throw.
void parallel_for(std::int64_t count, std::int64_t grain, FunctionRef<void(std::int64_t begin, std::int64_t end)> body);

/// Threads in use, the caller included; by default the size of the affinity mask.
int num_threads();
void set_num_threads(int num_threads);

}  // namespace quire::cpu
