#include "timestep_quantize/reference.h"

#include "common/reference.h"

namespace quest {

void referenceTimestepQuantize(const TimestepQuantizeProblem& problem) {
    const int32_t allChannels = problem.outer * problem.channels;
    for (int32_t n = 0; n < problem.samples; ++n) {
        const Row row = referenceRow(problem.tables, n);
        for (int32_t c = 0; c < problem.codesLayout.channels; ++c) {
            for (int64_t p = 0; p < problem.inner; ++p) {
                int8_t& code = problem.codes[n * problem.codesLayout.sample + offsetOf(problem.codesLayout, c, p)];
                if (c >= allChannels) {
                    code = 0;  // padding
                    continue;
                }
                const float x = elementOf(problem.x, problem.type, n * problem.xLayout.sample + offsetOf(problem.xLayout, c, p));
                const float channel = problem.tables.channel[problem.tables.channels == 1 ? 0 : c % problem.channels];
                code = exactCode(x, stepOf(row.scale, channel), row);
            }
        }
    }
}

}  // namespace quest
