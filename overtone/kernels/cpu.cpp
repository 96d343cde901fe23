// The closed form, see closed_form.py, for rows of logits in a CPU's memory; and the Python module that calls it.
//
// setup.py compiles this file once for each kind of vector instructions, with ROWS as the name of what comes of it, and
// once without ROWS, as the module overtone.kernels._cpu, which chooses among those at run time. Tensors come as
// addresses and strides, so that nothing of torch is needed to build it.

#if !defined(ROWS)
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <dlfcn.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

enum Storage : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// One call. Real is double for float64 logits, else float. Strides are those of rows, whose entries are contiguous.
struct Call {
  Storage storage;
  const void* logits;     // (N, V)
  const int64_t* labels;  // (N,)
  int64_t rows, vocabulary, logits_stride;
  void* coefficients;  // (5, N) Real
  int64_t coefficients_stride;
  void* gradient;  // (N, V) like logits, in whose place it may be; null where it is not wanted
  int64_t gradient_stride;

  // Of fit alone:
  int64_t ignore_index;
  double n_sigma, lam;  // n_sigma infinite for no filter
  bool check;
  double epsilon;
  bool correct_only;
  double row_weight;
  void *token_loss, *kl, *row_weights;  // (N,) Real

  // Of gradient alone:
  const void* grad_kl;  // (N,) Real

  // Of the sums over a part of the vocabulary alone, which go where the coefficients do:
  const void *tops, *thresholds;  // (N,) Real, of whole rows
};

// Functions over the rows from begin to end.
struct Rows {
  void (*fit)(const Call&, int64_t begin, int64_t end);
  void (*gradient)(const Call&, int64_t begin, int64_t end);
  void (*highest)(const Call&, int64_t begin, int64_t end);
  void (*sums)(const Call&, int64_t begin, int64_t end);
  void (*kept)(const Call&, int64_t begin, int64_t end);
};

extern const Rows rows_baseline, rows_avx2, rows_avx512;

#if defined(ROWS)
// ---- Rows: every look at a row's logits but the first one is at the cache. ----

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

