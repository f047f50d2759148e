/// A function that the kernels share with the CPU's scalar reference.
#pragma once

#ifdef __CUDACC__
#define QUEST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUEST_HOST_DEVICE inline
#endif
