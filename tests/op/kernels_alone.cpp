// The CPU kernels without torch, against the definition in float64: for sanitizers, other compilers and processors.
// Prints one line a case and "ok" at the end; leaves with 1 at the first error that is too large.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/schedule.h"

using namespace deberta_fast;

namespace {

using Doubles = std::vector<double>;

struct Case {
  const char* name;
  int64_t batch, heads, queries, keys, size;
  bool c2p = true, p2c = true;
  enum { kNone, kPadding, kPairs } mask = kNone;
  double dropout = 0;
  int64_t offset = 0;
  Element element = Element::float32;
  std::vector<int64_t> packed = {};         // lengths of sequences, instead of a batch
  int64_t reach = 20, share = 1, skip = 1;  // of the tables
};

const Case kCases[] = {
    {"one-token", 1, 1, 1, 1, 8},
    {"odd", 2, 3, 7, 7, 5},
    {"ragged", 2, 2, 129, 129, 64},
    {"c2p-only", 1, 2, 100, 100, 24, true, false},
    {"p2c-only", 1, 2, 100, 100, 24, false, true},
    {"neither", 1, 2, 100, 100, 24, false, false},
    {"far", 1, 2, 300, 300, 16},
    {"parts", 1, 1, 450, 400, 16},
    {"cross", 1, 2, 70, 250, 16, true, true, Case::kNone, 0, 200},
    {"all-far", 1, 1, 40, 60, 16, true, true, Case::kNone, 0, -500},
    {"padding", 2, 2, 150, 150, 16, true, true, Case::kPadding},
    {"pairs", 2, 2, 150, 150, 16, true, true, Case::kPairs},
    {"dropout", 2, 2, 140, 140, 16, true, true, Case::kNone, 0.3},
    {"bfloat16", 1, 2, 140, 140, 16, true, true, Case::kPadding, 0, 0, Element::bfloat16},
    {"float16", 1, 2, 140, 140, 16, true, true, Case::kNone, 0, 0, Element::float16},
    {"packed", 1, 2, 210, 210, 16, true, true, Case::kNone, 0, 0, Element::float32, {3, 0, 150, 57}},
    {"shared-rows", 2, 2, 260, 270, 16, true, true, Case::kNone, 0, 0, Element::float32, {}, 200, 4},
    {"shared-rows-in-parts", 1, 1, 450, 400, 16, true, true, Case::kPairs, 0, -30, Element::float32, {}, 300, 3},
    {"rows-left-out", 1, 2, 150, 150, 16, true, true, Case::kPadding, 0, 0, Element::float32, {}, 70, 2, 5},
};

// Distances up to 8 have their own row, as all have in DeBERTa v1; beyond, `share` neighbours have one row, up to the
// distance `reach`. Each row is followed by skip - 1 rows that nobody reads.
int64_t bucket(const Case& c, int64_t distance) {
  const int64_t size = std::min(std::abs(distance), c.reach);
  const int64_t shared = size <= 8 ? size : 8 + (size - 8 + c.share - 1) / c.share;
  return (distance < 0 ? -shared : shared) * c.skip;
}
int64_t rows_of(const Case& c) { return 2 * bucket(c, c.reach); }
int64_t slot(const Case& c, int64_t distance) { return std::min(bucket(c, distance) + rows_of(c) / 2, rows_of(c) - 1); }

// Numbers of one element type, and the same as float64.
struct Numbers {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Doubles exact;
  Element element;

