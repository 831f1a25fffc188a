// The encoder as a Paddle operator: ids and a model's arrays in, logits out. It keeps nothing between calls but scratch
// memory of its threads, so any number of predictors may run it at once.
#include <omp.h>

#include "encoder.h"
#include "paddle/extension.h"

namespace {

using paddle::Tensor;

void require_type(const Tensor& tensor, paddle::DataType type, size_t dimensions, const char* name) {
  if (tensor.dtype() != type || tensor.shape().size() != dimensions || !tensor.is_cpu())
    PD_THROW(name, ": an array of another type, another number of dimensions or on another device than the CPU");
}

std::vector<Tensor> classify(const Tensor& ids, const Tensor& types, const Tensor& words, const Tensor& places,
                             const Tensor& kinds, const Tensor& integers, const Tensor& floats, const Tensor& shifts,
                             const std::vector<int>& shape, const std::vector<int>& exact,
                             const std::vector<float>& rounding, const std::vector<float>& epsilon) {
  require_type(ids, paddle::DataType::INT64, 2, "input_ids");
  require_type(types, paddle::DataType::INT64, 2, "token_type_ids");
  if (ids.shape() != types.shape()) PD_THROW("input_ids and token_type_ids: of different shapes");
  const bool low_bit = words.dtype() == paddle::DataType::INT8;
  require_type(words, low_bit ? paddle::DataType::INT8 : paddle::DataType::FLOAT32, 2, "an embedding");
  for (const Tensor* table : {&places, &kinds}) require_type(*table, paddle::DataType::FLOAT32, 2, "an embedding");
  require_type(integers, paddle::DataType::INT8, 1, "integers");
  require_type(floats, paddle::DataType::FLOAT32, 1, "floats");
  require_type(shifts, paddle::DataType::INT32, 1, "shifts");
  for (const Tensor* table : {&words, &places, &kinds})
    if (shape.empty() || table->shape()[1] != shape[0]) PD_THROW("an embedding: of another width than the model");
  ernie_kqat::Contents contents = {shape, exact, rounding, epsilon,
                                   low_bit ? nullptr : words.data<float>(), places.data<float>(), kinds.data<float>(),
                                   low_bit ? words.data<int8_t>() : nullptr,
                                   words.shape()[0], places.shape()[0], kinds.shape()[0],
                                   integers.data<int8_t>(), floats.data<float>(), shifts.data<int32_t>(),
                                   integers.numel(), floats.numel(), shifts.numel()};
  const ernie_kqat::Encoder encoder = ernie_kqat::assemble(contents);
  const int batch = int(ids.shape()[0]), tokens = int(ids.shape()[1]);
  Tensor logits = paddle::empty({batch, encoder.classes}, paddle::DataType::FLOAT32, paddle::CPUPlace());
  // Paddle has just set OpenMP's number of threads to the predictor's.
  ernie_kqat::run(encoder, ids.data<int64_t>(), types.data<int64_t>(), batch, tokens, omp_get_max_threads(),
                  logits.data<float>());
  return {logits};
}

std::vector<std::vector<int64_t>> shape_of(const std::vector<int64_t>& ids, const std::vector<int64_t>&,
                                           const std::vector<int64_t>&, const std::vector<int64_t>&,
                                           const std::vector<int64_t>&, const std::vector<int64_t>&,
                                           const std::vector<int64_t>&, const std::vector<int64_t>&,
                                           const std::vector<int>& shape, const std::vector<int>&,
                                           const std::vector<float>&, const std::vector<float>&) {
  return {{ids[0], shape.size() > 4 ? shape[4] : -1}};
}

std::vector<paddle::DataType> type_of(const paddle::DataType&, const paddle::DataType&, const paddle::DataType&,
                                      const paddle::DataType&, const paddle::DataType&, const paddle::DataType&,
                                      const paddle::DataType&, const paddle::DataType&) {
  return {paddle::DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(ernie_kqat_classifier)
    .Inputs({"InputIds", "TokenTypeIds", "Words", "Places", "Kinds", "Integers", "Floats", "Shifts"})
    .Outputs({"Logits"})
    .Attrs({"shape: std::vector<int>", "exact: std::vector<int>", "rounding: std::vector<float>",
            "epsilon: std::vector<float>"})
    .SetKernelFn(PD_KERNEL(classify))
    .SetInferShapeFn(PD_INFER_SHAPE(shape_of))
    .SetInferDtypeFn(PD_INFER_DTYPE(type_of));

// The best instruction set that this CPU has kernels for; asked before the operator is used.
extern "C" __attribute__((visibility("default"))) const char* ernie_kqat_isa() {
  static const std::string best = ernie_kqat::isas().front();
  return best.c_str();
}
