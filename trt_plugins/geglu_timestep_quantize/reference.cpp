#include "geglu_timestep_quantize/reference.h"

#include "common/reference.h"

namespace quest {

void referenceGegluTimestepQuantize(const GegluTimestepQuantizeProblem& problem, float* activations) {
    int64_t place = 0;
    for (int32_t n = 0; n < problem.samples; ++n) {
        const Row row = referenceRow(problem.tables, n);
        for (int32_t r = 0; r < problem.rows; ++r) {
            for (int32_t c = 0; c < problem.channels; ++c, ++place) {
                const int64_t value = 2 * (place - c) + c;
                const float activation =
                    geglu(elementOf(problem.x, problem.type, value), elementOf(problem.x, problem.type, value + problem.channels));
                const float channel = problem.tables.channel[problem.tables.channels == 1 ? 0 : c];
                problem.codes[place] = exactCode(activation, stepOf(row.scale, channel), row);
                if (activations != nullptr) activations[place] = activation;
            }
        }
    }
}

}  // namespace quest
