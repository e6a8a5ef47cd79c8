// The norm of a sum, one row at a time while it is in the first-level cache. With s = x + r rounded to the dtype,
//
//     y = w z + b    z = (s - m) q    m = mean(s)    q = 1 / sqrt(mean((s - m)^2) + eps)
//     ds = q (w dy - mean(w dy) - z mean(w dy z))    dw = sum of dy z over rows    db = sum of dy over rows
//
// Rounding s gives forward and backward the same numbers, which are those of an addition before a LayerNorm. All else is
// in float32.
#include <cmath>
#include <type_traits>

#include "elements.h"
#include "kernels.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

constexpr int kSums = 4;  // independent sums, because an addition waits for the one before it

// Calls f(d, count, n) for the vectors of a row: `count` elements from d on, a constant for whole vectors, which belong
// to sum n.
template <class F>
INLINE void for_vectors(int64_t size, F f) {
  constexpr std::integral_constant<int64_t, kLanes> whole{};
  int64_t d = 0;
  for (; d + kSums * kLanes <= size; d += kSums * kLanes) {
    for (int n = 0; n < kSums; ++n) f(d + n * kLanes, whole, n);
  }
  for (; d + kLanes <= size; d += kLanes) f(d, whole, 0);
  if (d < size) f(d, size - d, 0);
}

INLINE float sum_of(const Vector (&sums)[kSums]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// The first `count` lanes of v; the others become zero.
INLINE Vector keep_first(Vector v, int64_t count) {
  if (count >= kLanes) return v;
  float some[kLanes] = {};
  std::memcpy(some, &v, count * sizeof(float));
  return load(some);
}

// The value that E::load returns after E::store.
template <class E>
INLINE Vector rounded(Vector v) {
  if constexpr (std::is_same_v<E, Float32>) return v;
  typename E::Stored stored[kLanes];
  E::store(stored, v);
  return E::load(stored);
}

// `s`, `weight` and `bias` are rows of floats, whose length is rounded up.
template <class E>
void norm_row(const AddNorm& a, int64_t row, float* s, const float* weight, const float* bias) {
  using Stored = typename E::Stored;
  const Stored* x = static_cast<const Stored*>(a.x) + row * a.size;
  const Stored* residual = static_cast<const Stored*>(a.residual) + row * a.size;
  Stored* output = static_cast<Stored*>(a.output) + row * a.size;
  Vector total[kSums] = {}, squares[kSums] = {};
  for_vectors(a.size, [&](int64_t d, auto count, int n) __attribute__((always_inline)) {
    const Vector v = rounded<E>(load_some<E>(x + d, count) + load_some<E>(residual + d, count));
    store(s + d, v);
    total[n] += v;
  });
  if (a.sum) store_rows<E>(s, 0, 1, a.size, 1.0f, [&](int64_t) { return static_cast<Stored*>(a.sum) + row * a.size; });
  const float mean = sum_of(total) / a.size;
  for_vectors(a.size, [&](int64_t d, auto count, int n) __attribute__((always_inline)) {
    const Vector centred = keep_first(load(s + d) - mean, count);
    squares[n] += centred * centred;
  });
  const float inverse_root = 1 / std::sqrt(sum_of(squares) / a.size + a.eps);
  for_vectors(a.size, [&](int64_t d, auto count, int) __attribute__((always_inline)) {
    const Vector z = (load(s + d) - mean) * inverse_root;
    store_some<E>(output + d, z * load(weight + d) + load(bias + d), count);
  });
  if (a.mean) a.mean[row] = mean, a.inverse_root[row] = inverse_root;
}

template <class E>
void norm_row_backward(const AddNormBackward& a, int64_t row, float* grad_weight, float* grad_bias) {
  using Stored = typename E::Stored;
  const auto row_of = [&](const void* p) { return static_cast<const Stored*>(p) + row * a.size; };
  const Stored *gradient = row_of(a.grad_output), *s = row_of(a.sum), *weight = static_cast<const Stored*>(a.weight);
  Stored* grad_sum = static_cast<Stored*>(a.grad_sum) + row * a.size;
  const float mean = a.mean[row], inverse_root = a.inverse_root[row];
  Vector total[kSums] = {}, along[kSums] = {};
  for_vectors(a.size, [&](int64_t d, auto count, int n) __attribute__((always_inline)) {
    const Vector dy = load_some<E>(gradient + d, count), dz = dy * load_some<E>(weight + d, count);
    const Vector z = keep_first((load_some<E>(s + d, count) - mean) * inverse_root, count);
    total[n] += dz, along[n] += dz * z;
    if (grad_weight) {
      store_some<Float32>(grad_weight + d, load_some<Float32>(grad_weight + d, count) + dy * z, count);
      store_some<Float32>(grad_bias + d, load_some<Float32>(grad_bias + d, count) + dy, count);
    }
  });
  const float mean_total = sum_of(total) / a.size, mean_along = sum_of(along) / a.size;
  for_vectors(a.size, [&](int64_t d, auto count, int) __attribute__((always_inline)) {
    const Vector dz = load_some<E>(gradient + d, count) * load_some<E>(weight + d, count);
    const Vector z = (load_some<E>(s + d, count) - mean) * inverse_root;
    store_some<E>(grad_sum + d, (dz - mean_total - z * mean_along) * inverse_root, count);
  });
}

}  // namespace

void add_norm(const AddNorm& a, int64_t begin, int64_t end) {
  const int64_t pitch = round_up(a.size, kLanes);
  const Scratch memory(3 * pitch);
  float *const s = memory.data(), *const weight = s + pitch, *const bias = weight + pitch;
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    const auto copy = [&](const void* from, float* to) {
      copy_rows<E>([&](int64_t) { return static_cast<const typename E::Stored*>(from); }, 1, a.size, 1.0f, to, pitch);
    };
    copy(a.weight, weight), copy(a.bias, bias);
    for (int64_t row = begin; row < end; ++row) norm_row<E>(a, row, s, weight, bias);
  });
}

void add_norm_backward(const AddNormBackward& a, int64_t part, int64_t begin, int64_t end) {
  float* const grad_weight = a.partial ? a.partial + part * 2 * a.size : nullptr;
  float* const grad_bias = grad_weight ? grad_weight + a.size : nullptr;
  if (grad_weight) std::memset(grad_weight, 0, 2 * a.size * sizeof(float));
  with_element(a.element, [&](auto element) {
    for (int64_t row = begin; row < end; ++row) {
      norm_row_backward<decltype(element)>(a, row, grad_weight, grad_bias);
    }
  });
}

void store_norm_sums(const AddNormBackward& a, int64_t parts, int64_t which, void* gradient) {
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    for (int64_t d = 0; d < a.size; d += kLanes) {
      Vector total{};
      for (int64_t part = 0; part < parts; ++part) {
        total += load_some<Float32>(a.partial + (part * 2 + which) * a.size + d, a.size - d);
      }
      store_some<E>(static_cast<typename E::Stored*>(gradient) + d, total, a.size - d);
    }
  });
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
