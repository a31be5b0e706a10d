// Attention of a step's tokens over the slots of a paged KV cache, for processors.
//
// A span is a set of queries of one sample and the block tables that they read. A query may be in several spans, of
// different keys, and the keys of a span with few queries are divided into ranges. A query has a partial result for
// each range, as in FlashDecoding; they are merged at the end. Few rows (queries of one KV head) are computed one by
// one, with keys as lanes of vectors; many rows are lanes themselves.
// Within a span the softmax is computed online (Milakov & Gimelshein, "Online normalizer calculation for
// softmax", 2018). Sums are float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "numbers.h"
#include "products.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = LANES;  // queries of one task
constexpr int RANGE = 256;        // keys of one range, about
constexpr int MAX_RANGES = 8;
constexpr int FEW_PARTS = 8;      // up to here, the heads of a span are tasks of their own
constexpr int FEW_ROWS = 8;       // up to here, rows are not lanes
constexpr int MAX_DIM = 1024;
constexpr int VECTORS = TILE / LANES;

// Queries `first` to `last` of a span on its keys `first_key` to `last_key`, for the KV heads `head` to `last_head`.
struct Task {
  int64_t span, range, first, last, first_key, last_key;
  int32_t head, last_head;
};

// Keys of a tile, with what visibility depends on. Behind the last key there is padding, which nothing sees.
struct Keys {
  int count;
  int32_t slot[TILE], time[TILE], segment[TILE], earliest, latest;
  bool one_segment;

  int vectors() const { return (count + LANES - 1) / LANES; }
};

// Reads the keys `first` to `last` of a span tile by tile.
class Reader {
 public:
  Reader(const Step& step, int64_t span, int64_t first, int64_t last)
      : step(&step), table(step.table_start[span]), next(first), left(last - first) {
    while (left && next >= step.num_keys[table]) next -= step.num_keys[table++];
  }

  // The next keys, all of one table; none at the end.
  Keys read() {
    Keys keys;
    while (left && next == step->num_keys[table]) table++, next = block = 0;
    keys.count = left ? std::min<int64_t>({TILE, left, step->num_keys[table] - next}) : 0;
    if (keys.count == 0) return keys;
    const int64_t row = step->tables[table] * step->width;
    const int32_t *blocks = step->blocks + row, *ends = step->ends + row;
    for (int k = 0; k < keys.count;) {
      while (ends[block] <= next) block++;
      const int64_t first = block ? ends[block - 1] : 0, last = std::min<int64_t>(ends[block], next + keys.count - k);
      int32_t slot = blocks[block] * step->block + next - first;
      for (; next < last; next++) keys.slot[k++] = slot++;
    }
    left -= keys.count;
    describe(keys);
    return keys;
  }

 private:
  const Step* step;
  int64_t table, next, left, block = 0;

  void describe(Keys& keys) const {
    const int padded = keys.vectors() * LANES;
    std::fill(keys.slot + keys.count, keys.slot + padded, keys.slot[keys.count - 1]);
    for (int k = 0; k < padded; k++) {
      keys.time[k] = k < keys.count ? step->slot_time[keys.slot[k]] : INT32_MAX;
      keys.segment[k] = step->slot_segment[keys.slot[k]];
    }
    keys.earliest = *std::min_element(keys.time, keys.time + keys.count);
    keys.latest = *std::max_element(keys.time, keys.time + padded);
    keys.one_segment =
        std::all_of(keys.segment, keys.segment + keys.count, [&](int32_t other) { return other == keys.segment[0]; });
  }
};

// Floats that begin with a cache line.
class Buffer {
 public:
  float* of(size_t size) {
    if (lines.size() * LANES < size) lines.resize((size + LANES - 1) / LANES);
    return (float*)lines.data();
  }
  float* data() { return (float*)lines.data(); }

 private:
  struct alignas(64) Line {
    float numbers[LANES];
  };
  std::vector<Line> lines;
};

struct Buffers {  // of one thread: words of queries, keys and values, scores, weights, and rows that are lanes
  Buffer queries, keys, values, scores, weights, rows;
};

