// closed_form.py for the CPU: a row at a time, so that every look at its logits but the first one is at the cache.
// Rows are shared out among threads; what is said of a row does not depend on how.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

using at::vec::Vectorized;

// Logits in half precision are worked with in float.
template <typename Storage>
using WorkingType = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

template <typename Real>
constexpr Real INFINITE = std::numeric_limits<Real>::infinity();

// exp(x) to about a unit in the last place, for x up to 88; 0 where it would soon be denormal. Unlike the vector
// library's it is inlined, which halves its time.
inline Vectorized<float> exp_of(const Vectorized<float>& x) {
  using V = Vectorized<float>;
  const V exponent = (x * V(1.44269504f)).round();
  V rest = at::vec::fmadd(exponent, V(-0.693145752f), x);  // ln 2 in two parts
  rest = at::vec::fmadd(exponent, V(-1.42860677e-6f), rest);
  V series(1.f / 5040);
  for (const float coefficient : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    series = at::vec::fmadd(series, rest, V(coefficient));
  const auto biased = at::vec::convert_to_int_of_same_size(exponent) + Vectorized<int32_t>(127);
  return V::blendv(series * at::vec::cast<float>(biased << Vectorized<int32_t>(23)), V(0), x < V(-87));
}

inline Vectorized<double> exp_of(const Vectorized<double>& x) { return x.exp(); }

// Two vectors, as many logits as half precision loads at once.
template <typename Storage>
struct Pair {
  using Real = WorkingType<Storage>;
  using V = Vectorized<Real>;
  static constexpr int64_t SIZE = 2 * V::size();
  V parts[2];

  static Pair of(Real value) { return {{V(value), V(value)}}; }

  static Pair load(const Storage* from) {
    if constexpr (sizeof(Storage) == 2) {
      const auto [first, second] = at::vec::convert_to_float<Storage>(Vectorized<Storage>::loadu(from));
      return {{first, second}};
    } else {
      return {{V::loadu(from), V::loadu(from + V::size())}};
    }
  }

  void store(Storage* to) const {
    if constexpr (sizeof(Storage) == 2) {
      at::vec::convert_from_float<Storage>(parts[0], parts[1]).store(to);
    } else {
      parts[0].store(to);
      parts[1].store(to + V::size());
    }
  }

  double sum() const {
    Real lanes[V::size()];
    (parts[0] + parts[1]).store(lanes);
    double sum = 0;
    for (const Real lane : lanes) sum += lane;
    return sum;
  }

  // NaN if any is.
  Real highest() const {
    Real lanes[V::size()];
    at::vec::maximum(parts[0], parts[1]).store(lanes);
    Real highest = lanes[0];
    for (const Real lane : lanes) highest = lane > highest || lane != lane ? lane : highest;
    return highest;
  }
};

// Calls visit(pair, index) for the logits from begin to end, the last pair filled up with -inf.
template <typename Storage, typename Visit>
inline void visit_pairs(const Storage* logits, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t SIZE = Pair<Storage>::SIZE;
  int64_t index = begin;
  for (; index + SIZE <= end; index += SIZE) visit(Pair<Storage>::load(logits + index), index);
  if (index == end) return;
  Storage filled[SIZE];
  for (int64_t i = 0; i < SIZE; i++)
    filled[i] = index + i < end ? logits[index + i] : static_cast<Storage>(-INFINITE<float>);
  visit(Pair<Storage>::load(filled), index);
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

struct Settings {
  double n_sigma, lam;  // n_sigma infinite for no filter
  int64_t check;
};

// As closed_form.py has them.
template <typename Real>
struct Coefficients {
  Real log_normaliser, threshold, kept_factor, label_gradient, is_first_choice;
};

template <typename Real>
struct Row {
  double kl;
  Coefficients<Real> coefficients;
};

template <typename Storage, typename Real = WorkingType<Storage>>
Row<Real> sums_of_row(const Storage* logits, int64_t vocabulary, int64_t label_index, const Settings& settings) {
  using P = Pair<Storage>;
  using V = typename P::V;
  const V zero(0), one(1), missing(-INFINITE<Real>);
  const Chunks chunks(vocabulary);

  Real tops[Chunks::MOST];
  bool is_plain[Chunks::MOST];  // every logit of the chunk, and their sum, is finite
  Real top = -INFINITE<Real>;
  double count = 0, sum = 0;
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    P highest = P::of(-INFINITE<Real>), chunk_sum = P::of(0);
    visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
      for (int i = 0; i < 2; i++) {
        highest.parts[i] = at::vec::maximum(highest.parts[i], scores.parts[i]);
        chunk_sum.parts[i] = chunk_sum.parts[i] + scores.parts[i];
      }
    });
    tops[chunk] = highest.highest();
    top = tops[chunk] > top || tops[chunk] != tops[chunk] ? tops[chunk] : top;
    const double sum_of_all = chunk_sum.sum();
    is_plain[chunk] = std::isfinite(sum_of_all);
    if (is_plain[chunk]) {
      count += chunks.end(chunk) - chunks.begin(chunk);
      sum += sum_of_all;
    } else {
      for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); i++) {
        const Real score = static_cast<Real>(logits[i]);
        const bool is_there = score > -INFINITE<Real>;
        count += is_there;
        sum += is_there ? score : 0;
      }
    }
  }
  if (!std::isfinite(top)) {
    constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
    return {nan, {nan, nan, nan, nan, 0}};
  }

  const V mean(static_cast<Real>(sum / count)), tops_of_row(top);
  double squares = 0, below = 0, on_top = 0;
  for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
    P chunk_squares = P::of(0), chunk_below = P::of(0);
    if (is_plain[chunk] && tops[chunk] < top) {
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const V deviation = scores.parts[i] - mean;
          chunk_squares.parts[i] = at::vec::fmadd(deviation, deviation, chunk_squares.parts[i]);
          chunk_below.parts[i] = chunk_below.parts[i] + exp_of(scores.parts[i] - tops_of_row);
        }
      });
    } else {
      P chunk_on_top = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const V& score = scores.parts[i];
          const V deviation = V::blendv(zero, score - mean, score > missing), is_below = score < tops_of_row;
          chunk_squares.parts[i] = at::vec::fmadd(deviation, deviation, chunk_squares.parts[i]);
          const V weight = V::blendv(zero, exp_of(score - tops_of_row), is_below);
          chunk_below.parts[i] = chunk_below.parts[i] + weight;
          chunk_on_top.parts[i] = chunk_on_top.parts[i] + V::blendv(one, zero, is_below);
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
  Real threshold = std::isinf(settings.n_sigma) ? -INFINITE<Real> : static_cast<Real>(top - settings.n_sigma * deviation);
  threshold = below_top < threshold ? below_top : threshold;
  double kept_below = below;
  if (threshold > -INFINITE<Real>) {
    const V thresholds(threshold);
    kept_below = 0;
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      if (!(tops[chunk] > threshold)) continue;
      P kept = P::of(0);
      visit_pairs(logits, chunks.begin(chunk), chunks.end(chunk), [&](const P& scores, int64_t) {
        for (int i = 0; i < 2; i++) {
          const V& score = scores.parts[i];
          const V is_kept = (score > thresholds) & (score < tops_of_row);
          kept.parts[i] = kept.parts[i] + V::blendv(zero, exp_of(score - tops_of_row), is_kept);
        }
      });
      kept_below += kept.sum();
    }
  }

  const double lam = settings.lam;
  const Real label = static_cast<Real>(logits[label_index]);
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
  if (!settings.check || others_on_top == 0 || label_target > (1 - lam) / kept) {
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
template <typename Storage, typename Real = WorkingType<Storage>>
void write_gradient_of_row(const Coefficients<Real>& row, Real scale, const Storage* logits, int64_t vocabulary,
                           int64_t label, Storage* out) {
  using P = Pair<Storage>;
  using V = typename P::V;
  if (scale == 0) {
    std::memset(out, 0, vocabulary * sizeof(Storage));
    return;
  }
  const V normalisers(row.log_normaliser), thresholds(row.threshold), scales(scale), kept_scales(row.kept_factor * scale);
  visit_pairs(logits, 0, vocabulary, [&](const P& scores, int64_t index) {
    P gradient = scores;
    for (V& part : gradient.parts)
      part = exp_of(part - normalisers) * V::blendv(scales, kept_scales, part > thresholds);
    if (index + P::SIZE <= vocabulary) {
      gradient.store(out + index);
    } else {
      Storage last[P::SIZE];
      gradient.store(last);
      std::memcpy(out + index, last, (vocabulary - index) * sizeof(Storage));
    }
  });
  if (label >= 0 && label < vocabulary) out[label] = static_cast<Storage>(row.label_gradient * scale);
}

// What every call is about. Strides are those of rows, whose entries lie one after the other.
struct Problem {
  int64_t storage;
  const void* logits;     // (N, V)
  const int64_t* labels;  // (N,)
  void* coefficients;     // (5, N)
  int64_t rows, vocabulary, logits_stride, coefficients_stride, ignore_index, threads;

  bool are_labels_in_range() const {
    for (int64_t index = 0; index < rows; index++)
      if ((labels[index] < 0 || labels[index] >= vocabulary) && labels[index] != ignore_index) return false;
    return true;
  }

  template <typename Storage>
  const Storage* row(int64_t index) const {
    return static_cast<const Storage*>(logits) + index * logits_stride;
  }

  template <typename Real>
  Real* coefficient(int which, int64_t index) const {
    return static_cast<Real*>(coefficients) + which * coefficients_stride + index;
  }

  template <typename Real>
  void keep(const Coefficients<Real>& row, int64_t index) const {
    *coefficient<Real>(0, index) = row.log_normaliser;
    *coefficient<Real>(1, index) = row.threshold;
    *coefficient<Real>(2, index) = row.kept_factor;
    *coefficient<Real>(3, index) = row.label_gradient;
    *coefficient<Real>(4, index) = row.is_first_choice;
  }

  template <typename Real>
  Coefficients<Real> kept(int64_t index) const {
    return {*coefficient<Real>(0, index), *coefficient<Real>(1, index), *coefficient<Real>(2, index),
            *coefficient<Real>(3, index), *coefficient<Real>(4, index)};
  }
};

template <typename Storage, typename Real = WorkingType<Storage>>
void write_gradient(const Problem& problem, const Real* grad_kl, Storage* out, int64_t out_stride) {
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1)
  for (int64_t index = 0; index < problem.rows; index++)
    write_gradient_of_row(problem.kept<Real>(index), grad_kl[index], problem.row<Storage>(index), problem.vocabulary,
                          problem.labels[index], out + index * out_stride);
}