  Numbers(int64_t count, Element e) : exact(count), element(e) {
    static uint64_t state = 1;
    floats.resize(count), halves.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int n = 0; n < 12; ++n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        total += static_cast<double>(state >> 11) * 0x1p-53;
      }
      // Few bits: exact in every element type.
      const float x = static_cast<float>(std::nearbyint((total - 6) * 64) / 64);
      exact[i] = floats[i] = x;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      halves[i] = static_cast<uint16_t>(bits >> 16);
      if (e == Element::float16) halves[i] = to_float16(x);
      if (e == Element::bfloat16) {
        bits &= 0xffff0000u;
        float kept;
        std::memcpy(&kept, &bits, 4);
        exact[i] = kept;
      }
    }
  }
  static uint16_t to_float16(float x) {
    if (x == 0) return 0;
    int exponent;
    const double mantissa = std::frexp(std::fabs(x), &exponent);
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 |
                                 (static_cast<int>(std::nearbyint(mantissa * 2048)) & 1023));
  }
  void* data() { return element == Element::float32 ? static_cast<void*>(floats.data()) : halves.data(); }
  double got(int64_t i) const {
    if (element == Element::float32) return floats[i];
    uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    if (element == Element::float16) {
      const int exponent = halves[i] >> 10 & 31, mantissa = halves[i] & 1023;
      const double x = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
      return halves[i] & 0x8000 ? -x : x;
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

// Philox-4x32-7 as csrc/README.md has it (12).
bool kept(uint64_t seed, uint32_t below, int64_t batch_head, int64_t i, int64_t j) {
  uint32_t c[4] = {static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i), static_cast<uint32_t>(batch_head), 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
  }
  return (c[j % 8 / 2] >> (16 * (j % 2)) & 0xffff) >= below;
}

bool check(const Case& c, const char* what, const Doubles& want, const std::function<double(int64_t)>& got) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got(static_cast<int64_t>(i)) - want[i]);
    if (std::isinf(want[i]) && got(static_cast<int64_t>(i)) == want[i]) continue;
    worst = error <= worst ? worst : error;  // NaN stays
    largest = std::max(largest, std::fabs(want[i]));
  }
  const double eps = c.element == Element::float32 ? 0x1p-23 : c.element == Element::bfloat16 ? 0x1p-8 : 0x1p-11;
  const bool right = worst <= 8 * eps * (largest + 0.1);
  if (!right) std::printf("%s: %s is wrong by %g, the largest being %g\n", c.name, what, worst, largest);
  return right;
}