// Which partial results there are: one for each query of a span, range of its keys, and query head.
struct Parts {
  struct Place {
    int64_t span, query;  // the number of the query in the span
  };
  std::vector<int64_t> start, ranges;  // [spans] queries in all ranges of the spans before, and number of ranges
  std::vector<int64_t> place_start;    // [tokens + 1] first entry in `places`
  std::vector<Place> places;           // of every token
  int64_t count = 0;                   // of queries in all ranges

  explicit Parts(const Step& step) : start(step.spans), ranges(step.spans, 1), place_start(step.tokens + 1) {
    for (int64_t span = 0; span < step.spans; span++) {
      start[span] = count;
      const int64_t most = num_queries(step, span) <= CHUNK ? MAX_RANGES : 1;
      ranges[span] = std::clamp<int64_t>((num_keys(step, span) + RANGE - 1) / RANGE, 1, most);
      count += ranges[span] * num_queries(step, span);
      for (int64_t i = step.query_start[span]; i < step.query_start[span + 1]; i++) place_start[step.queries[i] + 1]++;
    }
    std::partial_sum(place_start.begin(), place_start.end(), place_start.begin());
    places.resize(place_start.back());
    std::vector<int64_t> next(place_start.begin(), place_start.end() - 1);
    for (int64_t span = 0; span < step.spans; span++)
      for (int64_t i = 0; i < num_queries(step, span); i++)
        places[next[step.queries[step.query_start[span] + i]]++] = {span, i};
  }

  static int64_t num_queries(const Step& step, int64_t span) {
    return step.query_start[span + 1] - step.query_start[span];
  }
  static int64_t num_keys(const Step& step, int64_t span) {
    const int32_t *first = step.num_keys + step.table_start[span], *last = step.num_keys + step.table_start[span + 1];
    return std::accumulate(first, last, int64_t(0));
  }
};

template <typename T>
class Attention {
 public:
  Attention(const Step& step, const Layer& layer)
      : step(step), layer(layer), group(layer.heads / layer.kv_heads), width(padded_words<T>(layer.dim)),
        columns((layer.value_dim + COLUMNS - 1) / COLUMNS * COLUMNS), parts(step) {
    static thread_local std::vector<float> buffer;
    const int64_t rows = parts.count * layer.heads;
    if (int64_t(buffer.size()) < rows * (columns + 2)) buffer.resize(rows * (columns + 2));
    out = buffer.data();
    total = out + rows * columns;
    largest = total + rows;
    add_tasks();
  }

  size_t num_tasks() const { return tasks.size(); }

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

  // The partial results of a task.
  void attend(size_t number) const {
    thread_local Buffers buffers;
    const Task& task = tasks[number];
    const int64_t vectors = (rows_of(task) + LANES - 1) / LANES, blocks = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
    if (rows_of(task) <= FEW_ROWS) return attend_few(task, buffers);
    switch ((vectors + blocks - 1) / blocks) {
      case 1: return attend_many<1>(task, buffers);
      case 2: return attend_many<2>(task, buffers);
      default: return attend_many<3>(task, buffers);
    }
  }

  // Merge the partial results of a token's query heads.
  void finish(int64_t token) const {
    for (int64_t head = 0; head < layer.heads; head++) finish(token, head);
  }

 private:
  const Step& step;
  const Layer& layer;
  const int group;          // query heads of one KV head
  const int width;          // words of a query or key
  const int columns;        // floats of an accumulated value
  const Parts parts;
  std::vector<Task> tasks;
  float *out, *total, *largest;  // [parts, heads, columns], and twice [parts, heads]

  void add_tasks() {
    for (int64_t span = 0; span < step.spans; span++) {
      const int64_t keys = Parts::num_keys(step, span), ranges = parts.ranges[span], end = step.query_start[span + 1];
      const int64_t queries = Parts::num_queries(step, span), chunks = (queries + CHUNK - 1) / CHUNK;
      const int64_t tiles = (keys + TILE - 1) / TILE;
      // All heads at once read the cache in order; heads apart keep all threads busy.
      const bool is_divided = ranges * chunks > 1 || queries * group <= FEW_ROWS;
      const int64_t heads = parts.count > FEW_PARTS && is_divided ? layer.kv_heads : 1;
      for (int64_t range = 0; range < ranges; range++)
        for (int64_t first = step.query_start[span]; first < end; first += CHUNK)
          for (int32_t head = 0; head < layer.kv_heads; head += heads)
            tasks.push_back({span, range, first, std::min(first + CHUNK, end), tiles * range / ranges * TILE,
                             std::min(tiles * (range + 1) / ranges * TILE, keys), head,
                             int32_t(std::min(head + heads, layer.kv_heads))});
    }
  }

