// Attention of a step's tokens over the slots of a paged KV cache, for processors.
//
// A span is a set of queries and a set of keys of one sample. Spans are grouped by level; the spans of one level
// share no query. A query has one partial result for each level, as in FlashDecoding; they are merged at the end.
// Within a span the softmax is computed online (Milakov & Gimelshein, "Online normalizer calculation for
// softmax", 2018). Products and sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace {

constexpr int LANES = 16;               // floats of one vector
constexpr int TILE = 64;                // keys that are read together
constexpr int CHUNK = 16;               // queries of one task
constexpr int FEW_ROWS = 8;             // up to here, keys are not transposed
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), aligned(4)));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec load(const float* p) { return *(const Vec*)p; }
inline void put(float* p, Vec x) { *(Vec*)p = x; }
inline float sum(Vec x) { float s = 0; for (int i = 0; i < LANES; i++) s += x[i]; return s; }
inline float top(Vec x) { float m = x[0]; for (int i = 1; i < LANES; i++) m = std::max(m, x[i]); return m; }

// exp(x) for x <= 0, relative error below 2e-7; 0 below -87.
inline Vec exp_negative(Vec x) {
  Vec z = x < splat(-87.f) ? splat(-87.f) : x;
  Vec n = z * 1.44269504088896341f;
  IntVec k = __builtin_convertvector(n - splat(0.5f), IntVec);  // n <= 0: truncation towards zero of n - 1/2 rounds
  Vec f = __builtin_convertvector(k, Vec);
  Vec r = z - f * 0.693359375f + f * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  IntVec e = (k + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &e, sizeof scale);
  return x < splat(-87.f) ? splat(0.f) : p * scale;
}

}  // namespace

extern "C" {

struct Step {  // arrays of one step; the same for all layers with one attention window
  int64_t tokens, spans, levels;
  const int32_t *token_slot, *token_time, *token_segment;              // [tokens]
  const int32_t *level_start;                                          // [levels + 1] first span of each level
  const int32_t *query_start, *queries;                                // [spans + 1], and tokens
  const int32_t *key_start, *key_slot, *key_time, *key_segment;        // [spans + 1], and [keys]
  const int64_t *score_start;                                          // [spans] first entry of the span's table
  const int32_t *score_width;                                          // [spans] segments of the sample
  const float* scores;                                                 // [segments, segments] of every sample
  int64_t window, chunk;                                               // 0: none
};

struct Layer {
  int64_t heads, kv_heads, dim, value_dim;
  const void* query; int64_t query_token, query_head;                  // strides in elements
  const void* key; int64_t key_token, key_head;
  const void* value; int64_t value_token, value_head;
  void *key_pool, *value_pool;                                         // [slots, kv_heads, dim]
  void* out;                                                           // [tokens, heads, value_dim]
  float scale, softcap;                                                // softcap 0: none
  const float* sinks;                                                  // [heads], or null
};

}

namespace {

template <typename T>
struct Attention {
  const Step& step;
  const Layer& layer;
  const int group = layer.heads / layer.kv_heads;
  const int padded = (layer.value_dim + LANES - 1) / LANES * LANES;
  const int width = (layer.dim + LANES - 1) / LANES * LANES;
  float *out, *largest, *total;                // [levels, tokens, heads, padded], [levels, tokens, heads]

  int64_t rows_of_level() const { return step.tokens * layer.heads; }

  void write(int64_t token) const {
    const int64_t slot = step.token_slot[token];
    if (slot < 0) return;  // padding
    for (int h = 0; h < layer.kv_heads; h++) {
      std::memcpy((T*)layer.key_pool + (slot * layer.kv_heads + h) * layer.dim,
                  (const T*)layer.key + token * layer.key_token + h * layer.key_head, layer.dim * sizeof(T));
      std::memcpy((T*)layer.value_pool + (slot * layer.kv_heads + h) * layer.value_dim,
                  (const T*)layer.value + token * layer.value_token + h * layer.value_head,
                  layer.value_dim * sizeof(T));
    }
  }

