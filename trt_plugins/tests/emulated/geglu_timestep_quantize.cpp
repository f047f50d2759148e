#include "geglu_timestep_quantize/kernel.cu"
