// Rows of queries as lanes of vectors: their softmax needs no sums within a vector, and keys are read where they lie.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

constexpr int TILE = 64;        // keys that are read together
constexpr int MAX_VECTORS = 3;  // of rows
#ifdef __AVX512F__
constexpr int SUMS = 24;  // vectors that fit the registers, beside those that are multiplied
#else
constexpr int SUMS = 6;
#endif

// How many keys, or numbers of a value, are multiplied together with some vectors of rows.
constexpr int together(int vectors, int most = LANES) {
  return most * vectors <= SUMS ? most : together(vectors, most / 2);
}

// to[i][v] += word(i, w) * factors[w][v], of all words.
template <typename T, int COUNT, int VECTORS, typename Word>
inline void add_lane_products(const Word& word, const float* factors, int64_t words, float* to) {
  Vec sums[COUNT][VECTORS];
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = load(to + (i * VECTORS + v) * LANES);
  for (int64_t w = 0; w < words; w++, factors += VECTORS * LANES) {
    Vec factor[VECTORS];
    for (int v = 0; v < VECTORS; v++) factor[v] = load(factors + v * LANES);
    for (int i = 0; i < COUNT; i++) {
      const Vec x = splat(word(i, w));
      for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add<T>(sums[i][v], x, factor[v]);
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) put(to + (i * VECTORS + v) * LANES, sums[i][v]);
}

// Up to 16 * VECTORS rows, and what they have accumulated.
template <typename T, int VECTORS>
class LaneRows {
 public:
  const int count;  // of rows

  static int64_t size(int width, int columns) { return int64_t(width + columns + 2) * VECTORS * LANES; }  // floats

  // width, columns: words of a query, and floats of a value. rows: words of each row. queries: the query of each row
  // among those of its task, which are 16 at most. factors: of the biases of each row.
  LaneRows(float* buffer, int width, int columns, const float* const* rows, const int32_t* queries,
           const float* factors, int count)
      : count(count), width(width), columns(columns), rows(buffer), out(buffer + width * VECTORS * LANES),
        total(out + columns * VECTORS * LANES), largest(total + VECTORS * LANES) {
    for (int v = 0; v < VECTORS; v++) {
      query[v] = *(const IntVec*)(queries + v * LANES);
      factor[v] = load(factors + v * LANES);
      for (int w = 0; w < width; w += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = v * LANES + i < count ? load(rows[v * LANES + i] + w) : Vec{};
        transpose(block);
        for (int i = 0; i < LANES; i++) put(this->rows + ((w + i) * VECTORS + v) * LANES, block[i]);
      }
    }
    std::fill(out, largest, 0.f);
    std::fill(largest, largest + VECTORS * LANES, -INFINITY);
  }

  // keys: words of `count` keys, and of more up to a multiple of 16. biases: what is added to the scores of each key,
  // by query; null if nothing is. values: [count / PER<T>, columns] words. softcap: 0 for none.
  void attend(const float* const* keys, int count, const Vec* biases, const float* values, float scale, float softcap) {
    alignas(64) float scores[TILE * VECTORS * LANES];
    const int padded = (count + LANES - 1) / LANES * LANES;
    std::fill(scores, scores + padded * VECTORS * LANES, 0.f);
    for (int k = 0; k < padded; k += AT_ONCE)
      add_lane_products<T, AT_ONCE, VECTORS>([&](int i, int64_t w) { return keys[k + i][w]; }, rows, width,
                                             scores + k * VECTORS * LANES);
    for (int i = 0; i < padded * VECTORS * LANES && softcap != 0.f; i++)
      scores[i] = softcap * std::tanh(scores[i] * scale / softcap);
    weigh(scores, padded, biases, softcap == 0.f ? scale : 1.f);
    for (int d = 0; d < columns; d += AT_ONCE)
      add_lane_products<T, AT_ONCE, VECTORS>([&](int i, int64_t w) { return values[w * columns + d + i]; }, scores,
                                             (count + PER<T> - 1) / PER<T>, out + d * VECTORS * LANES);
  }

  // to: [count, columns], and [count] each.
  void finish(float* to, float* to_total, float* to_largest) const {
    std::copy(total, total + count, to_total);
    std::copy(largest, largest + count, to_largest);
    for (int v = 0; v < VECTORS; v++)
      for (int d = 0; d < columns; d += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load(out + ((d + i) * VECTORS + v) * LANES);
        transpose(block);
        for (int i = 0; i < LANES && v * LANES + i < count; i++) put(to + (v * LANES + i) * columns + d, block[i]);
      }
  }

 private:
  static constexpr int AT_ONCE = together(VECTORS);
  const int width, columns;
  float *rows, *out, *total, *largest;  // [width, VECTORS], [columns, VECTORS], and twice [VECTORS] vectors
  IntVec query[VECTORS];
  Vec factor[VECTORS];

  // Turn scores into words of weights, and rescale what the rows have accumulated.
  void weigh(float* scores, int count, const Vec* biases, float scale) {
    Vec next[VECTORS], base[VECTORS], sums[VECTORS] = {};
    for (int v = 0; v < VECTORS; v++) next[v] = load(largest + v * LANES);
    for (int k = 0; k < count; k++)
      for (int v = 0; v < VECTORS; v++) {
        float* at = scores + (k * VECTORS + v) * LANES;
        Vec score = load(at) * scale;
        if (biases) score = biased(score, permuted(biases[k], query[v]), factor[v]);
        put(at, score);
        next[v] = larger(score, next[v]);
      }
    for (int v = 0; v < VECTORS; v++) base[v] = next[v] == splat(-INFINITY) ? splat(0.f) : next[v];
    for (int k = 0; k < count; k += 2)
      for (int v = 0; v < VECTORS; v++) {
        const float* from = scores + (k * VECTORS + v) * LANES;
        const Vec even = exp_negative(load(from) - base[v]), odd = exp_negative(load(from + VECTORS * LANES) - base[v]);
        sums[v] += even + odd;
        put_pairs<T>(even, odd, scores + (k / PER<T> * VECTORS + v) * LANES, VECTORS * LANES);
      }
    for (int v = 0; v < VECTORS; v++) add(v, next[v], base[v], sums[v]);
  }

  // Add the weights of a tile to the totals of a vector of rows, relative to a score that may be larger than before.
  void add(int v, Vec next, Vec base, Vec sum) {
    const Vec old = load(largest + v * LANES), shrink = next > old ? exp_negative(old - base) : splat(1.f);
    put(total + v * LANES, load(total + v * LANES) * shrink + sum);
    put(largest + v * LANES, next);
    if (!any(next > old)) return;
    for (int d = 0; d < columns; d++) {
      float* to = out + (d * VECTORS + v) * LANES;
      put(to, load(to) * shrink);
    }
  }
};