  // What is added to the scores of 16 keys; -infinity where the query does not see the key.
  inline Vec bias(int64_t span, int64_t token, const int32_t* slot, const int32_t* time, const int32_t* segment) const {
    const IntVec s = *(const IntVec*)slot, t = *(const IntVec*)time;
    const IntVec mine = IntVec{} + step.token_time[token];
    IntVec visible = (t < mine) | (s == IntVec{} + step.token_slot[token]);
    if (step.window) visible &= mine - t < IntVec{} + int32_t(step.window);
    if (step.chunk) visible &= t >= mine - mine % int32_t(step.chunk);
    const float* row = step.scores + step.score_start[span] + int64_t(step.token_segment[token]) * step.score_width[span];
    Vec score;
    for (int i = 0; i < LANES; i++) score[i] = row[segment[i]];
    return visible ? score : splat(-INFINITY);
  }

  void attend(int64_t span, int64_t level, int head, int64_t first, int64_t last) const {
    const int64_t rows = (last - first) * group;
    const int32_t* queries = step.queries + first;
    thread_local std::vector<float> q, keys, values, scores;
    q.assign(rows * width, 0.f); keys.resize(width * TILE); values.resize(TILE * padded); scores.resize(rows * TILE);
    for (int64_t r = 0; r < rows; r++) {
      const T* from = (const T*)layer.query + queries[r / group] * layer.query_token + (head * group + r % group) * layer.query_head;
      for (int d = 0; d < layer.dim; d++) q[r * width + d] = to_float(from[d]) * layer.scale;
    }
    const bool transpose = rows > FEW_ROWS;
    for (int64_t k = step.key_start[span]; k < step.key_start[span + 1]; k += TILE) {
      const int count = std::min<int64_t>(TILE, step.key_start[span + 1] - k);
      prefetch(head, k + TILE, std::min<int64_t>(k + 2 * TILE, step.key_start[span + 1]));
      tile(span, level, head, queries, rows, k, count, transpose, q.data(), keys.data(), values.data(), scores.data());
    }
  }

  // Bring keys and values of the next tile into the processor's cache.
  void prefetch(int head, int64_t first, int64_t last) const {
    for (int64_t k = first; k < last; k++) {
      const int64_t row = int64_t(step.key_slot[k]) * layer.kv_heads + head;
      const char *key = (const char*)((const T*)layer.key_pool + row * layer.dim),
                 *value = (const char*)((const T*)layer.value_pool + row * layer.value_dim);
      for (int64_t at = 0; at < int64_t(layer.dim * sizeof(T)); at += 64) __builtin_prefetch(key + at);
      for (int64_t at = 0; at < int64_t(layer.value_dim * sizeof(T)); at += 64) __builtin_prefetch(value + at);
    }
  }

  void tile(int64_t span, int64_t level, int head, const int32_t* queries, int64_t rows, int64_t first, int count, bool transpose,
            const float* q, float* keys, float* values, float* scores) const {
    int32_t slot[TILE], time[TILE], segment[TILE];
    int32_t latest = INT32_MIN, earliest = INT32_MAX; bool uniform = true;
    for (int k = 0; k < TILE; k++) {
      const int64_t at = first + std::min(k, count - 1);
      slot[k] = step.key_slot[at]; time[k] = k < count ? step.key_time[at] : INT32_MAX; segment[k] = step.key_segment[at];
      if (k >= count) slot[k] = -1;
      latest = std::max(latest, time[k]);
      earliest = std::min(earliest, time[k]);
      uniform &= segment[k] == segment[0];
    }
    const int vectors = (count + LANES - 1) / LANES;
    bool any = false, plain = uniform && count == TILE && !step.window && !step.chunk;
    for (int64_t i = 0; i < rows / group; i++) {
      const int64_t token = queries[i];
      any |= earliest <= step.token_time[token];
      plain &= latest < step.token_time[token] &&
        step.scores[step.score_start[span] + int64_t(step.token_segment[token]) * step.score_width[span] + segment[0]] == 0.f;
    }
    if (!any) return;
    if (transpose) {
      for (int k = 0; k < vectors * LANES; k++) {
        const T* from = (const T*)layer.key_pool + (int64_t(k < count ? slot[k] : slot[0]) * layer.kv_heads + head) * layer.dim;
        for (int d = 0; d < layer.dim; d++) keys[d * TILE + k] = to_float(from[d]);
      }
      multiply_transposed(q, keys, rows, vectors, scores);
    } else {
      for (int k = 0; k < vectors * LANES; k++) {
        const T* from = (const T*)layer.key_pool + (int64_t(k < count ? slot[k] : slot[0]) * layer.kv_heads + head) * layer.dim;
        dot(q, from, rows, scores + k);
      }
    }
    for (int k = 0; k < count; k++) {
      const T* from = (const T*)layer.value_pool + (int64_t(slot[k]) * layer.kv_heads + head) * layer.value_dim;
      for (int d = 0; d < layer.value_dim; d++) values[k * padded + d] = to_float(from[d]);
      for (int d = layer.value_dim; d < padded; d++) values[k * padded + d] = 0;
    }
    for (int64_t i = 0; i < rows / group; i++) {
      Vec biases[TILE / LANES];
      if (!plain)
        for (int v = 0; v < vectors; v++)
          biases[v] = bias(span, queries[i], slot + v * LANES, time + v * LANES, segment + v * LANES);
      for (int g = 0; g < group; g++)
        normalize(scores + (i * group + g) * TILE, plain ? nullptr : biases, vectors,
                  level * rows_of_level() + queries[i] * layer.heads + head * group + g);
    }
    accumulate(level, queries, head, rows, count, scores, values);
  }

