// Products of a step's tokens with the weights of linear layers, for processors.
//
// Packed weights are blocks of 32 outputs, and a block is a row of 32 words for each word of the input. A thread reads
// its blocks in the order in which they lie in memory. While it computes with one block it fetches the next, because a
// step of few tokens takes as long as reading the weights. Sums are float32, and the result of a row depends on that
// row alone, not on how many others there are.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int OUTPUTS = 2 * LANES;  // of a block
#ifdef __AVX512F__
constexpr int ROWS = 12;  // whose sums fit the registers, with the weights that they are multiplied with
#else
constexpr int ROWS = 3;
#endif

struct Sums {
  Vec of[2];
};

// Of one block: its weights, its biases or null, and what is read next: `lines` cache lines for each word.
struct Block {
  const float *weights, *bias, *next;
  int64_t words, lines;
};

template <typename T, int COUNT>
void multiply_rows(const float* const* rows, const Block& block, Sums* out) {
  Sums sums[COUNT];
  for (int r = 0; r < COUNT; r++)
    for (int i = 0; i < 2; i++) sums[r].of[i] = block.bias ? load(block.bias + i * LANES) : Vec{};
  const float* next = block.next;
  for (int64_t w = 0; w < block.words; w++, next += block.lines * LANES) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + LANES);
    const Vec left = load(block.weights + w * OUTPUTS), right = load(block.weights + w * OUTPUTS + LANES);
    for (int r = 0; r < COUNT; r++) {
      const Vec word = splat(rows[r][w]);
      sums[r].of[0] = multiply_add<T>(sums[r].of[0], word, left);
      sums[r].of[1] = multiply_add<T>(sums[r].of[1], word, right);
    }
  }
  std::copy(sums, sums + COUNT, out);
}

using MultiplyRows = void (*)(const float* const*, const Block&, Sums*);

template <typename T, size_t... I>
constexpr std::array<MultiplyRows, ROWS> by_count(std::index_sequence<I...>) {
  return {multiply_rows<T, I + 1>...};
}

template <typename T>
void put_row(const Sums& sums, T* to, int64_t count) {
  float row[OUTPUTS];
  to_words<T>((const float*)sums.of, row);
  std::memcpy(to, row, count * sizeof(T));
}

// out[row, output] = input[row] . weights[output] + bias[output]
template <typename T>
void multiply(const T* input, const Weights& weights, T* out, int64_t rows) {
  constexpr auto multiply_count = by_count<T>(std::make_index_sequence<ROWS>());
  static thread_local std::vector<const float*> starts;
  static thread_local std::vector<float> copies;
  const int64_t words = (weights.inputs + PER<T> - 1) / PER<T>, blocks = (weights.outputs + OUTPUTS - 1) / OUTPUTS;
  const int64_t tiles = (rows + ROWS - 1) / ROWS, readers = std::min<int64_t>(tiles, 2);  // tiles that fetch ahead
  starts.resize(rows);
  copies.resize(weights.inputs % PER<T> ? rows * words : 0);
  for (int64_t r = 0; r < rows; r++)
    starts[r] = words_of(input + r * weights.inputs, weights.inputs, words, copies.data() + r * words);
  const float* const* from = starts.data();
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    const float *first = weights.packed + b * words * OUTPUTS, *next = first + words * OUTPUTS;
    const int64_t width = std::min<int64_t>(OUTPUTS, weights.outputs - b * OUTPUTS);
    Sums sums[ROWS];
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles, lines = t < readers ? 2 / readers : 0;
      const Block block = {first, weights.bias ? weights.bias + b * OUTPUTS : nullptr, next, words, lines};
      multiply_count[end - begin - 1](from + begin, block, sums);
      next += words * lines * LANES;
      for (int64_t r = begin; r < end; r++) put_row(sums[r - begin], out + r * weights.outputs + b * OUTPUTS, width);
    }
  }
}

// Rows of numbers side by side as the words of one number, or of two, from each.
template <typename T>
void pack(const T* weights, float* packed, int64_t inputs, int64_t outputs) {
  const int64_t words = (inputs + PER<T> - 1) / PER<T>, blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    std::vector<float> copy(words);
    for (int64_t i = 0; i < OUTPUTS; i++) {
      const int64_t output = b * OUTPUTS + i;
      const float* row = output < outputs ? words_of(weights + output * inputs, inputs, words, copy.data()) : nullptr;
      for (int64_t w = 0; w < words; w++) put_word(packed + (b * words + w) * OUTPUTS + i, row ? row[w] : 0.f);
    }
  }
}

}  // namespace

extern "C" void pack_float32(const float* weights, float* packed, int64_t inputs, int64_t outputs) {
  pack(weights, packed, inputs, outputs);
}

extern "C" void multiply_float32(const float* input, const Weights* weights, float* out, int64_t rows) {
  multiply(input, *weights, out, rows);
}

#ifdef __AVX512BF16__
extern "C" void pack_bfloat16(const bf16* weights, float* packed, int64_t inputs, int64_t outputs) {
  pack(weights, packed, inputs, outputs);
}

extern "C" void multiply_bfloat16(const bf16* input, const Weights* weights, bf16* out, int64_t rows) {
  multiply(input, *weights, out, rows);
}
#endif
