#include "timestep_quantize/reference.h"

#include "common/reference.h"

namespace quest
{

void referenceTimestepQuantize(TimestepQuantizeProblem const& problem)
{
    int32_t const allChannels = problem.outer * problem.channels;
    for (int32_t n = 0; n < problem.samples; ++n)
    {
        Row const row = referenceRow(problem.tables, n);
        for (int32_t c = 0; c < problem.codesLayout.channels; ++c)
        {
            for (int64_t p = 0; p < problem.inner; ++p)
            {
                int8_t& code = problem.codes[n * problem.codesLayout.sample + offsetOf(problem.codesLayout, c, p)];
                if (c >= allChannels)
                {
                    code = 0; // padding
                    continue;
                }
                float const x = elementOf(problem.x, problem.type, n * problem.xLayout.sample + offsetOf(problem.xLayout, c, p));
                float const channel = problem.tables.channel[problem.tables.channels == 1 ? 0 : c % problem.channels];
                code = exactCode(x, stepOf(row.scale, channel), row);
            }
        }
    }
}

} // namespace quest