  void attend_few(const Task& task, Buffers& buffers) const {
    begin_few(task, buffers);
    Reader reader(step, task.span, task.first_key, task.last_key);
    for (Keys keys = reader.read(); keys.count; keys = reader.read())
      if (is_seen(task, keys)) {
        fetch(task, keys);
        attend(task, keys, buffers);
      }
  }

  // Read the queries, and clear the partial results.
  void begin_few(const Task& task, Buffers& buffers) const {
    const int64_t count = rows_of(task);
    float* to = buffers.queries.of(count * width * (task.last_head - task.head));
    buffers.values.of(TILE * columns);
    buffers.scores.of(LANES * TILE);
    buffers.weights.of(LANES * TILE);
    for (int32_t head = task.head; head < task.last_head; head++)
      for (int64_t r = 0; r < count; r++, to += width) {
        const float* words = words_of(query_row(task, head, r), layer.dim, width, to);
        if (words != to) std::copy(words, words + width, to);
        const int64_t part = part_of(task, head) + r;
        std::fill(out + part * columns, out + (part + 1) * columns, 0.f);
        total[part] = 0.f;
        largest[part] = -INFINITY;
      }
  }

  void finish(int64_t token, int64_t head) const {
    const auto each = [&](auto use) {
      for (int64_t i = parts.place_start[token]; i < parts.place_start[token + 1]; i++)
        for (int64_t range = 0; range < parts.ranges[parts.places[i].span]; range++)
          use(part_of(parts.places[i].span, range, parts.places[i].query, head));
    };
    float most = layer.sinks ? layer.sinks[head] : -INFINITY;  // a sink is a key whose value is zero
    each([&](int64_t part) { most = std::max(most, largest[part]); });
    float sum = layer.sinks ? std::exp(layer.sinks[head] - most) : 0.f;
    thread_local std::vector<float> merged;
    merged.assign(columns, 0.f);
    each([&](int64_t part) {
      const float weight = total[part] == 0.f ? 0.f : std::exp(largest[part] - most);
      sum += total[part] * weight;
      for (int d = 0; d < columns; d++) merged[d] += out[part * columns + d] * weight;
    });
    const float scale = sum == 0.f ? 0.f : 1.f / sum;  // padding sees nothing
    T* to = (T*)layer.out + (token * layer.heads + head) * layer.value_dim;
    for (int d = 0; d < layer.value_dim; d++) store(to + d, merged[d] * scale);
  }

  int64_t rows_of(const Task& task) const { return (task.last - task.first) * group; }
  const T* query_row(const Task& task, int32_t head, int64_t row) const {
    const int64_t token = step.queries[task.first + row / group];
    return (const T*)layer.query + token * layer.query_token + (head * group + row % group) * layer.query_head;
  }
  // The results of a task are side by side, by KV head, query and head, so that no other thread writes beside them.
  int64_t part_of(int64_t span, int64_t range, int64_t query, int64_t head) const {
    const int64_t queries = Parts::num_queries(step, span), chunk = query / CHUNK * CHUNK;
    const int64_t first = (parts.start[span] + range * queries + chunk) * layer.heads;
    return first + (head / group * std::min(CHUNK, queries - chunk) + query - chunk) * group + head % group;
  }
  int64_t part_of(const Task& task, int32_t head) const {  // of its first row
    return part_of(task.span, task.range, task.first - step.query_start[task.span], head * group);
  }
  const T* key_of(int64_t slot, int head) const {
    return (const T*)layer.key_pool + (slot * layer.kv_heads + head) * layer.dim;
  }
  const T* value_of(int64_t slot, int head) const {
    return (const T*)layer.value_pool + (slot * layer.kv_heads + head) * layer.value_dim;
  }

