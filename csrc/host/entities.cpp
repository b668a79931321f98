// Greedy choice among scored spans, and spans from start, end and inside probabilities.
//
// gliner 0.2.29 (decoding/decoder.py) sorts a text's candidates by score and compares each with all
// that were kept: O(n^2). Here a kept set answers "does this span clash?" in O(log n):
//   flat:   kept spans are disjoint, so they form a sorted map; only two neighbours can touch.
//   nested: kept spans are nested or disjoint. A new [s, e] crosses a kept [a, b] iff
//           a in (s, e] and b > e, or b in [s, e) and a < s: a range maximum and a range minimum.
// Equal scores keep the order of the candidates, and the result is stably sorted by start.
#include "csrc/host/entities.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include <pybind11/numpy.h>

namespace fastenc::host {
namespace {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Index = int64_t;

struct Span {
  Index start, end;  // inclusive
};

// ---- kept sets ---------------------------------------------------------------------------------

class Disjoint {
 public:
  explicit Disjoint(Index /*words*/, bool multi_label) : multi_label_(multi_label) {}

  bool clashes(Span x) const {
    const auto after = kept_.upper_bound(x.end);  // the first that begins behind x
    if (after == kept_.begin()) return false;
    const auto [start, end] = *std::prev(after);
    if (end < x.start) return false;
    return !(multi_label_ && start == x.start && end == x.end);
  }

  void keep(Span x) { kept_.emplace(x.start, x.end); }

 private:
  std::map<Index, Index> kept_;
  bool multi_label_;
};

class Laminar {
 public:
  Laminar(Index words, bool multi_label)
      : words_(words),
        multi_label_(multi_label),
        furthest_end_(2 * words, -1),
        first_start_(2 * words, std::numeric_limits<Index>::max()) {}

  bool clashes(Span x) const {
    if (!multi_label_ && seen_.contains(key(x))) return true;
    return furthest_end(x.start + 1, x.end + 1) > x.end || first_start(x.start, x.end) < x.start;
  }

  void keep(Span x) {
    seen_.insert(key(x));
    for (Index i = x.start + words_; i > 0; i /= 2) {
      furthest_end_[i] = std::max(furthest_end_[i], x.end);
    }
    for (Index i = x.end + words_; i > 0; i /= 2) {
      first_start_[i] = std::min(first_start_[i], x.start);
    }
  }

 private:
  uint64_t key(Span x) const { return static_cast<uint64_t>(x.start * words_ + x.end); }

  // Over kept spans that start in [first, stop).
  Index furthest_end(Index first, Index stop) const {
    Index found = -1;
    for (first += words_, stop += words_; first < stop; first /= 2, stop /= 2) {
      if (first & 1) found = std::max(found, furthest_end_[first++]);
      if (stop & 1) found = std::max(found, furthest_end_[--stop]);
    }
    return found;
  }

  // Over kept spans that end in [first, stop).
  Index first_start(Index first, Index stop) const {
    Index found = std::numeric_limits<Index>::max();
    for (first += words_, stop += words_; first < stop; first /= 2, stop /= 2) {
      if (first & 1) found = std::min(found, first_start_[first++]);
      if (stop & 1) found = std::min(found, first_start_[--stop]);
    }
    return found;
  }

  Index words_;
  bool multi_label_;
  std::vector<Index> furthest_end_, first_start_;
  std::unordered_set<uint64_t> seen_;
};

// ---- selection ---------------------------------------------------------------------------------

template <typename Kept>
void select_text(const Index* start, const Index* end, const double* score, Index first, Index stop,
                 bool multi_label, std::vector<Index>& chosen) {
  std::vector<Index> order(stop - first);
  std::iota(order.begin(), order.end(), first);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return score[a] > score[b]; });
  Index words = 0;
  for (const Index i : order) words = std::max(words, end[i] + 1);
  Kept kept(words, multi_label);
  const auto begin = static_cast<std::ptrdiff_t>(chosen.size());
  for (const Index i : order) {
    const Span span{start[i], end[i]};
    if (kept.clashes(span)) continue;
    kept.keep(span);
    chosen.push_back(i);
  }
  std::stable_sort(chosen.begin() + begin, chosen.end(),
                   [&](Index a, Index b) { return start[a] < start[b]; });
}

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void check_edges(const Array<Index>& edges, Index total) {
  const Index* e = edges.data();
  const Index count = edges.size();
  if (edges.ndim() != 1 || count < 1 || e[0] != 0 || e[count - 1] != total ||
      !std::is_sorted(e, e + count)) {
    throw std::invalid_argument("edges: expected non-decreasing numbers from 0 to " +
                                std::to_string(total));
  }
}