// Vectors of GCC's and Clang's own: arithmetic is element by element, and a comparison gives a mask for ?:.
typedef float Float __attribute__((vector_size(BYTES)));
typedef double Double __attribute__((vector_size(BYTES)));
typedef uint32_t Bits32 __attribute__((vector_size(BYTES)));
typedef uint64_t Bits64 __attribute__((vector_size(BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Half-precision logits are worked with in float.
template <typename Logit>
using RealOf = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
template <typename Real>
using VectorOf = std::conditional_t<std::is_same_v<Real, double>, Double, Float>;

template <typename Real>
constexpr Real INFINITE = std::numeric_limits<Real>::infinity();

// Logits further below the top than this, -log of the smallest normal float32, take no part in the standard deviation.
constexpr double UNDERFLOW_DISTANCE = 87.33654475055310898;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp(x) to about a unit in the last place, for x up to 88; 0 where it would be denormal.
inline Float exp_of(Float x) {
  constexpr float SHIFT = 12582912;  // 1.5 * 2**23: adding it rounds to a whole number, in the lowest bits
  const Float shifted = x * 1.44269504f + SHIFT;
  const Float exponent = shifted - SHIFT;
  Float rest = x - exponent * 0.693145752f;  // ln 2 in two parts, of which the product with the first is exact
  rest = rest - exponent * 1.42860677e-6f;
  Float series = rest * (1.f / 5040) + 1.f / 720;
  series = series * rest + 1.f / 120;
  series = series * rest + 1.f / 24;
  series = series * rest + 1.f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.f;
  series = series * rest + 1.f;
  const Bits32 power = (bit_cast<Bits32>(shifted) + (127 - 0x4b400000u)) << 23;
  return x < static_cast<float>(-UNDERFLOW_DISTANCE) ? Float{} : series * bit_cast<Float>(power);
}

// The same in double, for x up to 708.
inline Double exp_of(Double x) {
  constexpr double SHIFT = 6755399441055744;  // 1.5 * 2**52
  const Double shifted = x * 1.4426950408889634 + SHIFT;
  const Double exponent = shifted - SHIFT;
  Double rest = x - exponent * 0.69314718036912382;
  rest = rest - exponent * 1.9082149292705877e-10;
  Double series = rest * (1. / 6227020800) + 1. / 479001600;
  for (const double factorial : {39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.})
    series = series * rest + 1. / factorial;
  const Bits64 power = (bit_cast<Bits64>(shifted) + (1023 - 0x4338000000000000u)) << 52;
  return x < -708. ? Double{} : series * bit_cast<Double>(power);
}

// Conversions whose every step is a normal number: denormal ones may be flushed to zero in the caller's process.
inline Float to_float(Bits16 halves, Half) {
  const Bits32 bits = __builtin_convertvector(halves, Bits32);
  const Bits32 magnitude = (bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const Bits32 denormal = bit_cast<Bits32>(bit_cast<Float>(magnitude + 0x38800000u) - 0x1p-14f);
  const Bits32 normal = magnitude + (exponent == 0x0f800000u ? Bits32{} + 0x70000000u : Bits32{} + 0x38000000u);
  return bit_cast<Float>((exponent == 0u ? denormal : normal) | (bits & 0x8000u) << 16);
}

inline Float to_float(Bits16 halves, BFloat16) {
  return bit_cast<Float>(__builtin_convertvector(halves, Bits32) << 16);
}

// To the nearest, ties to even.
inline Bits16 from_float(Float value, Half) {
  const Bits32 bits = bit_cast<Bits32>(value), magnitude = bits & 0x7fffffffu;
  const Bits32 special = magnitude > 0x7f800000u ? Bits32{} + 0x7e00u : Bits32{} + 0x7c00u;
  const Bits32 denormal = bit_cast<Bits32>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 finite = magnitude < 0x38800000u ? denormal : normal;
  return __builtin_convertvector((magnitude >= 0x47800000u ? special : finite) | (bits & 0x80000000u) >> 16, Bits16);
}

inline Bits16 from_float(Float value, BFloat16) {
  const Bits32 bits = bit_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? Bits32{} + 0x7fc0u : rounded, Bits16);
}

// Two vectors: two sums that do not wait for each other.
template <typename Logit>
struct Pair {
  using Real = RealOf<Logit>;
  using Vector = VectorOf<Real>;
  static constexpr int LANES = BYTES / sizeof(Real), SIZE = 2 * LANES;
  Vector parts[2];

  static Pair of(Real value) { return {{Vector{} + value, Vector{} + value}}; }

  static Pair load(const Logit* from) {
    Pair pair;
    for (int i = 0; i < 2; i++) {
      if constexpr (sizeof(Logit) == 2) {
        Bits16 halves;
        std::memcpy(&halves, from + i * LANES, sizeof halves);
        pair.parts[i] = to_float(halves, Logit{});
      } else {
        std::memcpy(&pair.parts[i], from + i * LANES, sizeof pair.parts[i]);
      }
    }
    return pair;
  }

  void store(Logit* to) const {
    for (int i = 0; i < 2; i++) {
      if constexpr (sizeof(Logit) == 2) {
        const Bits16 halves = from_float(parts[i], Logit{});
        std::memcpy(to + i * LANES, &halves, sizeof halves);
      } else {
        std::memcpy(to + i * LANES, &parts[i], sizeof parts[i]);
      }
    }
  }

  double sum() const {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += parts[0][lane] + parts[1][lane];
    return sum;
  }

  Real highest() const {
    const Vector both = parts[0] > parts[1] ? parts[0] : parts[1];
    Real highest = both[0];
    for (int lane = 1; lane < LANES; lane++) highest = both[lane] > highest ? both[lane] : highest;
    return highest;
  }

  Real lowest() const {
    const Vector both = parts[0] < parts[1] ? parts[0] : parts[1];
    Real lowest = both[0];
    for (int lane = 1; lane < LANES; lane++) lowest = both[lane] < lowest ? both[lane] : lowest;
    return lowest;
  }
};

template <typename Logit>
RealOf<Logit> to_real(Logit logit) {
  if constexpr (sizeof(Logit) == 2)
    return to_float(Bits16{} + logit.bits, Logit{})[0];
  else
    return logit;
}

template <typename Logit>
Logit to_logit(RealOf<Logit> value) {
  if constexpr (sizeof(Logit) == 2)
    return {from_float(Float{} + value, Logit{})[0]};
  else
    return value;
}

// Calls visit(pair, index) for the logits from begin to end, the last pair filled up with -inf.
template <typename Logit, typename Visit>
inline void visit_pairs(const Logit* logits, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t SIZE = Pair<Logit>::SIZE;
  int64_t index = begin;
  for (; index + SIZE <= end; index += SIZE) visit(Pair<Logit>::load(logits + index), index);
  if (index == end) return;
  Logit filled[SIZE];
  const Logit fill = to_logit<Logit>(-INFINITE<RealOf<Logit>>);
  for (int64_t i = 0; i < SIZE; i++) filled[i] = index + i < end ? logits[index + i] : fill;
  visit(Pair<Logit>::load(filled), index);
}

// A row goes through in chunks, whose sums are added up in double.
struct Chunks {
  static constexpr int64_t MOST = 256;
  int64_t vocabulary, size, count;

  explicit Chunks(int64_t vocabulary) : vocabulary(vocabulary), size(1024) {
    while (size * MOST < vocabulary) size *= 2;
    count = (vocabulary + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < vocabulary ? (chunk + 1) * size : vocabulary; }
};

// As closed_form.py has them.
template <typename Real>
struct Coefficients {
  Real log_normaliser, threshold, kept_factor, label_gradient, is_first_choice;
};

template <typename Real>
struct FittedRow {
  double kl;
  Coefficients<Real> coefficients;
};

template <typename Logit, typename Real = RealOf<Logit>>
FittedRow<Real> fit_row(const Logit* logits, int64_t vocabulary, int64_t label_index, const Call& call) {
  using P = Pair<Logit>;
  using Vector = typename P::Vector;
  const Vector zero{}, one = zero + Real(1);
  const Chunks chunks(vocabulary);

  Real tops[Chunks::MOST], bottoms[Chunks::MOST];  // of a chunk that was filled up the bottom is -inf
  double sums[Chunks::MOST];
  Real top = -INFINITE<Real>;
  bool is_nan = false;
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    P highest = P::of(-INFINITE<Real>), lowest = P::of(INFINITE<Real>), sum = P::of(0);
    visit_pairs(logits, begin, end, [&](const P& scores, int64_t) {
      for (int i = 0; i < 2; i++) {
        const Vector& score = scores.parts[i];
        highest.parts[i] = score > highest.parts[i] ? score : highest.parts[i];
        lowest.parts[i] = score < lowest.parts[i] ? score : lowest.parts[i];
        sum.parts[i] += score;
      }
    });
    tops[chunk] = highest.highest();
    bottoms[chunk] = lowest.lowest();
    sums[chunk] = sum.sum();
    top = tops[chunk] > top ? tops[chunk] : top;
    is_nan |= sums[chunk] != sums[chunk];
  }
  if (is_nan) {  // or a sum overflowed
    is_nan = false;
    for (int64_t i = 0; i < vocabulary; i++) is_nan |= to_real(logits[i]) != to_real(logits[i]);
  }
  if (is_nan || !(std::fabs(top) < INFINITE<Real>)) {
    constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
    return {nan, {nan, nan, nan, nan, 0}};
  }

  const Real cut = top - static_cast<Real>(UNDERFLOW_DISTANCE);
  double count = 0, sum = 0;
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    if (bottoms[chunk] >= cut) {
      count += end - begin;
      sum += sums[chunk];
    } else if (tops[chunk] >= cut) {
      P counts = P::of(0), chunk_sum = P::of(0);
      visit_pairs(logits, begin, end, [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          counts.parts[i] += score >= cut ? one : zero;
          chunk_sum.parts[i] += score >= cut ? score : zero;
        }
      });
      count += counts.sum();
      sum += chunk_sum.sum();
    }
  }

  const Real mean = static_cast<Real>(sum / count);
  double squares = 0, below = 0, on_top = 0;
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    if (tops[chunk] < cut) continue;
    P chunk_squares = P::of(0), chunk_below = P::of(0);
    if (bottoms[chunk] >= cut && tops[chunk] < top) {
      visit_pairs(logits, begin, end, [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector deviation = scores.parts[i] - mean;
          chunk_squares.parts[i] += deviation * deviation;
          chunk_below.parts[i] += exp_of(scores.parts[i] - top);
        }
      });
    } else {
      P chunk_on_top = P::of(0);
      visit_pairs(logits, begin, end, [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          const Vector deviation = score >= cut ? score - mean : zero;
          chunk_squares.parts[i] += deviation * deviation;
          chunk_below.parts[i] += score < top ? exp_of(score - top) : zero;
          chunk_on_top.parts[i] += score < top ? zero : one;
        }
      });
      on_top += chunk_on_top.sum();
    }
    squares += chunk_squares.sum();
    below += chunk_below.sum();
  }

  const double deviation = std::sqrt(squares / (count > 2 ? count - 1 : 1));
  // Just below the top at most, so that the top is kept like any other. What is just below 0 is 0 where denormal
  // numbers are flushed.
  const Real below_top = top == 0 ? -std::numeric_limits<Real>::min() : std::nextafter(top, -INFINITE<Real>);
  Real threshold = std::isinf(call.n_sigma) ? -INFINITE<Real> : static_cast<Real>(top - call.n_sigma * deviation);
  threshold = below_top < threshold ? below_top : threshold;
  double kept_below = below;
  if (threshold > -INFINITE<Real>) {
    kept_below = 0;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      if (!(tops[chunk] > threshold)) continue;
      P kept = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          const Vector weight = score > threshold ? exp_of(score - top) : zero;
          kept.parts[i] += score < top ? weight : zero;
        }
      });
      kept_below += kept.sum();
    }
  }

  const double lam = call.lam;
  const Real label = to_real(logits[label_index]);
  const bool is_label_on_top = label == top, is_label_kept = label > threshold;
  const double label_weight = std::exp(static_cast<double>(label) - top);
  const double label_below = is_label_on_top ? 0 : label_weight;
  const double kept_label_weight = is_label_kept ? label_weight : 0;
  const double others_on_top = on_top - is_label_on_top;
  const double rest = others_on_top + (below - label_below);
  const double kept_rest = others_on_top + (kept_below - (is_label_kept ? label_below : 0));
  const double total = rest + label_weight, kept = kept_rest + kept_label_weight;
  const double log_total = std::log1p(rest + (label_weight - 1));
  const double label_log_prob = static_cast<double>(label) - top - log_total;
  const double kept_share = kept / total, dropped_share = (below - kept_below) / total;
  const double label_filtered = kept_label_weight / kept;
  const double label_target = lam + (1 - lam) * label_filtered;

  double kl = -label_log_prob, kept_factor = 1, label_gradient = -rest / total;
  // A label that is alone on top stays there whatever is mixed in.
  if (!call.check || others_on_top == 0 || label_target > (1 - lam) / kept) {
    const double own = label_target == 0 ? 0 : label_target * (std::log(label_target) - label_log_prob);
    const double others = lam == 1 ? 0 : (1 - lam) * (kept_rest / kept) * (std::log1p(-lam) - std::log(kept_share));
    kl = own + others;
    kept_factor = (lam - dropped_share) / kept_share;
    label_gradient = is_label_kept ? -lam * (rest / total) - (1 - lam) * label_filtered * dropped_share
                                   : label_weight / total - lam;
  }
  return {kl < 0 ? 0 : kl,
          {static_cast<Real>(top + log_total), threshold, static_cast<Real>(kept_factor),
           static_cast<Real>(label_gradient), static_cast<Real>(is_label_on_top && others_on_top == 0)}};
}

