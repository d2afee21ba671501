// How backends answer quire::explain.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "quire/explain.h"

namespace quire {

/// What this thread's quire::explain collects; null where ops are to run.
Explanation* explaining();

/// Calls `call` on this thread with ops doing no more than their validation: no memory of a tensor is touched, and no backend asked.
void validate_only(const std::function<void()>& call);
/// True for what explaining() gives inside validate_only.
bool is_validation(const Explanation* explanation);

/// Which backends of an op choose between kernels, and answer for themselves.
enum class Explains { kNeither, kCuda, kBoth };

/// The answer of an op with one CUDA kernel.
void explain_only_kernel(Explanation& explanation);

/// The answer of a CPU kernel; `kernel` names it, or is empty where there is one. `has_amx`: it has a form of its own for that.
void explain_cpu(Explanation& explanation, const std::string& kernel, bool has_amx);

}  // namespace quire
