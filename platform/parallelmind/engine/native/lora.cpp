// Low-rank adapters of a step's tokens, for processors: each row has the adapter of its sample.

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace {

constexpr int ROWS = 8;  // rows of one adapter that are computed together, so that its weights are read once

template <typename T>
inline float dot(const T* __restrict a, const float* __restrict b, int64_t count) {
  float total = 0;
  for (int64_t i = 0; i < count; i++) total += to_float(a[i]) * b[i];
  return total;
}

template <typename T>
inline void add_scaled(float* __restrict to, float scale, const T* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += scale * to_float(x[i]);
}

template <typename T>
inline void widen(const T* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = to_float(from[i]);
}

template <typename T>
inline void add(T* __restrict to, const float* __restrict x, int64_t count) {
  for (int64_t i = 0; i < count; i++) store(to + i, to_float(to[i]) + x[i]);
}

// Add one adapter of one layer to the rows `first` to `last` of a product.
template <typename T>
void add_adapter(const float* input, T* product, int64_t first, int64_t last, int64_t inputs, int64_t columns,
                 const LowRank& layer, std::vector<float>& sums) {
  const T *down = (const T*)layer.down, *up = (const T*)layer.up;
  const int64_t outputs = layer.outputs;
  sums.assign((last - first) * outputs, 0.f);
  for (int64_t r = 0; r < layer.rank; r++)
    for (int64_t row = 0; row < last - first; row++) {
      const float weight = layer.scale * dot(down + r * inputs, input + row * inputs, inputs);
      add_scaled(sums.data() + row * outputs, weight, up + r * outputs, outputs);
    }
  for (int64_t row = first; row < last; row++)
    add(product + row * columns + layer.first, sums.data() + (row - first) * outputs, outputs);
}

template <typename T>
void add_low_rank(const T* input, T* product, int64_t rows, int64_t inputs, int64_t columns, const Adapter* adapters,
                  const int32_t* adapter) {
  struct Task {
    int64_t first, last;
  };
  std::vector<Task> tasks;  // rows of one adapter
  for (int64_t row = 0; row < rows; row++) {
    const bool joins = row && adapter[row] == adapter[row - 1] && row - tasks.back().first < ROWS;
    if (joins) tasks.back().last = row + 1;
    else tasks.push_back({row, row + 1});
  }
#pragma omp parallel for schedule(dynamic, 1) if (tasks.size() > 1)
  for (size_t i = 0; i < tasks.size(); i++) {
    thread_local std::vector<float> wide, sums;
    const auto [first, last] = tasks[i];
    const auto [layers, count] = adapters[adapter[first]];
    if (count == 0) continue;
    wide.resize((last - first) * inputs);
    widen(input + first * inputs, wide.data(), (last - first) * inputs);
    for (int64_t at = 0; at < count; at++)
      add_adapter(wide.data(), product, first, last, inputs, columns, layers[at], sums);
  }
}

}  // namespace

extern "C" void add_low_rank_float32(const float* input, float* product, int64_t rows, int64_t inputs, int64_t columns,
                                     const Adapter* adapters, const int32_t* adapter) {
  add_low_rank(input, product, rows, inputs, columns, adapters, adapter);
}

extern "C" void add_low_rank_bfloat16(const bf16* input, bf16* product, int64_t rows, int64_t inputs, int64_t columns,
                                      const Adapter* adapters, const int32_t* adapter) {
  add_low_rank(input, product, rows, inputs, columns, adapters, adapter);
}