bool run(const Case& c, const Kernels& kernels) {
  const int64_t D = c.size, H = c.heads, Lq = c.queries, Lk = c.keys, B = c.batch, R = rows_of(c);
  Numbers q(B * H * Lq * D, c.element), k(B * H * Lk * D, c.element), v(B * H * Lk * D, c.element);
  Numbers pos_key(H * R * D, c.element), pos_query(H * R * D, c.element), grad_output(B * H * Lq * D, c.element);
  Numbers grad_lse_given(B * H * Lq, Element::float32);
  std::vector<uint8_t> mask(c.mask == Case::kPairs ? B * Lq * Lk : B * Lk, 1);
  for (size_t i = 0; i < mask.size(); ++i) {
    if (c.mask == Case::kPadding) mask[i] = static_cast<int64_t>(i) % Lk < Lk - 40 && i % 7 != 3;
    if (c.mask == Case::kPairs) mask[i] = i / Lk % 5 != 2 && (i * 2654435761u >> 7) % 3 != 0;
  }
  std::vector<int32_t> slots;
  for (int64_t delta = -c.reach; delta <= c.reach; ++delta) slots.push_back(static_cast<int32_t>(slot(c, delta)));

  Attention a{};
  a.element = c.element, a.heads = H, a.size = D, a.query_offset = c.offset;
  a.scale = static_cast<float>(1 / std::sqrt(D * (1.0 + c.c2p + c.p2c)));
  const auto dense = [&](Numbers& x, int64_t rows) { return Heads{x.data(), H * rows * D, rows * D, D}; };
  a.query = dense(q, Lq), a.key = dense(k, Lk), a.value = dense(v, Lk);
  if (c.c2p) a.pos_key = {pos_key.data(), R * D, D};
  if (c.p2c) a.pos_query = {pos_query.data(), R * D, D};
  a.slots = slots.data(), a.reach = c.reach, a.table_rows = R;
  a.far_past = c.reach, a.far_future = -c.reach;
  while (slot(c, a.far_past - 1) == slot(c, c.reach)) --a.far_past;
  while (slot(c, a.far_future + 1) == slot(c, -c.reach)) ++a.far_future;
  if (c.mask != Case::kNone) {
    a.mask = mask.data(), a.mask_key = 1;
    a.mask_query = c.mask == Case::kPairs ? Lk : 0;
    a.mask_batch = c.mask == Case::kPairs ? Lq * Lk : Lk;
  }
  if (c.dropout > 0) {
    a.dropout = true, a.seed = 0x123456789abcdefu;
    a.drop_below = static_cast<uint32_t>(std::lround(c.dropout * 0x1p16));
    a.keep_scale = static_cast<float>(1 / (1 - a.drop_below * 0x1p-16));
    a.origin = {1000, 408, 7, 5};
  }
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < B && c.packed.empty(); ++b) sequences.push_back({b, 0, 0, Lq, Lk, 0});
  int64_t start = 0;
  for (int64_t length : c.packed) sequences.push_back({0, start, start, length, length, 0}), start += length;

  // The definition.
  Doubles output(B * H * Lq * D), lse(B * H * Lq, -INFINITY), grad_q(output.size()), grad_k(B * H * Lk * D);
  Doubles grad_v(grad_k.size()), grad_pk(H * R * D), grad_pq(H * R * D);
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int64_t h = 0; h < H; ++h) {
      const Sequence& sequence = sequences[s];
      const int64_t q0 = (sequence.batch * H + h) * Lq + sequence.first_query;
      const int64_t k0 = (sequence.batch * H + h) * Lk + sequence.first_key;
      for (int64_t i = 0; i < sequence.queries; ++i) {
        Doubles z(sequence.keys), p(sequence.keys), keep(sequence.keys, 1.0);
        std::vector<int64_t> rows(sequence.keys);
        double total = 0, delta = -grad_lse_given.exact[q0 + i];
        for (int64_t j = 0; j < sequence.keys; ++j) {
          rows[j] = h * R + slot(c, i + c.offset - j);
          for (int64_t d = 0; d < D; ++d) {
            const double qd = q.exact[(q0 + i) * D + d], kd = k.exact[(k0 + j) * D + d];
            z[j] +=
                qd * kd + c.c2p * qd * pos_key.exact[rows[j] * D + d] + c.p2c * kd * pos_query.exact[rows[j] * D + d];
          }
          const int64_t cell = sequence.batch * a.mask_batch + i * a.mask_query + j;
          const bool see = a.mask == nullptr || mask[cell];
          total += p[j] = see ? std::exp(a.scale * z[j]) : 0;
          if (c.dropout > 0) keep[j] = kept(a.seed, a.drop_below, 7 + s * 5 + h, 1000 + i, 408 + j) ? a.keep_scale : 0;
        }
        if (total == 0) continue;
        lse[q0 + i] = std::log(total);
        Doubles grad_p(sequence.keys);
        for (int64_t j = 0; j < sequence.keys; ++j) {
          p[j] /= total;
          for (int64_t d = 0; d < D; ++d) {
            const double g = grad_output.exact[(q0 + i) * D + d];
            output[(q0 + i) * D + d] += keep[j] * p[j] * v.exact[(k0 + j) * D + d];
            grad_v[(k0 + j) * D + d] += keep[j] * p[j] * g;
            grad_p[j] += keep[j] * g * v.exact[(k0 + j) * D + d];
          }
          delta += p[j] * grad_p[j];
        }
        for (int64_t j = 0; j < sequence.keys; ++j) {
          const double grad_z = a.scale * p[j] * (grad_p[j] - delta);
          for (int64_t d = 0; d < D; ++d) {
            const int64_t row = rows[j] * D + d;
            const double qd = q.exact[(q0 + i) * D + d], kd = k.exact[(k0 + j) * D + d];
            grad_q[(q0 + i) * D + d] += grad_z * (kd + c.c2p * pos_key.exact[row]);
            grad_k[(k0 + j) * D + d] += grad_z * (qd + c.p2c * pos_query.exact[row]);
            grad_pk[row] += grad_z * qd, grad_pq[row] += grad_z * kd;
          }
        }
      }
    }
  }

  // The kernels, the ranges of a loop shared out to three threads.
  const ParallelFor parallel_for = [](int64_t count, const std::function<void(int64_t, int64_t)>& share) {
    std::vector<std::thread> threads;
    for (int64_t n = 0; n < 3; ++n) {
      const int64_t begin = count * n / 3, end = count * (n + 1) / 3;
      if (begin < end) threads.emplace_back(share, begin, end);
    }
    for (std::thread& thread : threads) thread.join();
  };
  Numbers out(output.size(), c.element), dq(grad_q.size(), c.element), dk(grad_k.size(), c.element);
  Numbers dv(grad_v.size(), c.element), dpk(grad_pk.size(), c.element), dpq(grad_pq.size(), c.element);
  std::vector<float> lse_got(lse.size());
  const Statistic statistic{lse_got.data(), H * Lq, Lq, 1};
  Request request{a, sequences};
  run_forward(kernels, request, {dense(out, Lq), statistic}, parallel_for);
  Backward b{};
  b.output = dense(out, Lq), b.grad_output = dense(grad_output, Lq);
  b.lse = statistic, b.grad_lse = {grad_lse_given.floats.data(), H * Lq, Lq, 1};
  b.grad_query = dense(dq, Lq), b.grad_key = dense(dk, Lk), b.grad_value = dense(dv, Lk);
  b.grad_pos_key = c.c2p ? dpk.data() : nullptr, b.grad_pos_query = c.p2c ? dpq.data() : nullptr;
  run_backward(kernels, request, b, parallel_for);

  const auto same = [&](const char* what, const Doubles& want, const Numbers& got) {
    return check(c, what, want, [&](int64_t i) { return got.got(i); });
  };
  const bool right = same("output", output, out) && check(c, "lse", lse, [&](int64_t i) { return lse_got[i]; }) &&
                     same("grad_query", grad_q, dq) && same("grad_key", grad_k, dk) && same("grad_value", grad_v, dv) &&
                     (!c.c2p || same("grad_pos_key", grad_pk, dpk)) && (!c.p2c || same("grad_pos_query", grad_pq, dpq));
  if (right) std::printf("%s\n", c.name);
  return right;
}

