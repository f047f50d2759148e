/// TensorRT's log, and the boundary that no exception crosses.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <utility>

namespace quest {

/// What setLoggerFinder was given; null for standard error.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void logError(const char* where, const char* message) noexcept;

/// What \p body returns; where it throws, \p onError, after the reason was logged.
template <typename Result, typename Body>
Result guarded(const char* where, Result onError, Body&& body) noexcept {
    try {
        return std::forward<Body>(body)();
    } catch (const std::exception& e) {
        logError(where, e.what());
    } catch (...) {
        logError(where, "an exception of unknown type");
    }
    return onError;
}

}  // namespace quest
