// Products of a step's tokens with the weights of linear layers, for processors.
//
// Packed weights are blocks of 32 outputs, and a block is a row of 32 words for each word of the input. A thread reads
// its blocks in the order in which they lie in memory. While it computes with one block it fetches the next, because a
// step of few tokens takes as long as reading the weights. Sums are float32, and the result of a row depends on that
// row alone, not on how many others there are.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "products.h"
#include "vectors.h"

namespace {

template <typename T>
void put_row(const float* sums, T* to, int64_t count) {
  float words[COLUMNS];
  to_words<T>(sums, words);
  std::memcpy(to, words, count * sizeof(T));
}

// Calls use(row, output, sums, count) with input[row] . weights[output] + bias[output] of `count` outputs, from
// `output` on. A thread has a row's outputs in ascending order.
template <typename T, typename Use>
void multiply(const T* input, const Weights& weights, int64_t rows, const Use& use) {
  static thread_local std::vector<const float*> starts;
  static thread_local std::vector<float> copies;
  const int64_t words = (weights.inputs + PER<T> - 1) / PER<T>, blocks = (weights.outputs + COLUMNS - 1) / COLUMNS;
  const int64_t tiles = (rows + ROWS - 1) / ROWS, readers = std::min<int64_t>(tiles, 2);  // tiles that fetch ahead
  starts.resize(rows);
  copies.resize(weights.inputs % PER<T> ? rows * words : 0);
  for (int64_t r = 0; r < rows; r++)
    starts[r] = words_of(input + r * weights.inputs, weights.inputs, words, copies.data() + r * words);
  const float* const* from = starts.data();
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const float *first = weights.packed + b * words * COLUMNS, *next = first + words * COLUMNS;
    const float* bias = weights.bias ? weights.bias + b * COLUMNS : ZEROS;
    const int64_t width = std::min<int64_t>(COLUMNS, weights.outputs - b * COLUMNS);
    float sums[ROWS][COLUMNS], *to[ROWS];
    for (int r = 0; r < ROWS; r++) to[r] = sums[r];
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, lines = t < readers ? 2 / readers : 0;
      add_products<T>(from + begin, end - begin, {first, next, words, COLUMNS, lines}, bias, to);
      for (int64_t r = begin; r < end; r++) use(r, b * COLUMNS, sums[r - begin], width);
      next += words * lines * LANES;
    }
  }
}

// out[row, output] = input[row] . weights[output] + bias[output]
template <typename T>
void multiply(const T* input, const Weights& weights, T* out, int64_t rows) {
  multiply(input, weights, rows, [&](int64_t row, int64_t output, const float* sums, int64_t count) {
    put_row(sums, out + row * weights.outputs + output, count);
  });
}

struct Largest {  // of the outputs of a row, as numbers of the model's type
  float number = -INFINITY;
  int64_t output = -1;
  bool has_nan = false;

  template <typename T>
  void add(int64_t first, const float* sums, int64_t count) {
    const Vec low = load(sums), high = load(sums + LANES);
    has_nan |= any((low != low) | (high != high));
    if (!any((low > splat(number)) | (high > splat(number)))) return;
    T numbers[COLUMNS];
    put_row(sums, numbers, count);
    for (int64_t i = 0; i < count; i++)
      if (to_float(numbers[i]) > number) number = to_float(numbers[i]), output = first + i;
  }

  void add(const Largest& other) {
    has_nan |= other.has_nan;
    const bool is_first = other.number == number && other.output < output;
    if (other.number > number || is_first) number = other.number, output = other.output;
  }
};

// outputs[row]: the first largest output; -1 if it is infinite or if any is NaN.
template <typename T>
void find_largest(const T* input, const Weights& weights, int64_t* outputs, int64_t rows) {
  std::vector<Largest> found(rows * omp_get_max_threads());  // by thread
  multiply(input, weights, rows, [&](int64_t row, int64_t output, const float* sums, int64_t count) {
    found[omp_get_thread_num() * rows + row].add<T>(output, sums, count);
  });
  for (int64_t row = 0; row < rows; row++) {
    Largest largest;
    for (size_t i = row; i < found.size(); i += rows) largest.add(found[i]);
    outputs[row] = largest.has_nan || std::isinf(largest.number) ? -1 : largest.output;
  }
}

// Rows of numbers side by side as the words of one number, or of two, from each. Few words of all rows at a time, so
// that they stay in the nearest cache.
template <typename T>
void pack(const T* weights, float* packed, int64_t inputs, int64_t outputs) {
  constexpr int64_t FEW = 64;
  const int64_t words = (inputs + PER<T> - 1) / PER<T>, blocks = (outputs + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t rows = std::min<int64_t>(COLUMNS, outputs - b * COLUMNS);
    std::vector<float> copies(inputs % PER<T> ? rows * words : 0);
    const float* from[COLUMNS];
    for (int64_t i = 0; i < rows; i++)
      from[i] = words_of(weights + (b * COLUMNS + i) * inputs, inputs, words, copies.data() + i * words);
    float* to = packed + b * words * COLUMNS;
    if (rows < COLUMNS) std::fill(to, to + words * COLUMNS, 0.f);
    for (int64_t begin = 0; begin < words; begin += FEW)
      for (int64_t i = 0; i < rows; i++)
        for (int64_t w = begin; w < std::min(begin + FEW, words); w++) put_word(to + w * COLUMNS + i, from[i][w]);
  }
}

}  // namespace

extern "C" void pack_float32(const float* weights, float* packed, int64_t inputs, int64_t outputs) {
  pack(weights, packed, inputs, outputs);
}

extern "C" void multiply_float32(const float* input, const Weights* weights, float* out, int64_t rows) {
  multiply(input, *weights, out, rows);
}

extern "C" void find_largest_float32(const float* input, const Weights* weights, int64_t* outputs, int64_t rows) {
  find_largest(input, *weights, outputs, rows);
}

#ifdef __AVX512BF16__
extern "C" void pack_bfloat16(const bf16* weights, float* packed, int64_t inputs, int64_t outputs) {
  pack(weights, packed, inputs, outputs);
}

extern "C" void multiply_bfloat16(const bf16* input, const Weights* weights, bf16* out, int64_t rows) {
  multiply(input, *weights, out, rows);
}

extern "C" void find_largest_bfloat16(const bf16* input, const Weights* weights, int64_t* outputs, int64_t rows) {
  find_largest(input, *weights, outputs, rows);
}
#endif
