// Vectors of 16 floats, and products of words: a word is a float, or two bfloat16 numbers where the processor
// multiplies them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "numbers.h"

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), aligned(4)));

inline Vec load(const float* from) { return *(const Vec*)from; }
inline void put(float* to, Vec x) { *(Vec*)to = x; }
inline void put_word(float* to, float word) { std::memcpy(to, &word, sizeof word); }
inline Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// Swap the lanes of `a` that have bit S with the lanes of `b` that lack it.
template <int S, size_t... C>
inline void swap_lanes(Vec& a, Vec& b, std::index_sequence<C...>) {
  const Vec low = __builtin_shufflevector(a, b, int(C & S ? LANES + C - S : C)...);
  b = __builtin_shufflevector(a, b, int(C & S ? LANES + C : C + S)...);
  a = low;
}

template <int S>
inline void swap_blocks(Vec (&rows)[LANES]) {
  for (int i = 0; i < LANES; i++)
    if (!(i & S)) swap_lanes<S>(rows[i], rows[i | S], std::make_index_sequence<LANES>());
}

inline void transpose(Vec (&rows)[LANES]) {
  swap_blocks<1>(rows);
  swap_blocks<2>(rows);
  swap_blocks<4>(rows);
  swap_blocks<8>(rows);
}

// Lane i of the result is lane `index[i] % LANES` of x.
inline Vec permuted(Vec x, IntVec index) {
#ifdef __AVX512F__
  return (Vec)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#else
  Vec y;
  for (int i = 0; i < LANES; i++) y[i] = x[index[i] % LANES];
  return y;
#endif
}

inline bool any(IntVec mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= mask[i];
  return found;
#endif
}

// A score with `factor` times its bias; -infinity for a bias of -infinity, whatever the score and the factor are.
inline Vec biased(Vec score, Vec bias, Vec factor) {
  return bias > splat(-INFINITY) ? score + bias * factor : splat(-INFINITY);
}

inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }
inline Vec added(Vec x, Vec y) { return x + y; }

// Lane i holds what JOIN makes of the lanes of rows[i].
template <Vec (*JOIN)(Vec, Vec), int S = 1>
inline Vec joined_lanes(Vec* rows) {
  for (int i = 0; i < LANES; i += 2 * S) {
    swap_lanes<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
    rows[i] = JOIN(rows[i], rows[i + S]);
  }
  if constexpr (2 * S < LANES) return joined_lanes<JOIN, 2 * S>(rows);
  return rows[0];
}

inline Vec lane_sums(Vec* rows) { return joined_lanes<added>(rows); }
inline Vec lane_maxima(Vec* rows) { return joined_lanes<larger>(rows); }

// The first lanes; the others are 0.
inline Vec load_some(const float* from, int64_t count) {
  Vec x = {};
  std::memcpy(&x, from, count * sizeof(float));
  return x;
}

inline void put_some(float* to, Vec x, int64_t count) { std::memcpy(to, &x, count * sizeof(float)); }

// A short table of floats; all entries are 0 if there is none.
class Entries {
 public:
  Entries(const float* table, int32_t count) : table(table), is_short(count <= LANES) {
    if (table && is_short) std::memcpy(&entries, table, count * sizeof(float));
  }

  Vec at(IntVec index) const {
    if (is_short) return permuted(entries, index);
    Vec found = {};
    if (table)
      for (int i = 0; i < LANES; i++) found[i] = table[index[i]];
    return found;
  }

 private:
  const float* table;
  bool is_short;
  Vec entries = {};
};

// exp(x) for x <= 0; 0 below -110. The relative error is below 3e-7, and x * 1e-7. Polynomials of Cephes.
inline Vec exp_negative(Vec x) {
#ifdef __AVX512F__
  const Vec t = (splat(-110.f) > x ? splat(-110.f) : x) * 1.44269504f;
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = t - n;
  Vec p = splat(1.535336188e-4f);
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Vec z = x < splat(-87.f) ? splat(-87.f) : x;
  const IntVec k = __builtin_convertvector(z * 1.44269504f - 0.5f, IntVec);  // z <= 0, so this rounds z / log(2)
  const Vec n = __builtin_convertvector(k, Vec);
  const Vec r = z - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const IntVec exponent = (k + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < splat(-87.f) ? splat(0.f) : p * power;
#endif
}

template <typename T>
constexpr int PER = 1;  // numbers of a word
#ifdef __AVX512BF16__
template <>
constexpr int PER<bf16> = 2;
#endif

template <typename T>
int padded_words(int64_t numbers) {
  return (numbers + PER<T> * LANES - 1) / (PER<T> * LANES) * LANES;
}

// sums + a * b, where words of two numbers add both products.
template <typename T>
inline Vec multiply_add(Vec sums, Vec a, Vec b) {
#ifdef __AVX512BF16__
  if constexpr (PER<T> == 2) return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#endif
  return sums + a * b;
}

// The words of a row of numbers: the row itself where it consists of words, or a copy with zeros behind its end.
template <typename T>
inline const float* words_of(const T* row, int64_t numbers, int64_t words, float* copy) {
  if constexpr (PER<T> * sizeof(T) == sizeof(float)) {
    if (numbers == words * PER<T>) return (const float*)row;
    std::memcpy(copy, row, numbers * sizeof(T));
    std::memset((T*)copy + numbers, 0, words * sizeof(float) - numbers * sizeof(T));
  } else {
    for (int64_t i = 0; i < numbers; i++) copy[i] = to_float(row[i]);
    for (int64_t i = numbers; i < words; i++) copy[i] = 0;
  }
  return copy;
}

// The words of 32 floats, rounded to T where words hold T.
template <typename T>
inline void to_words(const float* from, float* to) {
#ifdef __AVX512BF16__
  if constexpr (PER<T> == 2) {
    put(to, (Vec)_mm512_cvtne2ps_pbh((__m512)load(from + LANES), (__m512)load(from)));
    return;
  }
#endif
  put(to, load(from));
  put(to + LANES, load(from + LANES));
}

// Words of (even[i], odd[i]) where words hold two numbers; otherwise `even`, and `odd` in the next row.
template <typename T>
inline void put_pairs(Vec even, Vec odd, float* to, int64_t row) {
#ifdef __AVX512BF16__
  if constexpr (PER<T> == 2) {
    const IntVec order = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001 + 0x100000;
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // all even, then all odd
    put(to, (Vec)_mm512_permutexvar_epi16((__m512i)order, both));
    return;
  }
#endif
  put(to, even);
  put(to + row, odd);
}

// Words of (even[i], odd[i]) where words hold two numbers, of even[i] otherwise; zeros behind the end.
template <typename T>
inline void interleave(const T* even, const T* odd, int64_t numbers, int64_t words, float* to) {
  if constexpr (PER<T> == 2) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    const IntVec first = IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001 + 0x200000;
    for (; i + 2 * LANES <= numbers; i += 2 * LANES) {
      const __m512i low = _mm512_loadu_si512(even + i), high = _mm512_loadu_si512(odd + i);
      put(to + i, (Vec)_mm512_permutex2var_epi16(low, (__m512i)first, high));
      put(to + i + LANES, (Vec)_mm512_permutex2var_epi16(low, (__m512i)(first + 0x100010), high));
    }
#endif
    uint32_t* pairs = (uint32_t*)to;
    for (; i < numbers; i++) pairs[i] = uint32_t(even[i].bits) | uint32_t(odd[i].bits) << 16;
  } else {
    for (int64_t i = 0; i < numbers; i++) to[i] = to_float(even[i]);
  }
  for (int64_t i = numbers; i < words; i++) to[i] = 0;
}
