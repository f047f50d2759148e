#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quest_deploy/engine.h"
#include "quest_deploy/schedule.h"

namespace quest_deploy {

constexpr char kImageCondition[] = "image_condition";
/// The input for the guidance's weight, [rows], of a model that embeds one (FLUX.1-dev).
constexpr char kGuidance[] = "guidance";
/// In the names of inputs that may stay zeros, which add nothing: what ControlNets add, `down_block_additional_residual_0` and so on.
constexpr char kResidual[] = "_additional_residual";
/// In the names of an IP-Adapter's inputs, `ip_adapter_tokens` and `ip_adapter_scale`, which may both stay zeros likewise.
constexpr char kIpAdapter[] = "ip_adapter_";

/// What the engine reads at a step, on the GPU.
struct StepInputs {
    std::int64_t rows;
    const float* sample;                       ///< [rows, ...], as the engine gets it
    const float* timestep;                     ///< [rows]
    std::map<std::string, float*> conditions;  ///< the other inputs by name, [rows, ...], to be written too
};

struct DenoiserOptions {
    std::int64_t batch = 1;  ///< samples denoised together
    Shape sample_shape;      ///< of the engine's sample, such as {4, 64, 64}; may be empty where the engine takes one size only
    /// The guidance's weight. Of an engine with the input kGuidance, what that is filled with; it must be given, and not be negative. Of
    /// any other it is classifier-free: where it is above 1, the engine runs on twice the batch, and a condition's first half is the empty
    /// one's.
    std::optional<float> guidance;
    /// The image's weight, of a model that edits one (instruct-pix2pix); 0 for other models. With a guidance above 1 the engine then runs
    /// on three times the batch: with all conditions, without the text's, and without the text's and with zeros for the image's.
    float image_guidance = 0;
    /// The shapes, without the batch, of other inputs whose sizes the engine leaves open, by name.
    std::map<std::string, Shape> condition_shapes;
    /// Puts on the stream what a step has to do before its engine runs, such as a ControlNet that reads the sample and writes its
    /// residuals. Called once, whose work is then recorded with the step, or at every step without a CUDA graph; and once before, on
    /// arbitrary values, to set up what no recording may hold. It may do nothing but put work on the stream,
    /// and what that work touches must outlive the Denoiser.
    std::function<void(const StepInputs&, cudaStream_t)> before_engine;
    /// Record one step as a CUDA graph, once, and launch that. Not all that TensorRT does can be recorded; the error then says so.
    bool cuda_graph = true;
};

/// A whole denoising loop on the GPU: the engine, the schedule's arithmetic and nothing on the host between the steps. One thread at a
/// time uses it; for several threads make one each, of the same engine.
class Denoiser {
public:
    /// Throws Error where the schedule, the engine and the options do not fit each other.
    Denoiser(const Engine& engine, const Schedule& schedule, const DenoiserOptions& options = {});
    Denoiser(Denoiser&&) noexcept;
    Denoiser& operator=(Denoiser&&) noexcept;
    ~Denoiser();

    /// The inputs besides the sample and the timestep, with the shapes that set_condition takes: [rows, ...], rows being the batch, or
    /// two or three times the batch under guidance. Where the engine's sample has more channels than its output, the rest, behind those
    /// that are denoised, are the condition kImageCondition: the mask and the masked image's latents, or the image's latents. An output
    /// of more channels than the sample has a variance behind them, which is left out. Those with kResidual in their names are zeros until
    /// they are set; all others must be. kGuidance is none: DenoiserOptions says it.
    const std::vector<Tensor>& conditions() const;
    /// Copy a condition to the GPU; it stays until it is set again. Waits for a loop that was enqueued before, which reads the one before.
    /// Throws Error for an unknown name or another number of values.
    void set_condition(const std::string& name, const std::vector<float>& values);

    /// Denoise `sample`, [batch, ...], Gaussian noise times the schedule's init_noise_sigma, in place. `noise`, [steps, batch, ...], is
    /// the fresh noise of each step where the schedule adds some, else empty. Waits for a loop that was enqueued before; what that left in
    /// result() is overwritten. Throws Error, also for what failed on the GPU.
    void run(std::vector<float>& sample, const std::vector<float>& noise = {});

    /// The same without a copy or a wait: put the sample into sample() and the noise into noise() on `stream`, call this, and read
    /// result() on the same stream.
    void enqueue(cudaStream_t stream);
    float* sample() const;
    float* noise() const;
    const float* result() const;
    /// Values of one batch of samples.
    std::size_t sample_size() const;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace quest_deploy
