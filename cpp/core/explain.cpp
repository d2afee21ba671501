// Collects what ops would run.
// SPDX-License-Identifier: Apache-2.0
#include "core/explain.h"

#include <algorithm>

#include "core/explain_vectors.h"
#include "cpu/isa/dispatch.h"

namespace quire {
namespace {

thread_local Explanation* current = nullptr;
thread_local Explanation validation;  // only its address counts

struct Scope {
  explicit Scope(Explanation* next) : previous(current) { current = next; }
  ~Scope() { current = previous; }
  Explanation* previous;
};

}  // namespace

Explanation* explaining() { return current; }

Explanation explain(const std::function<void()>& call) {
  Explanation explanation;
  const Scope scope(&explanation);
  call();
  return explanation;
}

void validate_only(const std::function<void()>& call) {
  const Scope scope(&validation);
  call();
}

bool is_validation(const Explanation* explanation) { return explanation == &validation; }

void explain_cpu(Explanation& explanation, const std::string& kernel, bool has_amx) {
  const cpu::Isa level = has_amx ? cpu::isa() : std::min(cpu::isa(), cpu::Isa::kAvx512);
  explanation.variant = (kernel.empty() ? "" : kernel + "_") + cpu::name(level);
  const std::string used = cpu::name(cpu::isa()), highest = cpu::name(cpu::max_isa());
  explanation.reasons.push_back(used == highest ? highest + " is the highest instruction set of this machine that there are kernels for"
                                                : "QUIRE_CPU_ISA lowers the instruction set from " + highest + " to " + used);
  if (level != cpu::isa()) explanation.reasons.push_back(std::string("this kernel has nothing to gain from ") + used);
}

bool explain_vectors(const char* obstacle) {
  if (current == nullptr) return false;
  current->variant = obstacle == nullptr ? "vector" : "element";
  current->reasons.push_back(obstacle == nullptr ? "all rows begin and end at multiples of 16 bytes"
                                                 : std::string("not vector: ") + obstacle + " does not divide into aligned 16-byte pieces");
  return true;
}

void explain_only_kernel(Explanation& explanation) {
  explanation.variant = "only";
  explanation.reasons.emplace_back("there is one kernel");
}

}  // namespace quire
