/// quest::TimestepQuantize on the CPU, an element after the other: what the kernel is compared with.
#pragma once

#include "timestep_quantize/problem.h"

namespace quest {

/// Every pointer is to the host's memory.
void referenceTimestepQuantize(const TimestepQuantizeProblem& problem);

}  // namespace quest
