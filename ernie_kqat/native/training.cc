// Loops of quantization-aware training as Paddle operators: one pass where Paddle's own operators make four to ten.
//
// Every value is computed by the same float32 operations in the same order as ernie_kqat/quantizers/kernels.py writes them with
// Paddle's operators, so which of the two runs changes no bit (this file is compiled with -ffp-contract=off).
#include <algorithm>
#include <cmath>

#include "paddle/extension.h"

#define EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))

namespace {

using paddle::Tensor;

constexpr float ROUND = 12582912.0f;  // adding and subtracting it rounds half to even

inline float rounded(float x, float inverse, float low, float high) {
  float grid = x * inverse;
  grid = grid < low ? low : grid;
  grid = grid > high ? high : grid;
  return (grid + ROUND) - ROUND;
}

EVERY_CPU void one_step(const float* x, float step, float low, float high, int64_t count, float* out) {
  const float inverse = 1.0f / step;
  for (int64_t i = 0; i < count; ++i) out[i] = rounded(x[i], inverse, low, high) * step;
}

EVERY_CPU void steps_of_columns(const float* x, const float* step, const float* inverse, float low, float high, int64_t rows,
                                int64_t columns, float* out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t i = row * columns + column;
      out[i] = rounded(x[i], inverse[column], low, high) * step[column];
    }
}

EVERY_CPU void largest_of_columns(const float* x, int64_t rows, int64_t columns, float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      const float size = std::fabs(x[row * columns + column]);
      out[column] = size > out[column] || size != size ? size : out[column];
    }
}

// dQ/dx times grad, and what the step's gradient is the sum of (quantizers/__init__.py, LearnedStep).
EVERY_CPU void slopes(const float* x, const float* step, bool by_column, const float* quantized, const float* grad, float low,
                      float high, int64_t rows, int64_t columns, float* to_x, float* to_step) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t i = row * columns + column;
      const float own = by_column ? step[column] : step[0];
      const float ratio = x[i] / own;
      const float inside = ratio >= low && ratio <= high ? 1.0f : 0.0f;
      to_step[i] = grad[i] * (quantized[i] / own - ratio * inside);
      to_x[i] = grad[i] * inside;
    }
}

void require(const Tensor& tensor, const char* name) {
  if (tensor.dtype() != paddle::DataType::FLOAT32 || !tensor.is_cpu() || tensor.numel() == 0)
    PD_THROW(name, ": a float32 array on the CPU is needed");
}

int64_t columns_of(const Tensor& x, const Tensor& step) {
  const int64_t columns = x.shape().empty() ? 1 : x.shape().back();
  if (step.numel() != 1 && step.numel() != columns) PD_THROW("step: one value, or one of each column, is needed");
  return columns;
}

std::vector<Tensor> on_grid(const Tensor& x, const Tensor& step, float low, float high) {
  require(x, "x");
  require(step, "step");
  const int64_t columns = columns_of(x, step), count = x.numel();
  Tensor out = paddle::empty(x.shape(), paddle::DataType::FLOAT32, paddle::CPUPlace());
  if (step.numel() == 1) {
    one_step(x.data<float>(), step.data<float>()[0], low, high, count, out.data<float>());
  } else {
    std::vector<float> inverse(step.data<float>(), step.data<float>() + columns);
    for (float& value : inverse) value = 1.0f / value;
    steps_of_columns(x.data<float>(), step.data<float>(), inverse.data(), low, high, count / columns, columns,
                     out.data<float>());
  }
  return {out};
}

std::vector<Tensor> peaks(const Tensor& x) {
  require(x, "x");
  const int64_t columns = x.shape().back();
  Tensor out = paddle::empty({columns}, paddle::DataType::FLOAT32, paddle::CPUPlace());
  largest_of_columns(x.data<float>(), x.numel() / columns, columns, out.data<float>());
  return {out};
}

std::vector<Tensor> learned_step(const Tensor& x, const Tensor& step, const Tensor& quantized, const Tensor& grad, float low,
                                 float high) {
  require(x, "x");
  require(step, "step");
  require(quantized, "quantized");
  require(grad, "grad");
  if (quantized.numel() != x.numel() || grad.numel() != x.numel()) PD_THROW("arrays of different sizes");
  const int64_t columns = columns_of(x, step);
  Tensor to_x = paddle::empty(x.shape(), paddle::DataType::FLOAT32, paddle::CPUPlace());
  Tensor to_step = paddle::empty(x.shape(), paddle::DataType::FLOAT32, paddle::CPUPlace());
  slopes(x.data<float>(), step.data<float>(), step.numel() != 1, quantized.data<float>(), grad.data<float>(), low, high,
         x.numel() / columns, columns, to_x.data<float>(), to_step.data<float>());
  return {to_x, to_step};
}

}  // namespace

PD_BUILD_OP(ernie_kqat_on_grid)
    .Inputs({"X", "Step"})
    .Outputs({"Out"})
    .Attrs({"low: float", "high: float"})
    .SetKernelFn(PD_KERNEL(on_grid));

PD_BUILD_OP(ernie_kqat_peaks).Inputs({"X"}).Outputs({"Out"}).SetKernelFn(PD_KERNEL(peaks));

PD_BUILD_OP(ernie_kqat_learned_step)
    .Inputs({"X", "Step", "Quantized", "Grad"})
    .Outputs({"ToX", "ToStep"})
    .Attrs({"low: float", "high: float"})
    .SetKernelFn(PD_KERNEL(learned_step));
