// The process's logger, with TensorRT for RTX's own library, for tests/trt_plugins/test_cpp_runtime.py: it outlives whatever was made with
// it, and an error is told by the call that failed.
#include "../src/engine.cpp"

#include <cstring>
#include <iostream>
#include <thread>

int main() {
    using namespace quest_deploy;
    int first = 0, second = 0;
    const auto fail = [](nvinfer1::IRuntime& runtime) {
        try {
            require([&] { return runtime.getPluginRegistry().loadLibrary("/no/library.so"); }, "loading");
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string("loaded");
    };
    const auto start = [] { return std::unique_ptr<nvinfer1::IRuntime>(nvinfer1::createInferRuntime(Logger::instance())); };
    auto one = std::make_unique<SinkGuard>([&](int, const char*) { ++first; });
    auto runtime = start();
    const SinkGuard two([&](int severity, const char* message) {
        ++second;
        if (severity <= 1 && std::strcmp(message, "again") != 0)
            Logger::instance().log(nvinfer1::ILogger::Severity::kERROR, "again");  // unlocked
    });
    const auto other = start();
    const std::string reason = fail(*runtime);
    runtime.reset();
    one.reset();
    const int told = first;
    const bool same = fail(*other) == reason;
    Logger::instance().log(nvinfer1::ILogger::Severity::kERROR, "an earlier call's");
    std::string silent, elsewhere;
    try {
        require([] { return false; }, "a call");
    } catch (const Error& error) {
        silent = error.what();
    }
    try {
        require(
            [] {
                std::thread([] { Logger::instance().log(nvinfer1::ILogger::Severity::kERROR, "another thread's"); }).join();
                return false;
            },
            "a call");
    } catch (const Error& error) {
        elsewhere = error.what();
    }
    std::cout << "the first sink was " << (told > 0 && first == told ? "told while it lived" : "lost") << "\n"
              << "the second was told " << (second > told ? "more" : "less") << "\n"
              << (same ? reason : "another reason") << "\n"
              << silent << "\n"
              << elsewhere << "\n";
}
