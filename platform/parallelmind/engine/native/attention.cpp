// Attention of a step's tokens over the slots of a paged KV cache, for processors.
//
// A span is a set of queries of one sample and the block tables that they read. A query is in at most one span of
// each level. It has one partial result for each level, as in FlashDecoding; they are merged at the end.
// Within a span the softmax is computed online (Milakov & Gimelshein, "Online normalizer calculation for
// softmax", 2018). Sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int TILE = 64;      // keys that are read together
constexpr int CHUNK = 16;     // queries of one task
constexpr int FEW_ROWS = 8;   // up to here, keys are not transposed
constexpr int MAX_DIM = 1024;
constexpr int VECTORS = TILE / LANES;

struct Task {  // the queries `first` to `last` of a span, and the query heads of one KV head
  int64_t span, first, last;
  int32_t head;
};

// Keys of a tile, with what visibility depends on. Behind the last key there is padding, which nothing sees.
struct Keys {
  int count;
  int32_t slot[TILE], time[TILE], segment[TILE], earliest, latest;
  bool one_segment;

  int vectors() const { return (count + LANES - 1) / LANES; }
};

// Reads the keys of a block table tile by tile.
class Reader {
 public:
  Reader(const Step& step, int64_t table)
      : step(step), blocks(step.blocks + step.tables[table] * step.width),
        ends(step.ends + step.tables[table] * step.width), num_keys(step.num_keys[table]) {}

  // The next keys; none at the end.
  Keys read() {
    Keys keys;
    keys.count = std::min<int64_t>(TILE, num_keys - next);
    if (keys.count == 0) return keys;
    for (int k = 0; k < keys.count;) {
      const int64_t first = block ? ends[block - 1] : 0, last = std::min<int64_t>(ends[block], next + keys.count - k);
      int32_t slot = blocks[block] * step.block + next - first;
      for (; next < last; next++) keys.slot[k++] = slot++;
      if (next == ends[block]) block++;
    }
    const int padded = keys.vectors() * LANES;
    std::fill(keys.slot + keys.count, keys.slot + padded, keys.slot[keys.count - 1]);
    for (int k = 0; k < padded; k++) {
      keys.time[k] = k < keys.count ? step.slot_time[keys.slot[k]] : INT32_MAX;
      keys.segment[k] = step.slot_segment[keys.slot[k]];
    }
    keys.earliest = *std::min_element(keys.time, keys.time + keys.count);
    keys.latest = *std::max_element(keys.time, keys.time + padded);
    keys.one_segment =
        std::all_of(keys.segment, keys.segment + keys.count, [&](int32_t other) { return other == keys.segment[0]; });
    return keys;
  }

 private:
  const Step& step;
  const int32_t *blocks, *ends;
  const int64_t num_keys;
  int64_t next = 0, block = 0;
};

struct Buffers {  // of one thread: words of queries, keys and values, scores, and weights
  std::vector<float> queries, keys, values, scores, weights;
};

template <typename T>
class Attention {
 public:
  Attention(const Step& step, const Layer& layer)
      : step(step), layer(layer), group(layer.heads / layer.kv_heads), width(padded_words<T>(layer.dim)),
        columns((layer.value_dim + LANES - 1) / LANES * LANES), rows(step.tokens * layer.heads) {
    static thread_local std::vector<float> buffer;
    const int64_t parts = step.levels * rows;
    buffer.assign(parts * (columns + 2), 0.f);
    out = buffer.data();
    total = out + parts * columns;
    largest = total + parts;
    std::fill(largest, largest + parts, -INFINITY);
  }

  std::vector<Task> tasks() const {
    std::vector<Task> tasks;
    for (int64_t span = 0; span < step.spans; span++)
      for (int64_t first = step.query_start[span]; first < step.query_start[span + 1]; first += CHUNK)
        for (int32_t head = 0; head < layer.kv_heads; head++)
          tasks.push_back({span, first, std::min<int64_t>(first + CHUNK, step.query_start[span + 1]), head});
    return tasks;
  }

  // Write key and value of a token to the cache.
  void write(int64_t token) const {
    const int64_t slot = step.token_slot[token];
    if (slot < 0) return;
    for (int64_t h = 0; h < layer.kv_heads; h++) {
      std::memcpy((T*)layer.key_pool + (slot * layer.kv_heads + h) * layer.dim,
                  (const T*)layer.key + token * layer.key_token + h * layer.key_head, layer.dim * sizeof(T));
      std::memcpy((T*)layer.value_pool + (slot * layer.kv_heads + h) * layer.value_dim,
                  (const T*)layer.value + token * layer.value_token + h * layer.value_head,
                  layer.value_dim * sizeof(T));
    }
  }