// Writes scale * dKL/dlogits, for a slice of the vocabulary too, of which a label that is not in it is no part.
template <typename Logit, typename Real = RealOf<Logit>>
void write_gradient(const Coefficients<Real>& row, Real scale, const Logit* logits, int64_t vocabulary, int64_t label,
                    Logit* out) {
  using P = Pair<Logit>;
  using Vector = typename P::Vector;
  if (scale == 0) {
    std::memset(static_cast<void*>(out), 0, vocabulary * sizeof(Logit));
    return;
  }
  const Vector scales = Vector{} + scale, kept_scales = Vector{} + row.kept_factor * scale;
  visit_pairs(logits, 0, vocabulary, [&](const P& scores, int64_t index) {
    P gradient = scores;
    for (Vector& part : gradient.parts)
      part = exp_of(part - row.log_normaliser) * (part > row.threshold ? kept_scales : scales);
    if (index + P::SIZE <= vocabulary) {
      gradient.store(out + index);
    } else {
      Logit last[P::SIZE];
      gradient.store(last);
      std::memcpy(static_cast<void*>(out + index), last, (vocabulary - index) * sizeof(Logit));
    }
  });
  if (label >= 0 && label < vocabulary) out[label] = to_logit<Logit>(row.label_gradient * scale);
}