  // Bring the keys and values into the processor's cache: many loads at once, which wait for memory together.
  void fetch(const Task& task, const Keys& keys) const {
    const int64_t heads = task.last_head - task.head;
    int sum = 0;
    for (int k = 0; k < keys.count; k++) {
      const char* key = (const char*)key_of(keys.slot[k], task.head);
      for (int64_t at = 0; at < int64_t(heads * layer.dim * sizeof(T)); at += 64) sum += key[at];
    }
    for (int k = 0; k < keys.count; k++) {
      const char* value = (const char*)value_of(keys.slot[k], task.head);
      for (int64_t at = 0; at < int64_t(heads * layer.value_dim * sizeof(T)); at += 64) sum += value[at];
    }
    asm volatile("" : : "r"(sum));
  }

  bool is_seen(const Task& task, const Keys& keys) const {
    for (int64_t i = task.first; i < task.last; i++)
      if (keys.earliest <= step.token_time[step.queries[i]]) return true;
    return false;
  }

  // What is added to the scores of a query, by the segment of the key; null if nothing is.
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
      const bool is_biased = is_scored && table(task, query)[keys.segment[0]] != 0.f;
      if (is_biased || keys.latest >= step.token_time[query]) return false;
    }
    return true;
  }

  // What is added to the scores of the keys; -infinity where the query does not see the key.
  void add_biases(const Task& task, const Keys& keys, int64_t query, Vec* biases) const {
    const IntVec mine = IntVec{} + step.token_time[query], own = IntVec{} + step.token_slot[query];
    const Entries row(table(task, query), step.score_width[task.span]);
    for (int v = 0; v < keys.vectors(); v++) {
      const IntVec slot = *(const IntVec*)(keys.slot + v * LANES), time = *(const IntVec*)(keys.time + v * LANES);
      IntVec visible = (time < mine) | ((slot == own) & (time == mine));
      if (step.window) visible &= mine - time < IntVec{} + int32_t(step.window);
      if (step.chunk) visible &= time >= mine - mine % int32_t(step.chunk);
      biases[v] = visible ? row.at(*(const IntVec*)(keys.segment + v * LANES)) : splat(-INFINITY);
    }
  }

  // Few rows: a row has a vector of scores for 16 keys.
  void attend(const Task& task, const Keys& keys, Buffers& buffers) const {
    Vec biases[CHUNK][VECTORS];
    const bool plain = is_plain(task, keys);
    for (int64_t i = task.first; i < task.last && !plain; i++)
      add_biases(task, keys, step.queries[i], biases[i - task.first]);
    const int32_t together = std::max<int64_t>(1, LANES / rows_of(task));
    for (int32_t head = task.head; head < task.last_head; head += together)
      attend(task, keys, head, std::min(head + together, task.last_head), plain ? nullptr : biases, buffers);
  }

  // For the KV heads `head` to `last`. biases: of each query; null if all are 0.
  void attend(const Task& task, const Keys& keys, int32_t head, int32_t last, const Vec (*biases)[VECTORS],
              Buffers& buffers) const {
    const int64_t count = rows_of(task), rows = (last - head) * count;
    float *queries = buffers.queries.data(), *scores = buffers.scores.data(), *weights = buffers.weights.data();
    for (int32_t h = head; h < last; h++)
      score(queries + (h - task.head) * count * width, count, keys, h, scores + (h - head) * count * TILE);
    weigh(task, head, rows, biases, keys.vectors(), part_of(task, head), buffers);
    for (int32_t h = head; h < last; h++) {
      load_values(h, keys, buffers.values.data());
      accumulate(weights + (h - head) * count * TILE, count, part_of(task, h), (keys.count + PER<T> - 1) / PER<T>,
                 buffers.values.data());
    }
  }

  // scores[row, key] = query . key
  void score(const float* queries, int64_t count, const Keys& keys, int32_t head, float* scores) const {
    alignas(64) float copies[LANES][MAX_DIM];
    for (int k = 0; k < keys.vectors() * LANES; k += LANES) {
      const float* rows[LANES];
      for (int i = 0; i < LANES; i++)
        rows[i] = words_of(key_of(keys.slot[k + i], head), layer.dim, width, copies[i]);
      for (int64_t r = 0; r < count; r++) put(scores + r * TILE + k, dots(queries + r * width, rows));
    }
  }

  // The products of a query with 16 keys.
  Vec dots(const float* query, const float* const (&keys)[LANES]) const {
    Vec sums[LANES] = {};
    for (int w = 0; w < width; w += LANES)
      for (int i = 0; i < LANES; i++) sums[i] = multiply_add<T>(sums[i], load(query + w), load(keys[i] + w));
    return lane_sums(sums);
  }

  // Turn the scores of `count` rows, 16 at most, into weights relative to the largest score of a row so far, and
  // rescale what the parts of the rows have accumulated.
  void weigh(const Task& task, int32_t head, int64_t count, const Vec (*biases)[VECTORS], int vectors, int64_t part,
             Buffers& buffers) const {
    Vec most[LANES], sums[LANES] = {};
    float *all_scores = buffers.scores.data(), *all_weights = buffers.weights.data();
    for (int64_t r = 0; r < count; r++)
      most[r] = bias(all_scores + r * TILE, biases ? biases[r % rows_of(task) / group] : nullptr,
                     penalty(task, head + r / rows_of(task), r), vectors);
    std::fill(most + count, most + LANES, splat(-INFINITY));
    const Vec old = load_some(largest + part, count), next = larger(old, lane_maxima(most));
    const Vec base = next == splat(-INFINITY) ? splat(0.f) : next;
    for (int64_t r = 0; r < count; r++) {
      float *scores = all_scores + r * TILE, *weights = all_weights + r * TILE;
      for (int v = 0; v < vectors; v++) {
        const Vec weight = exp_negative(load(scores + v * LANES) - base[r]);  // NaN of NaN
        put(scores + v * LANES, weight);
        sums[r] += weight;
      }
      for (int v = vectors; v < VECTORS; v++) put(scores + v * LANES, splat(0.f));
      for (int k = 0; k < TILE; k += 2 * LANES) to_words<T>(scores + k, weights + k / PER<T>);
    }
    const Vec shrink = next > old ? exp_negative(old - base) : splat(1.f);
    put_some(total + part, load_some(total + part, count) * shrink + lane_sums(sums), count);
    put_some(largest + part, next, count);
    for (int64_t r = 0; r < count; r++)
      if (next[r] > old[r]) {
        float* row = out + (part + r) * columns;
        for (int d = 0; d < columns; d += LANES) put(row + d, load(row + d) * shrink[r]);
      }
  }

  // The score that a product of a query and a key gives.
  Vec limited(Vec product) const {
    Vec s = product * layer.scale;
    if (layer.softcap != 0.f)
      for (int i = 0; i < LANES; i++) s[i] = layer.softcap * std::tanh(s[i] / layer.softcap);
    return s;
  }

  // What the biases of a row of a KV head are multiplied by, where each query head has a number of its own.
  float penalty(const Task& task, int32_t head, int64_t row) const {
    if (!layer.penalties) return 1.f;
    return layer.penalties[step.span_adapter[task.span] * layer.heads + head * group + row % group];
  }

  // Scale, limit and bias the scores of a row; returns a vector that holds the largest.
  Vec bias(float* scores, const Vec* biases, float penalty, int vectors) const {
    Vec most = splat(-INFINITY);
    for (int v = 0; v < vectors; v++) {
      Vec s = limited(load(scores + v * LANES));
      if (biases) s = biased(s, biases[v], splat(penalty));
      put(scores + v * LANES, s);
      most = larger(s, most);
    }
    return most;
  }

  void load_values(int32_t head, const Keys& keys, float* values) const {
    for (int k = 0; k < keys.count; k += PER<T>) {
      const T *even = value_of(keys.slot[k], head),
              *odd = value_of(keys.slot[std::min(k + 1, keys.count - 1)], head);
      interleave(even, odd, layer.value_dim, columns, values + k / PER<T> * columns);
    }
  }

  // out[part + row] += weights[row] * values
  void accumulate(const float* weights, int64_t count, int64_t part, int words, const float* values) const {
    for (int64_t first = 0; first < count; first += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, count - first);
      const float* from[ROWS];
      float* to[ROWS];
      for (int64_t r = 0; r < rows; r++) {
        from[r] = weights + (first + r) * TILE;
        to[r] = out + (part + first + r) * columns;
      }
      for (int d = 0; d < columns; d += COLUMNS) {
        add_products<T>(from, rows, {values + d, values + d, words, columns, 0}, nullptr, to);
        for (int64_t r = 0; r < rows; r++) to[r] += COLUMNS;
      }
    }
  }

  // Many rows: they are lanes, in blocks of N vectors.
  template <int N>
  void attend_many(const Task& task, Buffers& buffers) const {
    std::vector<LaneRows<T, N>> rows = begin_many<N>(task, buffers);
    const int64_t blocks = rows.size() / (task.last_head - task.head);
    const float* words[TILE];
    float *copies = buffers.keys.of(width * TILE), *values = buffers.values.of(TILE * columns);
    Reader reader(step, task.span, task.first_key, task.last_key);
    for (Keys keys = reader.read(); keys.count; keys = reader.read()) {
      if (!is_seen(task, keys)) continue;
      if (Parts::num_queries(step, task.span) <= CHUNK) fetch(task, keys);  // else other tasks have read them
      Vec biases[TILE];
      const bool plain = is_plain(task, keys);
      if (!plain) add_biases(task, keys, biases);
      for (int32_t head = task.head; head < task.last_head; head++) {
        for (int k = 0; k < keys.vectors() * LANES; k++)
          words[k] = words_of(key_of(keys.slot[k], head), layer.dim, width, copies + k * width);
        load_values(head, keys, values);
        for (int64_t i = (head - task.head) * blocks; i < (head - task.head + 1) * blocks; i++)
          rows[i].attend(words, keys.count, plain ? nullptr : biases, values, layer.scale, layer.softcap);
      }
    }
    int64_t part = part_of(task, task.head);
    for (LaneRows<T, N>& block : rows) {
      block.finish(out + part * columns, total + part, largest + part);
      part += block.count;
    }
  }

  // The rows of a task, by KV head.
  template <int N>
  std::vector<LaneRows<T, N>> begin_many(const Task& task, Buffers& buffers) const {
    constexpr int64_t MOST = N * LANES;
    const int64_t count = rows_of(task), blocks = (count + MOST - 1) / MOST * (task.last_head - task.head);
    const int64_t size = LaneRows<T, N>::size(width, columns);
    float *buffer = buffers.rows.of(size * blocks), *copies = buffers.queries.of(MOST * width);
    std::vector<LaneRows<T, N>> rows;
    for (int32_t head = task.head; head < task.last_head; head++)
      for (int64_t first = 0; first < count; first += MOST, buffer += size) {
        const float* words[MOST];
        int32_t queries[MOST] = {};
        float factors[MOST] = {};
        const int64_t own = std::min(MOST, count - first);
        for (int64_t r = 0; r < own; r++) {
          words[r] = words_of(query_row(task, head, first + r), layer.dim, width, copies + r * width);
          queries[r] = int32_t((first + r) / group);
          factors[r] = penalty(task, head, first + r);
        }
        rows.emplace_back(buffer, width, columns, words, queries, factors, int(own));
      }
    return rows;
  }

  // What is added to the scores of each key, by query of the task.
  void add_biases(const Task& task, const Keys& keys, Vec* biases) const {
    Vec by_query[LANES][VECTORS] = {};
    for (int64_t i = task.first; i < task.last; i++) add_biases(task, keys, step.queries[i], by_query[i - task.first]);
    for (int v = 0; v < keys.vectors(); v++) {
      Vec block[LANES];
      for (int i = 0; i < LANES; i++) block[i] = by_query[i][v];
      transpose(block);
      for (int i = 0; i < LANES; i++) biases[v * LANES + i] = block[i];
    }
  }
};

template <typename T>
void run(const Step& step, const Layer& layer) {
  const Attention<T> attention(step, layer);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.tokens; token++) attention.write(token);
#pragma omp for schedule(dynamic, 1)
    for (size_t task = 0; task < attention.num_tasks(); task++) attention.attend(task);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.tokens; token++) attention.finish(token);
  }
}

}  // namespace

extern "C" void attend_float32(const Step* step, const Layer* layer) { run<float>(*step, *layer); }
extern "C" void attend_bfloat16(const Step* step, const Layer* layer) { run<bf16>(*step, *layer); }
