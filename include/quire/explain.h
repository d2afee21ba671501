// What an op would run, and why.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "quire/export.h"

namespace quire {

struct Explanation {
  std::string op;
  std::string device;                // "cpu" or "cuda:0"
  std::string variant;               // of the kernel; empty if there is nothing to run
  std::vector<std::string> reasons;  // one sentence each
};

/// Calls `call` on this thread. Ops in it validate, throw as ever, and choose their kernels, but run nothing and write nothing. Returns what the
/// last of them chose; one that has nothing to do (a zero size) leaves no trace.
QUIRE_API Explanation explain(const std::function<void()>& call);

}  // namespace quire
