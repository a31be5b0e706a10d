// Low-rank adapters of a step's tokens, for processors: each row has the adapter of its sample.
//
// An adapter's first matrices, of all layers that read the same tensor, are one packed product; the second matrix of
// each layer is another. Few rows wait for these weights, so every thread reads a part of them: the inputs of the first
// product are divided into slices, and the outputs of the second into pieces. The result of a row depends on that row
// alone.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "products.h"
#include "vectors.h"

namespace {

constexpr int64_t SLICES = 4;
constexpr int64_t PIECE = 16;         // blocks of outputs
constexpr int64_t AHEAD = 16;         // words of a block that are fetched before they are read
constexpr int64_t TOGETHER = 5 * ROWS;  // rows that are computed while a block of weights is in the cache

inline int64_t blocks_of(const Weights& weights) { return (weights.outputs + COLUMNS - 1) / COLUMNS; }

template <typename T>
class LowRankProducts {
 public:
  LowRankProducts(const T* input, T* product, int64_t rows, int64_t inputs, int64_t columns, const Adapter* adapters,
                  const int32_t* adapter)
      : product(product), rows(rows), columns(columns), words((inputs + PER<T> - 1) / PER<T>) {
    static thread_local std::vector<const float*> starts;
    static thread_local std::vector<float> copies, buffer;
    starts.resize(rows);
    if (PER<T> * sizeof(T) != sizeof(float) || inputs % PER<T>) copies.resize(rows * words);
    for (int64_t r = 0; r < rows; r++)
      starts[r] = words_of(input + r * inputs, inputs, words, copies.data() + r * words);
    from = starts.data();
    for (int64_t row = 0; row < rows; row++) {
      const Adapter& own = adapters[adapter[row]];
      if (own.count == 0) continue;
      const bool joins = runs.size() && runs.back().last == row && runs.back().adapter == &own &&
                         row - runs.back().first < TOGETHER;
      if (joins) runs.back().last++;
      else runs.push_back({&own, row, row + 1});
      ranks = std::max(ranks, blocks_of(*own.down) * COLUMNS);
    }
    for (const Run& run : runs)
      for (int64_t i = 0; i < run.adapter->count; i++)
        for (int64_t b = 0; b < blocks_of(*run.adapter->layers[i].up); b += PIECE)
          pieces.push_back({&run, &run.adapter->layers[i], b});
    buffer.resize(SLICES * rows * ranks);
    low = buffer.data();
  }

  void add() const {
    if (runs.empty()) return;
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (size_t i = 0; i < runs.size() * SLICES; i++) multiply_down(runs[i / SLICES], i % SLICES);
#pragma omp for schedule(static)
      for (size_t i = 0; i < pieces.size(); i++) add_up(pieces[i]);
    }
  }

 private:
  struct Run {  // rows of one adapter
    const Adapter* adapter;
    int64_t first, last;
  };
  struct Piece {  // outputs of a layer from a block on
    const Run* run;
    const LowRank* layer;
    int64_t block;
  };
  T* const product;
  const int64_t rows, columns, words;
  const float* const* from;  // words of each row
  std::vector<Run> runs;
  std::vector<Piece> pieces;
  int64_t ranks = 0;
  float* low;  // [SLICES, rows, ranks]

  // Calls use(first, last) with some rows of a run, as many as are multiplied together.
  template <typename Use>
  static void by_tile(const Run& run, const Use& use) {
    const int64_t rows = run.last - run.first, tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t t = 0; t < tiles; t++) use(run.first + rows * t / tiles, run.first + rows * (t + 1) / tiles);
  }

  void multiply_down(const Run& run, int64_t slice) const {
    const Weights& down = *run.adapter->down;
    const int64_t begin = words * slice / SLICES, count = words * (slice + 1) / SLICES - begin;
    for (int64_t b = 0; b < blocks_of(down); b++) {
      const float* packed = down.packed + (b * words + begin) * COLUMNS;
      by_tile(run, [&](int64_t first, int64_t last) {
        const float* starts[ROWS];
        float* to[ROWS];
        for (int64_t r = first; r < last; r++) {
          starts[r - first] = from[r] + begin;
          to[r - first] = low + (slice * rows + r) * ranks + b * COLUMNS;
        }
        add_products<T>(starts, last - first, {packed, packed + AHEAD * COLUMNS, count, COLUMNS, 2}, ZEROS, to);
      });
    }
  }

  void add_up(const Piece& piece) const {
    thread_local std::vector<float> buffer;
    const Run& run = *piece.run;
    const LowRank& layer = *piece.layer;
    const int64_t count = (layer.up->inputs + PER<T> - 1) / PER<T>, blocks = blocks_of(*layer.up);
    const int64_t padded = (layer.up->inputs + COLUMNS - 1) / COLUMNS * COLUMNS;
    buffer.resize(TOGETHER * padded);
    for (int64_t r = run.first; r < run.last; r++) put_low(layer, r, padded, &buffer[(r - run.first) * padded]);
    for (int64_t b = piece.block; b < std::min(piece.block + PIECE, blocks); b++) {
      const float* packed = layer.up->packed + b * count * COLUMNS;
      const int64_t column = b * COLUMNS, width = std::min<int64_t>(COLUMNS, layer.up->outputs - column);
      by_tile(run, [&](int64_t first, int64_t last) {
        const float* starts[ROWS];
        float sums[ROWS][COLUMNS], *to[ROWS];
        for (int64_t r = first; r < last; r++) {
          starts[r - first] = &buffer[(r - run.first) * padded];
          to[r - first] = sums[r - first];
        }
        add_products<T>(starts, last - first, {packed, packed + AHEAD * COLUMNS, count, COLUMNS, 2}, ZEROS, to);
        for (int64_t r = first; r < last; r++)
          add_scaled(product + r * columns + layer.first + column, sums[r - first], layer.scale, width);
      });
    }
  }

  // The words of a row's product with the first matrix of a layer.
  void put_low(const LowRank& layer, int64_t row, int64_t padded, float* to) const {
    const float* own = low + row * ranks + layer.first_rank;
    std::fill(to, to + padded, 0.f);
    for (int64_t slice = 0; slice < SLICES; slice++)
      for (int64_t i = 0; i < layer.up->inputs; i++) to[i] += own[slice * rows * ranks + i];
    for (int64_t i = 0; i < padded; i += COLUMNS) to_words<T>(to + i, to + i / PER<T>);
  }

  static void add_scaled(T* __restrict to, const float* __restrict x, float scale, int64_t count) {
    for (int64_t i = 0; i < count; i++) store(to + i, to_float(to[i]) + scale * x[i]);
  }
};

}  // namespace

extern "C" void add_low_rank_float32(const float* input, float* product, int64_t rows, int64_t inputs, int64_t columns,
                                     const Adapter* adapters, const int32_t* adapter) {
  LowRankProducts<float>(input, product, rows, inputs, columns, adapters, adapter).add();
}

extern "C" void add_low_rank_bfloat16(const bf16* input, bf16* product, int64_t rows, int64_t inputs, int64_t columns,
                                      const Adapter* adapters, const int32_t* adapter) {
  LowRankProducts<bf16>(input, product, rows, inputs, columns, adapters, adapter).add();
}