template <typename Real>
void write_coefficients(const Call& call, int64_t index, const Coefficients<Real>& row) {
  Real* const column = static_cast<Real*>(call.coefficients) + index;
  int64_t which = 0;
  for (const Real value :
       {row.log_normaliser, row.threshold, row.kept_factor, row.label_gradient, row.is_first_choice})
    column[call.coefficients_stride * which++] = value;
}

template <typename Real>
Coefficients<Real> read_coefficients(const Call& call, int64_t index) {
  const Real* const column = static_cast<const Real*>(call.coefficients) + index;
  const int64_t stride = call.coefficients_stride;
  return {column[0], column[stride], column[2 * stride], column[3 * stride], column[4 * stride]};
}

template <typename Logit, typename Real = RealOf<Logit>>
void fit_rows(const Call& call, int64_t begin, int64_t end) {
  const Real epsilon = static_cast<Real>(call.epsilon);  // rounded, like the KL that it is compared with
  for (int64_t index = begin; index < end; index++) {
    const Logit* logits = static_cast<const Logit*>(call.logits) + index * call.logits_stride;
    const int64_t label = call.labels[index];
    const bool is_counted = label != call.ignore_index;
    const FittedRow<Real> row = is_counted ? fit_row(logits, call.vocabulary, label, call) : FittedRow<Real>{};
    const Real kl = static_cast<Real>(row.kl);
    const bool is_settled = kl < epsilon && (row.coefficients.is_first_choice || !call.correct_only);
    const Real weight = static_cast<Real>(is_counted && !is_settled ? call.row_weight : 0);
    write_coefficients(call, index, row.coefficients);
    static_cast<Real*>(call.kl)[index] = kl;
    static_cast<Real*>(call.token_loss)[index] = !is_counted ? 0 : is_settled ? epsilon : kl;
    static_cast<Real*>(call.row_weights)[index] = weight;
    if (call.gradient)
      write_gradient(row.coefficients, weight, logits, call.vocabulary, label,
                     static_cast<Logit*>(call.gradient) + index * call.gradient_stride);
  }
}