  // The partial results of a task's rows: its queries times the query heads of its KV head.
  void attend(const Task& task) const {
    thread_local Buffers buffers;
    const int64_t count = rows_of(task);
    buffers.queries.resize(count * width);
    buffers.keys.resize(width * TILE);
    buffers.values.resize(TILE * columns);
    buffers.scores.resize(count * TILE);
    buffers.weights.resize(count * TILE);
    for (int64_t r = 0; r < count; r++) {
      const T* query = (const T*)layer.query + query_of(task, r) * layer.query_token + head_of(task, r) * layer.query_head;
      float* to = &buffers.queries[r * width];
      const float* words = words_of(query, layer.dim, width, to);
      if (words != to) std::copy(words, words + width, to);
    }
    for (int64_t table = step.table_start[task.span]; table < step.table_start[task.span + 1]; table++) {
      Reader reader(step, table);
      Keys keys = reader.read(), following;
      while (keys.count) {
        following = reader.read();
        prefetch(task.head, following);
        if (is_seen(task, keys)) attend(task, keys, buffers);
        keys = following;
      }
    }
  }

  // Merge the partial results of a row.
  void finish(int64_t row) const {
    float most = layer.sinks ? layer.sinks[row % layer.heads] : -INFINITY;  // a sink is a key whose value is zero
    for (int64_t part = row; part < step.levels * rows; part += rows) most = std::max(most, largest[part]);
    float sum = layer.sinks ? std::exp(layer.sinks[row % layer.heads] - most) : 0.f;
    float* merged = out + row * columns;  // the result of the first level
    for (int64_t part = row; part < step.levels * rows; part += rows) {
      const float weight = total[part] == 0.f ? 0.f : std::exp(largest[part] - most);
      sum += total[part] * weight;
      for (int d = 0; d < columns; d++)
        merged[d] = part == row ? merged[d] * weight : merged[d] + out[part * columns + d] * weight;
    }
    const float scale = sum == 0.f ? 0.f : 1.f / sum;  // padding sees nothing
    T* to = (T*)layer.out + row * layer.value_dim;
    for (int d = 0; d < layer.value_dim; d++) store(to + d, merged[d] * scale);
  }

 private:
  const Step& step;
  const Layer& layer;
  const int group;          // query heads of one KV head
  const int width;          // words of a query or key
  const int columns;        // floats of an accumulated value
  const int64_t rows;       // of one level
  float *out, *total, *largest;  // [levels, tokens, heads, columns], and twice [levels, tokens, heads]

  int64_t rows_of(const Task& task) const { return (task.last - task.first) * group; }
  int64_t query_of(const Task& task, int64_t row) const { return step.queries[task.first + row / group]; }
  int64_t head_of(const Task& task, int64_t row) const { return task.head * group + row % group; }
  int64_t part_of(const Task& task, int64_t row) const {
    return step.level[task.span] * rows + query_of(task, row) * layer.heads + head_of(task, row);
  }
  const T* key_of(int64_t slot, int head) const {
    return (const T*)layer.key_pool + (slot * layer.kv_heads + head) * layer.dim;
  }
  const T* value_of(int64_t slot, int head) const {
    return (const T*)layer.value_pool + (slot * layer.kv_heads + head) * layer.value_dim;
  }

  void prefetch(int head, const Keys& keys) const {
    for (int k = 0; k < keys.count; k++) {
      const char *key = (const char*)key_of(keys.slot[k], head), *value = (const char*)value_of(keys.slot[k], head);
      for (int64_t at = 0; at < int64_t(layer.dim * sizeof(T)); at += 64) __builtin_prefetch(key + at);
      for (int64_t at = 0; at < int64_t(layer.value_dim * sizeof(T)); at += 64) __builtin_prefetch(value + at);
    }
  }

  bool is_seen(const Task& task, const Keys& keys) const {
    for (int64_t i = task.first; i < task.last; i++)
      if (keys.earliest <= step.token_time[step.queries[i]]) return true;
    return false;
  }