struct Reduction {
  double epsilon, row_weight;  // of a mean the weight comes from the rows that count
  int64_t hold_correct, is_mean;
};

// Everything about the rows at once, and the gradient, unless it is null, while their logits are in the cache, in whose
// place it may be.
template <typename Storage, typename Real = WorkingType<Storage>>
void fit(const Problem& problem, const Settings& settings, const Reduction& reduction, Real* loss, Real* kl,
         Real* row_weights, Storage* gradient, int64_t gradient_stride) {
  // As whoever compares what is returned: rounded.
  const Real epsilon = static_cast<Real>(reduction.epsilon);
  int64_t counted = 0;
  for (int64_t index = 0; index < problem.rows; index++) counted += problem.labels[index] != problem.ignore_index;
  const double row_weight = reduction.is_mean ? 1. / (counted ? counted : 1) : reduction.row_weight;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1)
  for (int64_t index = 0; index < problem.rows; index++) {
    const Storage* logits = problem.row<Storage>(index);
    const int64_t label = problem.labels[index];
    Row<Real> row{};
    bool is_let_go = true;
    if (label != problem.ignore_index) {
      row = sums_of_row(logits, problem.vocabulary, label, settings);
      is_let_go = static_cast<Real>(row.kl) < epsilon && (row.coefficients.is_first_choice || !reduction.hold_correct);
    }
    problem.keep(row.coefficients, index);
    kl[index] = static_cast<Real>(row.kl);
    row_weights[index] = static_cast<Real>(is_let_go ? 0 : row_weight);
    if (gradient)
      write_gradient_of_row(row.coefficients, row_weights[index], logits, problem.vocabulary, label,
                            gradient + index * gradient_stride);
  }
  double sum = 0;
  for (int64_t index = 0; index < problem.rows; index++)
    if (problem.labels[index] != problem.ignore_index) sum += row_weights[index] == 0 ? epsilon : kl[index];
  *loss = static_cast<Real>(sum * row_weight);
}