template <typename Logit, typename Real = RealOf<Logit>>
void write_gradients(const Call& call, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++)
    write_gradient(read_coefficients<Real>(call, index), static_cast<const Real*>(call.grad_kl)[index],
                   static_cast<const Logit*>(call.logits) + index * call.logits_stride, call.vocabulary,
                   call.labels[index], static_cast<Logit*>(call.gradient) + index * call.gradient_stride);
}

// ---- Sums over this rank's part of a row, of which the top is known only once all ranks have looked. ----

template <typename Logit>
const Logit* row_of(const Call& call, int64_t index) {
  return static_cast<const Logit*>(call.logits) + index * call.logits_stride;
}

template <typename Real>
Real& sum_of(const Call& call, int64_t which, int64_t index) {
  return static_cast<Real*>(call.coefficients)[which * call.coefficients_stride + index];
}

// Infinity where a logit is NaN, so that a maximum of all ranks does not lose it.
template <typename Logit, typename Real = RealOf<Logit>>
void write_highest(const Call& call, int64_t begin, int64_t end) {
  using P = Pair<Logit>;
  for (int64_t index = begin; index < end; index++) {
    P highest = P::of(-INFINITE<Real>), unordered = P::of(0);
    visit_pairs(row_of<Logit>(call, index), 0, call.vocabulary, [&](const P& scores, int64_t) {
      for (int i = 0; i < 2; i++) {
        const typename P::Vector& score = scores.parts[i];
        highest.parts[i] = score > highest.parts[i] ? score : highest.parts[i];
        unordered.parts[i] = score == score ? unordered.parts[i] : unordered.parts[i] + Real(1);
      }
    });
    sum_of<Real>(call, 0, index) = unordered.sum() > 0 ? INFINITE<Real> : highest.highest();
  }
}