  // The scores of a query by the segment of the key; null if all are 0.
  const float* table(const Task& task, int64_t query) const {
    if (step.score_width[task.span] == 0) return nullptr;
    return step.scores + step.score_start[task.span] + int64_t(step.token_segment[query]) * step.score_width[task.span];
  }

  // Whether every query sees every key, and nothing is added to the scores.
  bool is_plain(const Task& task, const Keys& keys) const {
    const bool is_scored = step.score_width[task.span] != 0;
    if ((is_scored && !keys.one_segment) || step.window || step.chunk) return false;
    for (int64_t i = task.first; i < task.last; i++) {
      const int64_t query = step.queries[i];
      if (keys.latest >= step.token_time[query] || (is_scored && table(task, query)[keys.segment[0]] != 0.f)) return false;
    }
    return true;
  }

  // What is added to the scores of the keys; -infinity where the query does not see the key.
  void add_biases(const Task& task, const Keys& keys, int64_t query, Vec* biases) const {
    const IntVec mine = IntVec{} + step.token_time[query], own = IntVec{} + step.token_slot[query];
    const float* row = table(task, query);
    for (int v = 0; v < keys.vectors(); v++) {
      const IntVec slot = *(const IntVec*)(keys.slot + v * LANES), time = *(const IntVec*)(keys.time + v * LANES);
      IntVec visible = (time < mine) | ((slot == own) & (time == mine));
      if (step.window) visible &= mine - time < IntVec{} + int32_t(step.window);
      if (step.chunk) visible &= time >= mine - mine % int32_t(step.chunk);
      Vec score = {};
      if (row)
        for (int i = 0; i < LANES; i++) score[i] = row[keys.segment[v * LANES + i]];
      biases[v] = visible ? score : splat(-INFINITY);
    }
  }

  void attend(const Task& task, const Keys& keys, Buffers& buffers) const {
    score(task, keys, buffers);
    const bool plain = is_plain(task, keys);
    Vec biases[VECTORS];
    for (int64_t r = 0; r < rows_of(task); r++) {
      if (!plain && r % group == 0) add_biases(task, keys, query_of(task, r), biases);
      weigh(&buffers.scores[r * TILE], plain ? nullptr : biases, keys.vectors(), part_of(task, r),
            &buffers.weights[r * TILE]);
    }
    load_values(task, keys, buffers.values.data());
    accumulate(task, (keys.count + PER<T> - 1) / PER<T>, buffers);
  }

  // scores[row, key] = query . key
  void score(const Task& task, const Keys& keys, Buffers& buffers) const {
    const int64_t count = rows_of(task);
    if (count > FEW_ROWS) return score_many(task, keys, buffers);
    alignas(64) float copy[MAX_DIM];
    for (int k = 0; k < keys.vectors() * LANES; k++) {
      const float* key = words_of(key_of(keys.slot[k], task.head), layer.dim, width, copy);
      for (int64_t r = 0; r < count; r++) buffers.scores[r * TILE + k] = dot(&buffers.queries[r * width], key);
    }
  }

