// Products of rows of words with a block of 32 columns.

#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "vectors.h"

constexpr int COLUMNS = 2 * LANES;  // of a block
#ifdef __AVX512F__
constexpr int ROWS = 12;  // whose sums fit the registers, beside the block's words
#else
constexpr int ROWS = 3;
#endif

// Word w of a block begins at `words + w * stride`. While it is read, `lines` cache lines for each of its words are
// fetched from `next` on.
struct Block {
  const float *words, *next;
  int64_t count, stride, lines;
};

// sums[row] = start + rows[row] . block; without a start, sums[row] += rows[row] . block.
template <typename T, int COUNT>
void add_products(const float* const* rows, const Block& block, const float* start, float* const* sums) {
  Vec left[COUNT], right[COUNT];
  for (int r = 0; r < COUNT; r++) {
    const float* from = start ? start : sums[r];
    left[r] = load(from), right[r] = load(from + LANES);
  }
  const float *word = block.words, *next = block.next;
  for (int64_t w = 0; w < block.count; w++, word += block.stride, next += block.lines * LANES) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + LANES);
    const Vec low = load(word), high = load(word + LANES);
    for (int r = 0; r < COUNT; r++) {
      const Vec factor = splat(rows[r][w]);
      left[r] = multiply_add<T>(left[r], factor, low);
      right[r] = multiply_add<T>(right[r], factor, high);
    }
  }
  for (int r = 0; r < COUNT; r++) put(sums[r], left[r]), put(sums[r] + LANES, right[r]);
}

using AddProducts = void (*)(const float* const*, const Block&, const float*, float* const*);

template <typename T, size_t... I>
constexpr std::array<AddProducts, ROWS> by_count(std::index_sequence<I...>) {
  return {add_products<T, I + 1>...};
}

// The same for `count` rows, of which there are ROWS at most.
template <typename T>
inline void add_products(const float* const* rows, int64_t count, const Block& block, const float* start,
                         float* const* sums) {
  static constexpr auto functions = by_count<T>(std::make_index_sequence<ROWS>());
  functions[count - 1](rows, block, start, sums);
}

constexpr float ZEROS[COLUMNS] = {};