py::tuple select_spans(const Array<Index>& start, const Array<Index>& end,
                       const Array<double>& score, const Array<Index>& edges, bool flat,
                       bool multi_label) {
  const Index total = start.size();
  if (end.size() != total || score.size() != total) {
    throw std::invalid_argument("start, end, score: expected one length");
  }
  check_edges(edges, total);
  const Index *s = start.data(), *e = end.data(), *cut = edges.data();
  const double* p = score.data();
  for (Index i = 0; i < total; ++i) {
    if (s[i] < 0 || e[i] < s[i] || std::isnan(p[i])) {
      throw std::invalid_argument("candidate " + std::to_string(i) +
                                  ": expected 0 <= start <= end and a score that is a number");
    }
  }
  const Index texts = edges.size() - 1;
  std::vector<Index> chosen, chosen_edges{0};
  {
    py::gil_scoped_release release;
    for (Index t = 0; t < texts; ++t) {
      auto* select = flat ? &select_text<Disjoint> : &select_text<Laminar>;
      select(s, e, p, cut[t], cut[t + 1], multi_label, chosen);
      chosen_edges.push_back(static_cast<Index>(chosen.size()));
    }
  }
  return py::make_tuple(to_numpy(chosen), to_numpy(chosen_edges));
}

// ---- token level -------------------------------------------------------------------------------

struct Found {
  std::vector<Index> start, end, label, edges{0};
  std::vector<double> score;
};

// Spans of one text in gliner's order: by start, then label, then end.
void token_text(const float* probability, Index words, Index labels, Index used, double threshold,
                Found& found) {
  const auto at = [&](Index word, Index label, int kind) {
    return probability[(word * labels + label) * 3 + kind];
  };
  // gliner compares starts and ends as float32 tensors, insides as Python floats
  const auto limit = static_cast<float>(threshold);
  for (Index word = 0; word < words; ++word) {
    for (Index label = 0; label < used; ++label) {
      if (!(at(word, label, 0) > limit)) continue;
      double least = std::numeric_limits<double>::infinity();
      for (Index last = word; last < words; ++last) {
        const double inside = at(last, label, 2);
        if (inside < threshold || std::isnan(inside)) break;
        least = std::min(least, inside);
        if (!(at(last, label, 1) > limit)) continue;
        found.start.push_back(word);
        found.end.push_back(last);
        found.label.push_back(label);
        found.score.push_back(std::min({least, static_cast<double>(at(word, label, 0)),
                                        static_cast<double>(at(last, label, 1))}));
      }
    }
  }
}

py::tuple token_spans(const Array<float>& probability, const Array<Index>& edges,
                      const Array<Index>& num_labels, double threshold) {
  if (probability.ndim() != 3 || probability.shape(2) != 3) {
    throw std::invalid_argument("probability: expected (words, labels, 3)");
  }
  check_edges(edges, probability.shape(0));
  const Index texts = edges.size() - 1, labels = probability.shape(1);
  if (num_labels.size() != texts) {
    throw std::invalid_argument("num_labels: expected one number a text");
  }
  const float* p = probability.data();
  const Index *cut = edges.data(), *used = num_labels.data();
  Found found;
  {
    py::gil_scoped_release release;
    for (Index t = 0; t < texts; ++t) {
      token_text(p + cut[t] * labels * 3, cut[t + 1] - cut[t], labels, std::min(used[t], labels),
                 threshold, found);
      found.edges.push_back(static_cast<Index>(found.start.size()));
    }
  }
  return py::make_tuple(to_numpy(found.start), to_numpy(found.end), to_numpy(found.label),
                        to_numpy(found.score), to_numpy(found.edges));
}

}  // namespace

void define_entities(py::module_& module) {
  module.def("select_spans", &select_spans, py::arg("start"), py::arg("end"), py::arg("score"),
             py::arg("edges"), py::arg("flat"), py::arg("multi_label"),
             "Greedy search by score among candidates (n,) of several texts; edges (texts + 1,).\n"
             "Returns the chosen candidates' places, by start, and their edges (texts + 1,).");
  module.def("token_spans", &token_spans, py::arg("probability"), py::arg("edges"),
             py::arg("num_labels"), py::arg("threshold"),
             "Candidates from start, end and inside probabilities (words, labels, 3).\n"
             "Returns start, end (within the text), label, score, and edges (texts + 1,).");
}

}  // namespace fastenc::host
