/// quest::GegluTimestepQuantize on the CPU, an element after the other: what the kernel is compared with.
#pragma once

#include "geglu_timestep_quantize/problem.h"

namespace quest {

/// Every pointer is to the host's memory.
///
/// \param activations where not null, [samples, rows, C]: what was quantized, for telling how close to a tie it was.
void referenceGegluTimestepQuantize(const GegluTimestepQuantizeProblem& problem, float* activations = nullptr);

}  // namespace quest
