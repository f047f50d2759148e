/// Device memory for the test programs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace quest::test {

inline void requireSuccess(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

/// The GPUs that can be used; where there is none, says so on standard output.
inline int countGpus() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        std::printf("no GPU is here (%s): the kernels are not run\n", cudaGetErrorString(status));
        return 0;
    }
    return count;
}

/// A copy of host memory on the device, freed with the object.
template <typename T>
class DeviceArray {
public:
    /// \param shift bytes that the copy lies behind an address aligned to 256.
    explicit DeviceArray(const std::vector<T>& host, std::size_t shift = 0) : mBytes(host.size() * sizeof(T)), mShift(shift) {
        requireSuccess(cudaMalloc(&mMemory, mBytes + shift + 1));
        requireSuccess(cudaMemcpy(data(), host.data(), mBytes, cudaMemcpyHostToDevice));
    }

    ~DeviceArray() { static_cast<void>(cudaFree(mMemory)); }

    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    T* data() const { return reinterpret_cast<T*>(static_cast<char*>(mMemory) + mShift); }

    std::vector<T> toHost() const {
        std::vector<T> host(mBytes / sizeof(T));
        requireSuccess(cudaMemcpy(host.data(), data(), mBytes, cudaMemcpyDeviceToHost));
        return host;
    }

private:
    void* mMemory = nullptr;
    std::size_t mBytes;
    std::size_t mShift;
};

}  // namespace quest::test