  // scores[row] = q[row] . key for the rows of few queries
  void dot(const float* q, const T* key, int64_t rows, float* scores) const {
    float wide[1024];
    for (int d = 0; d < layer.dim; d++) wide[d] = to_float(key[d]);
    for (int d = layer.dim; d < width; d++) wide[d] = 0;
    for (int64_t r = 0; r < rows; r++) {
      Vec acc = {};
      for (int d = 0; d < width; d += LANES) acc += load(q + r * width + d) * load(wide + d);
      scores[r * TILE] = sum(acc);
    }
  }

  template <int ROWS, int VECS>
  inline void block(const float* q, const float* keys, float* scores) const {
    Vec acc[ROWS][VECS] = {};
    for (int d = 0; d < layer.dim; d++) {
      Vec k[VECS];
      for (int v = 0; v < VECS; v++) k[v] = load(keys + d * TILE + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Vec x = splat(q[r * width + d]);
        for (int v = 0; v < VECS; v++) acc[r][v] += x * k[v];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) put(scores + r * TILE + v * LANES, acc[r][v]);
  }

  void multiply_transposed(const float* q, const float* keys, int64_t rows, int vectors, float* scores) const {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
      for (int v = 0; v < vectors; v += 4) block<6, 4>(q + r * width, keys + v * LANES, scores + r * TILE + v * LANES);
    for (; r < rows; r++) block<1, 4>(q + r * width, keys, scores + r * TILE);
  }

  // Turn scores into weights, and scale what the row has accumulated, by the largest score so far.
  inline void normalize(float* scores, const Vec* biases, int vectors, int64_t row) const {
    Vec most = splat(-INFINITY);
    for (int v = 0; v < vectors; v++) {
      Vec s = load(scores + v * LANES);
      if (layer.softcap != 0.f)
        for (int i = 0; i < LANES; i++) s[i] = layer.softcap * std::tanh(s[i] / layer.softcap);
      if (biases) s = biases[v] > splat(-INFINITY) ? s + biases[v] : splat(-INFINITY);
      put(scores + v * LANES, s);
      most = s > most ? s : most;
      most = s != s ? s : most;  // NaN wins
    }
    const float old = largest[row], next = std::max(old, top(most));
    Vec weights = {};
    if (next == -INFINITY) {
      for (int v = 0; v < vectors; v++) put(scores + v * LANES, splat(0.f));
      return;
    }
    for (int v = 0; v < vectors; v++) {
      const Vec w = exp_negative(load(scores + v * LANES) - next);
      put(scores + v * LANES, w);
      weights += w;
    }
    if (next > old) {
      const float shrink = old == -INFINITY ? 0.f : std::exp(old - next);
      total[row] *= shrink;
      for (int d = 0; d < padded; d += LANES) put(out + row * padded + d, load(out + row * padded + d) * shrink);
      largest[row] = next;
    }
    total[row] += sum(weights);
  }

  template <int ROWS, int VECS>
  inline void add(float* const* to, const float* weights, const float* values, int count) const {
    Vec acc[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) acc[r][v] = load(to[r] + v * LANES);
    for (int k = 0; k < count; k++) {
      Vec x[VECS];
      for (int v = 0; v < VECS; v++) x[v] = load(values + k * padded + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Vec w = splat(weights[r * TILE + k]);
        for (int v = 0; v < VECS; v++) acc[r][v] += w * x[v];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECS; v++) put(to[r] + v * LANES, acc[r][v]);
  }

  template <int ROWS>
  inline void add_rows(int64_t level, const int32_t* queries, int head, int64_t r, int count, const float* scores, const float* values) const {
    float* to[ROWS];
    for (int i = 0; i < ROWS; i++)
      to[i] = out + (level * rows_of_level() + queries[(r + i) / group] * layer.heads + head * group + (r + i) % group) * int64_t(padded);
    int d = 0;
    for (; d + 4 * LANES <= padded; d += 4 * LANES) {
      add<ROWS, 4>(to, scores + r * TILE, values + d, count);
      for (int i = 0; i < ROWS; i++) to[i] += 4 * LANES;
    }
    for (; d < padded; d += LANES) {
      add<ROWS, 1>(to, scores + r * TILE, values + d, count);
      for (int i = 0; i < ROWS; i++) to[i] += LANES;
    }
  }

  void accumulate(int64_t level, const int32_t* queries, int head, int64_t rows, int count, const float* scores, const float* values) const {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6) add_rows<6>(level, queries, head, r, count, scores, values);
    for (; r + 3 <= rows; r += 3) add_rows<3>(level, queries, head, r, count, scores, values);
    for (; r < rows; r++) add_rows<1>(level, queries, head, r, count, scores, values);
  }

  // Merge the partial results of a row.
  void finish(int64_t row) const {
    float most = layer.sinks ? layer.sinks[row % layer.heads] : -INFINITY;  // a sink is a key whose value is zero
    for (int64_t level = 0; level < step.levels; level++) most = std::max(most, largest[level * rows_of_level() + row]);
    float sum = layer.sinks ? std::exp(layer.sinks[row % layer.heads] - most) : 0.f;
    float* merged = out + row * padded;  // the first level's result
    for (int64_t level = 0; level < step.levels; level++) {
      const int64_t part = level * rows_of_level() + row;
      const float weight = total[part] == 0.f ? 0.f : std::exp(largest[part] - most);
      sum += total[part] * weight;
      for (int d = 0; d < padded; d++) merged[d] = level ? merged[d] + out[part * padded + d] * weight : merged[d] * weight;
    }
    const float scale = sum == 0.f ? 0.f : 1.f / sum;  // padding sees nothing
    for (int d = 0; d < layer.value_dim; d++) store((T*)layer.out + row * layer.value_dim + d, merged[d] * scale);
  }
};

struct Task {
  int64_t span, level, first, last;
  int32_t head;
};

template <typename T>
void run(const Step& step, const Layer& layer) {
  static thread_local std::vector<float> out, largest, total;
  static thread_local std::vector<Task> tasks;
  const int padded = (layer.value_dim + LANES - 1) / LANES * LANES;
  const int64_t rows = step.levels * step.tokens * layer.heads;
  out.assign(rows * padded, 0.f);
  largest.assign(rows, -INFINITY);
  total.assign(rows, 0.f);
  tasks.clear();
  for (int64_t level = 0; level < step.levels; level++)
    for (int64_t span = step.level_start[level]; span < step.level_start[level + 1]; span++)
      for (int64_t first = step.query_start[span]; first < step.query_start[span + 1]; first += CHUNK)
        for (int32_t head = 0; head < layer.kv_heads; head++)
          tasks.push_back({span, level, first, std::min<int64_t>(first + CHUNK, step.query_start[span + 1]), head});
  const Attention<T> attention{step, layer, int(layer.heads / layer.kv_heads), padded,
                               int((layer.dim + LANES - 1) / LANES * LANES), out.data(), largest.data(), total.data()};
  const Task* task = tasks.data();
  const int64_t count = tasks.size();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.tokens; token++) attention.write(token);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++)
      attention.attend(task[i].span, task[i].level, task[i].head, task[i].first, task[i].last);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step.tokens * layer.heads; row++) attention.finish(row);
  }
}

}  // namespace

extern "C" void attend_float32(const Step* step, const Layer* layer) { run<float>(*step, *layer); }
extern "C" void attend_bfloat16(const Step* step, const Layer* layer) { run<bf16>(*step, *layer); }
