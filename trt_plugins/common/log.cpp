#include "common/log.h"

#include <atomic>
#include <cstdio>

namespace quest {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

}  // namespace

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { loggerFinder = finder; }

void logError(const char* where, const char* message) noexcept {
    char line[1024];
    static_cast<void>(std::snprintf(line, sizeof(line), "quest::%s: %s", where, message));
    nvinfer1::ILoggerFinder* const finder = loggerFinder;
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, line);
    else static_cast<void>(std::fprintf(stderr, "%s\n", line));
}

}  // namespace quest