  void score_many(const Task& task, const Keys& keys, Buffers& buffers) const {
    const int64_t count = rows_of(task);
    alignas(64) float copies[LANES][MAX_DIM];
    for (int k = 0; k < keys.vectors() * LANES; k += LANES) {
      const float* rows[LANES];
      for (int i = 0; i < LANES; i++)
        rows[i] = words_of(key_of(keys.slot[k + i], task.head), layer.dim, width, copies[i]);
      for (int w = 0; w < width; w += LANES) {
        Vec block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = load(rows[i] + w);
        transpose(block);
        for (int i = 0; i < LANES; i++) put(&buffers.keys[(w + i) * TILE + k], block[i]);
      }
    }
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) score_rows<6>(&buffers.queries[r * width], buffers, r);
    for (; r < count; r++) score_rows<1>(&buffers.queries[r * width], buffers, r);
  }

  float dot(const float* query, const float* key) const {
    Vec sums = {};
    for (int w = 0; w < width; w += LANES) sums = multiply_add<T>(sums, load(query + w), load(key + w));
    return sum(sums);
  }

  template <int ROWS>
  void score_rows(const float* query, Buffers& buffers, int64_t row) const {
    Vec sums[ROWS][VECTORS] = {};
    for (int w = 0; w < width; w++) {
      Vec key[VECTORS];
      for (int v = 0; v < VECTORS; v++) key[v] = load(&buffers.keys[w * TILE + v * LANES]);
      for (int r = 0; r < ROWS; r++) {
        const Vec word = splat(query[r * width + w]);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add<T>(sums[r][v], word, key[v]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) put(&buffers.scores[(row + r) * TILE + v * LANES], sums[r][v]);
  }

  // Turn scores into weights, relative to the largest score so far, and rescale what the part has accumulated.
  void weigh(float* scores, const Vec* biases, int vectors, int64_t part, float* weights) const {
    Vec most = splat(-INFINITY);
    for (int v = 0; v < vectors; v++) {
      Vec s = load(scores + v * LANES) * layer.scale;
      if (layer.softcap != 0.f)
        for (int i = 0; i < LANES; i++) s[i] = layer.softcap * std::tanh(s[i] / layer.softcap);
      if (biases) s = biases[v] > splat(-INFINITY) ? s + biases[v] : splat(-INFINITY);
      put(scores + v * LANES, s);
      most = larger(s, most);
    }
    const float old = largest[part], next = std::max(old, largest_of(most));
    const float base = next == -INFINITY ? 0.f : next;
    Vec sums = {};
    for (int v = 0; v < vectors; v++) {
      const Vec weight = exp_negative(load(scores + v * LANES) - base);  // NaN of NaN
      put(scores + v * LANES, weight);
      sums += weight;
    }
    for (int v = vectors; v < VECTORS; v++) put(scores + v * LANES, splat(0.f));
    for (int k = 0; k < TILE; k += 2 * LANES) to_words<T>(scores + k, weights + k / PER<T>);
    if (next > old) {
      const float shrink = old == -INFINITY ? 0.f : std::exp(old - next);
      total[part] *= shrink;
      for (int d = 0; d < columns; d += LANES) put(out + part * columns + d, load(out + part * columns + d) * shrink);
      largest[part] = next;
    }
    total[part] += sum(sums);
  }

  void load_values(const Task& task, const Keys& keys, float* values) const {
    for (int k = 0; k < keys.count; k += PER<T>) {
      const T *even = value_of(keys.slot[k], task.head),
              *odd = value_of(keys.slot[std::min(k + 1, keys.count - 1)], task.head);
      interleave(even, odd, layer.value_dim, columns, values + k / PER<T> * columns);
    }
  }

  // out[row] += weights[row] * values
  void accumulate(const Task& task, int words, Buffers& buffers) const {
    const int64_t count = rows_of(task);
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) accumulate_rows<6>(task, r, words, buffers);
    for (; r + 3 <= count; r += 3) accumulate_rows<3>(task, r, words, buffers);
    for (; r < count; r++) accumulate_rows<1>(task, r, words, buffers);
  }

  template <int ROWS>
  void accumulate_rows(const Task& task, int64_t row, int words, Buffers& buffers) const {
    float* to[ROWS];
    for (int r = 0; r < ROWS; r++) to[r] = out + part_of(task, row + r) * columns;
    int d = 0;
    for (; d + 4 * LANES <= columns; d += 4 * LANES)
      accumulate_columns<ROWS, 4>(to, d, &buffers.weights[row * TILE], buffers.values.data(), words);
    for (; d < columns; d += LANES)
      accumulate_columns<ROWS, 1>(to, d, &buffers.weights[row * TILE], buffers.values.data(), words);
  }

  template <int ROWS, int VECS>
  void accumulate_columns(float* const* to, int first, const float* weights, const float* values, int words) const {
    Vec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) sums[r][v] = load(to[r] + first + v * LANES);
    for (int w = 0; w < words; w++) {
      Vec value[VECS];
      for (int v = 0; v < VECS; v++) value[v] = load(values + w * columns + first + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Vec weight = splat(weights[r * TILE + w]);
        for (int v = 0; v < VECS; v++) sums[r][v] = multiply_add<T>(sums[r][v], weight, value[v]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) put(to[r] + first + v * LANES, sums[r][v]);
  }
};

template <typename T>
void run(const Step& step, const Layer& layer) {
  const Attention<T> attention(step, layer);
  const std::vector<Task> tasks = attention.tasks();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.tokens; token++) attention.write(token);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) attention.attend(tasks[i]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step.tokens * layer.heads; row++) attention.finish(row);
  }
}

}  // namespace

extern "C" void attend_float32(const Step* step, const Layer* layer) { run<float>(*step, *layer); }
extern "C" void attend_bfloat16(const Step* step, const Layer* layer) { run<bf16>(*step, *layer); }