// Count, mean and sum of squared deviations of the logits that count, weights below the top, and logits at the top.
template <typename Logit, typename Real = RealOf<Logit>>
void write_sums(const Call& call, int64_t begin, int64_t end) {
  using P = Pair<Logit>;
  using Vector = typename P::Vector;
  const Vector zero{}, one = zero + Real(1);
  const Chunks chunks(call.vocabulary);
  for (int64_t index = begin; index < end; index++) {
    const Logit* const logits = row_of<Logit>(call, index);
    const Real top = static_cast<const Real*>(call.tops)[index], cut = top - static_cast<Real>(UNDERFLOW_DISTANCE);
    double count = 0, sum = 0, squares = 0, below = 0, on_top = 0;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      P counts = P::of(0), scores_sum = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          counts.parts[i] += score >= cut ? one : zero;
          scores_sum.parts[i] += score >= cut ? score : zero;
        }
      });
      count += counts.sum();
      sum += scores_sum.sum();
    }
    const Real mean = static_cast<Real>(count ? sum / count : 0);
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      P chunk_squares = P::of(0), chunk_below = P::of(0), chunk_on_top = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          const Vector deviation = score >= cut ? score - mean : zero;
          chunk_squares.parts[i] += deviation * deviation;
          chunk_below.parts[i] += score < top ? exp_of(score - top) : zero;
          chunk_on_top.parts[i] += score == top ? one : zero;
        }
      });
      squares += chunk_squares.sum();
      below += chunk_below.sum();
      on_top += chunk_on_top.sum();
    }
    int64_t which = 0;
    for (const double value : {count, static_cast<double>(mean), squares, below, on_top})
      sum_of<Real>(call, which++, index) = static_cast<Real>(value);
  }
}

// Weights of what the filter keeps below the top.
template <typename Logit, typename Real = RealOf<Logit>>
void write_kept(const Call& call, int64_t begin, int64_t end) {
  using P = Pair<Logit>;
  using Vector = typename P::Vector;
  const Vector zero{};
  const Chunks chunks(call.vocabulary);
  for (int64_t index = begin; index < end; index++) {
    const Logit* const logits = row_of<Logit>(call, index);
    const Real top = static_cast<const Real*>(call.tops)[index];
    const Real threshold = static_cast<const Real*>(call.thresholds)[index];
    double kept = 0;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      P chunk_kept = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const Vector& score = scores.parts[i];
          const Vector weight = score > threshold ? exp_of(score - top) : zero;
          chunk_kept.parts[i] += score < top ? weight : zero;
        }
      });
      kept += chunk_kept.sum();
    }
    sum_of<Real>(call, 0, index) = static_cast<Real>(kept);
  }
}

void fit(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case FLOAT32: return fit_rows<float>(call, begin, end);
    case FLOAT64: return fit_rows<double>(call, begin, end);
    case BFLOAT16: return fit_rows<BFloat16>(call, begin, end);
    case FLOAT16: return fit_rows<Half>(call, begin, end);
  }
}

void gradient(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case FLOAT32: return write_gradients<float>(call, begin, end);
    case FLOAT64: return write_gradients<double>(call, begin, end);
    case BFLOAT16: return write_gradients<BFloat16>(call, begin, end);
    case FLOAT16: return write_gradients<Half>(call, begin, end);
  }
}

