// What CUDA hands out, given back by destructors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "quest_deploy/error.h"

namespace quest_deploy {

inline void check_cuda(cudaError_t result, const std::string& what) {
    if (result != cudaSuccess) throw Error(what + ": " + cudaGetErrorString(result));
}

/// Makes a device the calling thread's while it lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&before_), "asking for the GPU in use");
        if (before_ != device) check_cuda(cudaSetDevice(device), "choosing GPU " + std::to_string(device));
    }
    ~DeviceGuard() { cudaSetDevice(before_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
};

/// Something of CUDA's that `destroy` gives back.
template <typename Handle, cudaError_t (*destroy)(Handle)>
class Owned {
public:
    Owned() = default;
    Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Owned& operator=(Owned&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Owned() {
        if (handle_ != nullptr) destroy(handle_);
    }
    Handle get() const { return handle_; }
    Handle* out() { return &handle_; }

private:
    Handle handle_ = nullptr;
};

using OwnedStream = Owned<cudaStream_t, cudaStreamDestroy>;
using OwnedEvent = Owned<cudaEvent_t, cudaEventDestroy>;
using OwnedGraph = Owned<cudaGraph_t, cudaGraphDestroy>;
using OwnedGraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;
using OwnedMemory = Owned<void*, cudaFree>;

/// An array in the GPU's memory, of zeros at first.
template <typename T>
class DeviceArray {
public:
    DeviceArray() = default;
    explicit DeviceArray(std::size_t count) : count_(count) {
        if (count == 0) return;
        check_cuda(cudaMalloc(memory_.out(), count * sizeof(T)), "allocating " + std::to_string(count * sizeof(T)) + " bytes on the GPU");
        check_cuda(cudaMemset(memory_.get(), 0, count * sizeof(T)), "clearing the GPU's memory");
        check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "clearing the GPU's memory");  // other streams do not wait for this one
    }
    T* data() const { return static_cast<T*>(memory_.get()); }
    std::size_t size() const { return count_; }
    void copy_from(const T* host, std::size_t count, cudaStream_t stream) const {
        check_cuda(cudaMemcpyAsync(data(), host, count * sizeof(T), cudaMemcpyHostToDevice, stream), "copying to the GPU");
    }

private:
    OwnedMemory memory_;
    std::size_t count_ = 0;
};

}  // namespace quest_deploy
