// The kernels, and what they compute with.

#pragma once

#include <cstdint>

#include "numbers.h"

extern "C" {

struct Step {  // arrays of one step; the same for all layers with one attention window
  int64_t tokens, spans;
  int64_t block, width;                                    // slots of a block, and blocks of a table's row
  const int32_t *token_slot, *token_time, *token_segment;  // [tokens]; a negative slot is padding
  const int32_t *query_start, *queries;                    // [spans + 1], and tokens
  const int32_t *table_start, *tables, *num_keys;          // [spans + 1], and rows of block tables with their keys
  const int32_t *blocks, *ends;                            // [rows, width] blocks, and keys up to the end of each
  const int32_t *slot_time, *slot_segment;                 // [slots]
  const int64_t *score_start;                              // [spans] first entry of the span's table of scores
  const int32_t *score_width;                              // [spans] segments of the sample; 0: all scores are 0
  const float* scores;                                     // [segments, segments] of every sample
  const int32_t* span_adapter;                             // [spans] row of `Layer::penalties`
  int64_t window, chunk;                                   // 0: none
};

struct Layer {  // strides are in elements
  int64_t heads, kv_heads, dim, value_dim;
  const void* query;
  int64_t query_token, query_head;
  const void* key;
  int64_t key_token, key_head;
  const void* value;
  int64_t value_token, value_head;
  void *key_pool, *value_pool;  // [slots, kv_heads, dim]
  void* out;                    // [tokens, heads, value_dim]
  float scale, softcap;         // softcap 0: none
  const float* sinks;           // [heads], or null
  const float* penalties;       // [adapters, heads] by which scores of the tables are multiplied; null: 1
};

struct Weights {  // of linear layers that read the same tensor, as linear.cpp packs them
  const float *packed, *bias;  // bias: one for each output, and zeros up to the end of the last block; null for none
  int64_t inputs, outputs;
};

struct LowRank {  // one adapter of one layer of a group
  const Weights* up;          // [outputs, rank]
  int64_t first, first_rank;  // the layer's first column in the group's product, and in that with `down`
  float scale;
};

struct Adapter {  // of one group
  const LowRank* layers;
  int64_t count;
  const Weights* down;  // of all layers side by side, [ranks, inputs]
};

void attend_float32(const Step* step, const Layer* layer);
void attend_bfloat16(const Step* step, const Layer* layer);
void multiply_float32(const float* input, const Weights* weights, float* out, int64_t rows);
void multiply_bfloat16(const bf16* input, const Weights* weights, bf16* out, int64_t rows);
void find_largest_float32(const float* input, const Weights* weights, int64_t* outputs, int64_t rows);
void find_largest_bfloat16(const bf16* input, const Weights* weights, int64_t* outputs, int64_t rows);
void add_low_rank_float32(const float* input, float* product, int64_t rows, int64_t inputs, int64_t columns,
                          const Adapter* adapters, const int32_t* adapter);
void add_low_rank_bfloat16(const bf16* input, bf16* product, int64_t rows, int64_t inputs, int64_t columns,
                           const Adapter* adapters, const int32_t* adapter);

}  // extern "C"