void highest(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case FLOAT32: return write_highest<float>(call, begin, end);
    case FLOAT64: return write_highest<double>(call, begin, end);
    case BFLOAT16: return write_highest<BFloat16>(call, begin, end);
    case FLOAT16: return write_highest<Half>(call, begin, end);
  }
}

void sums(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case FLOAT32: return write_sums<float>(call, begin, end);
    case FLOAT64: return write_sums<double>(call, begin, end);
    case BFLOAT16: return write_sums<BFloat16>(call, begin, end);
    case FLOAT16: return write_sums<Half>(call, begin, end);
  }
}

void kept(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case FLOAT32: return write_kept<float>(call, begin, end);
    case FLOAT64: return write_kept<double>(call, begin, end);
    case BFLOAT16: return write_kept<BFloat16>(call, begin, end);
    case FLOAT16: return write_kept<Half>(call, begin, end);
  }
}

}  // namespace

extern const Rows ROWS{fit, gradient, highest, sums, kept};

#else
// ---- The module ----

namespace {

struct Variant {
  const char* name;
  const Rows* rows;
};

// Those that this processor can run, the fastest first.
struct Variants {
  Variant variants[3];
  int64_t count = 0;

  Variants() {
#if defined(OVERTONE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      variants[count++] = {"avx512", &rows_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) variants[count++] = {"avx2", &rows_avx2};
#endif
    variants[count++] = {"baseline", &rows_baseline};
  }
};

const Variants VARIANTS;

// The OpenMP runtime that torch has loaded, found at run time: a second one would have threads of its own, which cost
// more than they give. Every runtime that torch is built with has these names; without them there is one thread.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();

  OpenMP()
      : parallel(find<decltype(parallel)>("GOMP_parallel")),
        thread(find<decltype(thread)>("omp_get_thread_num")),
        threads(find<decltype(threads)>("omp_get_num_threads")) {}
  bool is_there() const { return parallel && thread && threads; }

  template <typename Function>
  static Function find(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

// Below this many logits a thread takes longer to wake up than it saves.
constexpr int64_t THREAD_FROM = 1 << 15;

using RowsFunction = void (*)(const Call&, int64_t, int64_t);

struct Share {
  const OpenMP* openmp;
  RowsFunction function;
  const Call* call;
};

void run_share(void* data) {
  const Share& share = *static_cast<Share*>(data);
  const int64_t rows = share.call->rows, thread = share.openmp->thread(), threads = share.openmp->threads();
  share.function(*share.call, rows * thread / threads, rows * (thread + 1) / threads);
}

void run(RowsFunction function, const Call& call, int64_t threads) {
  static const OpenMP openmp;
  const int64_t most = call.rows * call.vocabulary / THREAD_FROM + 1;
  threads = threads < most ? threads : most;
  threads = threads < call.rows ? threads : call.rows;
  if (threads > 1 && openmp.is_there()) {
    Share share{&openmp, function, &call};
    openmp.parallel(run_share, &share, static_cast<unsigned>(threads), 0);
  } else {
    function(call, 0, call.rows);
  }
}

// Takes a call's arguments one after the other; afterwards PyErr_Occurred() says whether one was of the wrong type.
class Arguments {
 public:
  explicit Arguments(PyObject* const* next) : next_(next) {}
  int64_t integer() { return PyLong_AsLongLong(*next_++); }
  double number() { return PyFloat_AsDouble(*next_++); }
  void* address() { return PyLong_AsVoidPtr(*next_++); }

 private:
  PyObject* const* next_;
};

bool has_count(const char* name, Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, expected, count);
  return count == expected;
}

// Returns the rows of the variant that is asked for.
const Rows* read_tensors(Arguments& arguments, Call& call) {
  const int64_t variant = arguments.integer();
  call.storage = static_cast<Storage>(arguments.integer());
  call.logits = arguments.address();
  call.labels = static_cast<const int64_t*>(arguments.address());
  call.rows = arguments.integer();
  call.vocabulary = arguments.integer();
  call.logits_stride = arguments.integer();
  call.coefficients = arguments.address();
  call.coefficients_stride = arguments.integer();
  call.gradient = arguments.address();
  call.gradient_stride = arguments.integer();
  if (variant >= 0 && variant < VARIANTS.count) return VARIANTS.variants[variant].rows;
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "variant must be a place in VARIANTS");
  return nullptr;
}