// Calls call with a null pointer to the type of the logits, and one to the type that they are worked with in.
template <typename Call>
void with_types(int64_t storage, Call call) {
  switch (storage) {
    case 0: return call(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case 1: return call(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case 2: return call(static_cast<c10::BFloat16*>(nullptr), static_cast<float*>(nullptr));
    case 3: return call(static_cast<c10::Half*>(nullptr), static_cast<float*>(nullptr));
  }
}

template <typename Pointer>
Pointer cast_like(Pointer, void* tensor) {
  return static_cast<Pointer>(tensor);
}

}  // namespace

extern "C" {

// Writes nothing and returns 0 where a label is out of range.
int overtone_fit(const Problem* problem, const Settings* settings, const Reduction* reduction, void* loss, void* kl,
                 void* row_weights, void* gradient, int64_t gradient_stride) {
  if (!problem->are_labels_in_range()) return 0;
  with_types(problem->storage, [&](auto storage, auto real) {
    fit(*problem, *settings, *reduction, cast_like(real, loss), cast_like(real, kl), cast_like(real, row_weights),
        cast_like(storage, gradient), gradient_stride);
  });
  return 1;
}

void overtone_gradient(const Problem* problem, void* grad_kl, void* out, int64_t out_stride) {
  with_types(problem->storage, [&](auto storage, auto real) {
    write_gradient(*problem, cast_like(real, grad_kl), cast_like(storage, out), out_stride);
  });
}

}  // extern "C"