#if !defined(DEBERTA_FAST_TILES)  // whose kernels are for attention in bfloat16 alone
// The norm of a sum, in two parts of rows.
bool run_norm(int64_t rows, int64_t size, Element element, const NormKernels& kernels) {
  Case c{"norm", 1, 1, rows, rows, size};
  c.element = element;
  const int64_t all = rows * size;
  Numbers x(all, element), residual(all, element), weight(size, element), bias(size, element), dy(all, element);
  Doubles y(all), grad_sum(all), grad_weight(size), grad_bias(size);
  constexpr double kEps = 0.01;
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0, total = 0, along = 0;
    Doubles s(size), dz(size);
    for (int64_t d = 0; d < size; ++d) s[d] = x.exact[r * size + d] + residual.exact[r * size + d], mean += s[d] / size;
    for (int64_t d = 0; d < size; ++d) variance += (s[d] - mean) * (s[d] - mean) / size;
    const double q = 1 / std::sqrt(variance + kEps);
    for (int64_t d = 0; d < size; ++d) {
      const double z = (s[d] - mean) * q, g = dy.exact[r * size + d];
      y[r * size + d] = z * weight.exact[d] + bias.exact[d];
      grad_weight[d] += g * z, grad_bias[d] += g;
      dz[d] = g * weight.exact[d], total += dz[d] / size, along += dz[d] * z / size;
    }
    for (int64_t d = 0; d < size; ++d) grad_sum[r * size + d] = q * (dz[d] - total - (s[d] - mean) * q * along);
  }
  Numbers sum(all, element), out(all, element), dsum(all, element), dweight(size, element), dbias(size, element);
  std::vector<float> mean(rows), inverse_root(rows), partial(2 * 2 * size);
  AddNorm a{};
  a.element = element, a.rows = rows, a.size = size, a.eps = kEps;
  a.x = x.data(), a.residual = residual.data(), a.weight = weight.data(), a.bias = bias.data();
  a.output = out.data();
  kernels.add_norm(a, 0, rows);
  const auto same = [&](const char* what, const Doubles& want, const Numbers& got) {
    return check(c, what, want, [&](int64_t i) { return got.got(i); });
  };
  if (!same("output without statistics", y, out)) return false;
  a.sum = sum.data(), a.mean = mean.data(), a.inverse_root = inverse_root.data();
  kernels.add_norm(a, 0, rows / 2), kernels.add_norm(a, rows / 2, rows);
  AddNormBackward b{};
  b.element = element, b.rows = rows, b.size = size, b.grad_output = dy.data(), b.sum = sum.data();
  b.weight = weight.data(), b.mean = mean.data(), b.inverse_root = inverse_root.data(), b.grad_sum = dsum.data();
  b.partial = partial.data();
  kernels.add_norm_backward(b, 0, 0, rows / 2), kernels.add_norm_backward(b, 1, rows / 2, rows);
  kernels.store_norm_sums(b, 2, 0, dweight.data()), kernels.store_norm_sums(b, 2, 1, dbias.data());
  return same("output", y, out) && same("grad_sum", grad_sum, dsum) && same("grad_weight", grad_weight, dweight) &&
         same("grad_bias", grad_bias, dbias);
}

#endif

}  // namespace

int main() {
#if defined(DEBERTA_FAST_TILES)
  for (Case c : kCases) {
    c.element = Element::bfloat16;
    if (!run(c, DEBERTA_FAST_ISA::kernels)) return 1;
  }
#else
  for (const Case& c : kCases) {
    if (!run(c, DEBERTA_FAST_ISA::kernels)) return 1;
  }
  for (const Element element : {Element::float32, Element::bfloat16, Element::float16}) {
    for (const int64_t size : {1, 5, 64, 100, 131}) {
      if (!run_norm(7, size, element, DEBERTA_FAST_ISA::norm_kernels)) return 1;
    }
  }
  std::puts("norm");
#endif
  std::puts("ok");
}
