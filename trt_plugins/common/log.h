//! TensorRT's log, and the boundary that no exception crosses.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <utility>

namespace quest
{

//! What setLoggerFinder was given; null for standard error.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void logError(char const* where, char const* message) noexcept;

//! What \p body returns; where it throws, \p onError, after the reason was logged.
template <typename Result, typename Body>
Result guarded(char const* where, Result onError, Body&& body) noexcept
{
    try
    {
        return std::forward<Body>(body)();
    }
    catch (std::exception const& e)
    {
        logError(where, e.what());
    }
    catch (...)
    {
        logError(where, "an exception of unknown type");
    }
    return onError;
}

} // namespace quest
