// The most likely token of each row of logits, for processors.
//
// The bits of two positive floats compare as the floats do, so that rows are read as integers, in any float format.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

constexpr int64_t CHUNK = 1024;  // numbers

template <typename Bits>
int64_t first_largest(const Bits* row, int64_t columns, Bits infinity) {
  using Unsigned = std::make_unsigned_t<Bits>;
  Bits largest = std::numeric_limits<Bits>::min();
  Unsigned farthest = 0;  // negative numbers are the largest unsigned ones, and negative NaNs the largest of these
  int64_t found = 0;      // chunk
  for (int64_t first = 0; first < columns; first += CHUNK) {
    const int64_t last = std::min(first + CHUNK, columns);
    Bits most = std::numeric_limits<Bits>::min();
    Unsigned far = 0;
    for (int64_t i = first; i < last; i++) {
      most = std::max(most, row[i]);
      far = std::max(far, Unsigned(row[i]));
    }
    farthest = std::max(farthest, far);
    if (most > largest) largest = most, found = first;
  }
  const Unsigned sign = Unsigned(1) << (8 * sizeof(Bits) - 1);
  if (largest >= infinity || farthest > Unsigned(sign | Unsigned(infinity))) return -1;
  if (largest <= 0) return -2;
  return std::find(row + found, row + columns, largest) - row;
}

template <typename Bits>
void all_rows(const void* logits, int64_t rows, int64_t columns, int64_t stride, int64_t infinity, int64_t* tokens) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++)
    tokens[row] = first_largest<Bits>((const Bits*)logits + row * stride, columns, Bits(infinity));
}

}  // namespace

// tokens: [rows] index of the first largest number of each row; -1 if it is infinite or if any is NaN, and -2 for a row
// without a positive number. infinity: its bits.
extern "C" void largest_16(const void* logits, int64_t rows, int64_t columns, int64_t stride, int64_t infinity,
                           int64_t* tokens) {
  all_rows<int16_t>(logits, rows, columns, stride, infinity, tokens);
}

extern "C" void largest_32(const void* logits, int64_t rows, int64_t columns, int64_t stride, int64_t infinity,
                           int64_t* tokens) {
  all_rows<int32_t>(logits, rows, columns, stride, infinity, tokens);
}
