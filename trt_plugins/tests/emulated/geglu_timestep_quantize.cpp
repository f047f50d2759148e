#include "geglu_timestep_quantize/kernel.cu"  // NOLINT(bugprone-suspicious-include): compiled for the CPU here