bool are_labels_in_range(const Call& call) {
  for (int64_t index = 0; index < call.rows; index++) {
    const int64_t label = call.labels[index];
    if ((label < 0 || label >= call.vocabulary) && label != call.ignore_index) return false;
  }
  return true;
}

template <typename Real>
void write_sum(const Call& call, void* loss) {
  double sum = 0;
  for (int64_t index = 0; index < call.rows; index++) sum += static_cast<const Real*>(call.token_loss)[index];
  *static_cast<Real*>(loss) = static_cast<Real>(sum * call.row_weight);
}

// Returns False, and has written nothing, where a label is out of range.
PyObject* fit(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (!has_count("fit", count, 24)) return nullptr;
  Arguments arguments(values);
  Call call{};
  const Rows* const rows = read_tensors(arguments, call);
  call.ignore_index = arguments.integer();
  call.n_sigma = arguments.number();
  call.lam = arguments.number();
  call.check = arguments.integer();
  call.epsilon = arguments.number();
  call.correct_only = arguments.integer();
  const bool is_mean = arguments.integer();
  call.row_weight = arguments.number();
  void* const loss = arguments.address();
  call.token_loss = arguments.address();
  call.kl = arguments.address();
  call.row_weights = arguments.address();
  const int64_t threads = arguments.integer();
  if (!rows || PyErr_Occurred()) return nullptr;

  PyThreadState* const python = PyEval_SaveThread();
  const bool is_in_range = are_labels_in_range(call);
  if (is_in_range) {
    int64_t counted = 0;
    for (int64_t index = 0; index < call.rows; index++) counted += call.labels[index] != call.ignore_index;
    if (is_mean && counted) call.row_weight /= static_cast<double>(counted);
    run(rows->fit, call, threads);
    call.storage == FLOAT64 ? write_sum<double>(call, loss) : write_sum<float>(call, loss);
  }
  PyEval_RestoreThread(python);
  return PyBool_FromLong(is_in_range);
}

PyObject* gradient(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (!has_count("gradient", count, 13)) return nullptr;
  Arguments arguments(values);
  Call call{};
  const Rows* const rows = read_tensors(arguments, call);
  call.grad_kl = arguments.address();
  const int64_t threads = arguments.integer();
  if (!rows || PyErr_Occurred()) return nullptr;

  PyThreadState* const python = PyEval_SaveThread();
  run(rows->gradient, call, threads);
  PyEval_RestoreThread(python);
  Py_RETURN_NONE;
}

// What is named first of: highest, sums, kept.
PyObject* part(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (!has_count("part", count, 15)) return nullptr;
  Arguments arguments(values);
  const int64_t which = arguments.integer();
  Call call{};
  const Rows* const rows = read_tensors(arguments, call);
  call.tops = arguments.address();
  call.thresholds = arguments.address();
  const int64_t threads = arguments.integer();
  if (!rows || PyErr_Occurred()) return nullptr;
  const RowsFunction functions[] = {rows->highest, rows->sums, rows->kept};
  if (which < 0 || which > 2) {
    PyErr_SetString(PyExc_ValueError, "which must be 0, 1 or 2");
    return nullptr;
  }

  PyThreadState* const python = PyEval_SaveThread();
  run(functions[which], call, threads);
  PyEval_RestoreThread(python);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"fit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fit)), METH_FASTCALL, nullptr},
    {"gradient", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(gradient)), METH_FASTCALL, nullptr},
    {"part", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(part)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject* const created = PyModule_Create(&module);
  PyObject* const names = PyTuple_New(VARIANTS.count);
  if (!created || !names) return nullptr;
  for (int64_t index = 0; index < VARIANTS.count; index++)
    PyTuple_SetItem(names, index, PyUnicode_FromString(VARIANTS.variants[index].name));
  if (PyModule_AddObject(created, "VARIANTS", names) != 0) return nullptr;
  return PyModule_AddIntConstant(created, "INTERFACE", 1) == 0 ? created : nullptr;
}

#endif
