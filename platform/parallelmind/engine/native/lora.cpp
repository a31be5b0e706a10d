// Low-rank adapters of a step's tokens, for processors: each row has the adapter of its sample.

#include <cstdint>
#include <vector>

#include "numbers.h"

extern "C" struct LowRank {       // one layer of a group, one adapter
  const float *down, *up;         // [rank, inputs], [rank, outputs]
  int64_t rank, first, outputs;   // `first` is the layer's first column in the group's product
  float scale;
};

namespace {

template <typename T>
void add_rows(const T* input, T* product, int64_t rows, int64_t inputs, int64_t columns, const int32_t* start,
              const LowRank* layers, const int32_t* adapter) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    if (adapter[row] < 0) continue;
    thread_local std::vector<float> x, sum;
    x.resize(inputs);
    for (int64_t i = 0; i < inputs; i++) x[i] = to_float(input[row * inputs + i]);
    for (int32_t at = start[adapter[row]]; at < start[adapter[row] + 1]; at++) {
      const LowRank& layer = layers[at];
      sum.assign(layer.outputs, 0.f);
      for (int64_t r = 0; r < layer.rank; r++) {
        float dot = 0;
        for (int64_t i = 0; i < inputs; i++) dot += layer.down[r * inputs + i] * x[i];
        dot *= layer.scale;
        for (int64_t o = 0; o < layer.outputs; o++) sum[o] += dot * layer.up[r * layer.outputs + o];
      }
      T* to = product + row * columns + layer.first;
      for (int64_t o = 0; o < layer.outputs; o++) store(to + o, to_float(to[o]) + sum[o]);
    }
  }
}

}  // namespace

#define ADD_LOW_RANK(name, T)                                                                                   \
  extern "C" void name(const void* input, void* product, int64_t rows, int64_t inputs, int64_t columns,         \
                       const int32_t* start, const LowRank* layers, const int32_t* adapter) {                   \
    add_rows((const T*)input, (T*)product, rows, inputs, columns, start, layers, adapter);                      \
  }
ADD_LOW_RANK(add_low_rank_float32, float)
ADD_LOW_RANK(add_low_rank_bfloat16, bf16)
