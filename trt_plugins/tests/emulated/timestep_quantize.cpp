#include "timestep_quantize/kernel.cu"
