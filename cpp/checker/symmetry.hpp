// Exact symmetry: of all states that differ by a renaming of interchangeable names, one stands for
// all. Rule: canonical, never approximate.
//
// Names are told apart by where they occur in the state (colour refinement, as in McKay & Piperno,
// "Practical graph isomorphism, II", 2014); only names that stay alike are tried in every order,
// and not even these when swapping neighbours leaves the state as it is, for then every order does.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "packing.hpp"

namespace tokenspeed::checker {

// Colours want no good hash: a collision makes a tie, and ties are tried out.
constexpr std::uint64_t stir(std::uint64_t x) {
  x *= 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}
constexpr std::uint64_t blend(std::uint64_t a, std::uint64_t b) {
  return (std::rotl(a, 23) ^ b) * 0x9e3779b97f4a7c15ull;
}

// For each kind of name, by its Id and rank: where it goes, and what is known of it.
template <int Kinds>
using Moves = std::array<std::array<std::uint8_t, 256>, static_cast<std::size_t>(Kinds)>;
template <int Kinds>
using Colors = std::array<std::array<std::uint64_t, 256>, static_cast<std::size_t>(Kinds)>;

// `permuted(v)`: v with every name replaced. `sign(v)`: a hash that depends on names by their
// colours alone. `mark(v, path)`: adds to `next` colours where in v each name occurs.
template <class Model>
struct Renaming {
  static constexpr int kKinds = Model::kKinds;
  using Moves = checker::Moves<kKinds>;
  using Colors = checker::Colors<kKinds>;

  template <class T>
  struct Touches : std::false_type {};
  template <int N, int Id>
  struct Touches<Atom<N, Id>> : std::bool_constant<Model::symmetric(Id)> {};
  template <class T, int N>
  struct Touches<Set<T, N>> : Touches<T> {};
  template <class T, int N>
  struct Touches<Seq<T, N>> : Touches<T> {};
  template <class D, class T>
  struct Touches<Fn<D, T>>
      : std::bool_constant<Touches<typename D::Key>::value || Touches<T>::value> {};
  template <Struct T>
  struct Touches<T> {
    static constexpr bool value = std::apply(
        [](auto... field) {
          return (false || ... ||
                  Touches<std::remove_cvref_t<decltype(std::declval<T>().*field)>>::value);
        },
        T::all);
  };

  const Moves& to;
  const Colors& color;

  template <class T>
  T permuted(const T& v) const {
    if constexpr (!Touches<T>::value) {
      return v;
    } else {
      return moved(v);
    }
  }
  template <int N, int Id>
  Atom<N, Id> moved(Atom<N, Id> v) const {
    return {to[static_cast<std::size_t>(Id)][v.v]};
  }
  template <class T, int N>
  Set<T, N> moved(const Set<T, N>& v) const {
    Set<T, N> out;
    v.each([&](int at) { out.put(Rank<T>::of(permuted(Rank<T>::at(at)))); });
    return out;
  }
  template <class T, int N>
  Seq<T, N> moved(const Seq<T, N>& v) const {
    Seq<T, N> out;
    out.n = v.n;
    for (std::size_t i = 0; i < v.n; ++i) out.items[i] = permuted(v.items[i]);
    return out;
  }
  template <class D, class T>
  Fn<D, T> moved(const Fn<D, T>& v) const {
    Fn<D, T> out;
    for (int i = 0; i < D::n; ++i) {
      const auto key = permuted(Rank<typename D::Key>::at(D::rank(i)));
      out[D::place(Rank<typename D::Key>::of(key))] = permuted(v[i]);
    }
    return out;
  }
  template <Struct T>
  T moved(const T& v) const {
    T out{};
    out.set_tag(v.tag());
    each_member(v, [&](auto field) { out.*field = permuted(v.*field); });
    return out;
  }

  std::uint64_t sign(bool v) const { return stir(v + 1u); }
  std::uint64_t sign(int v) const { return stir(static_cast<std::uint64_t>(v) + 3u); }
  template <int N, int Id>
  std::uint64_t sign(Atom<N, Id> v) const {
    if constexpr (Model::symmetric(Id)) return color[static_cast<std::size_t>(Id)][v.v];
    return stir(v.v + 17u);
  }
  template <class T, int N>
  std::uint64_t sign(const Set<T, N>& v) const {
    std::uint64_t h = 29;
    if constexpr (!Touches<T>::value) {
      for (auto x : v.w) h = blend(h, x);
    } else {
      v.each([&](int at) { h += stir(sign(Rank<T>::at(at))); });
    }
    return h;
  }
  template <class T, int N>
  std::uint64_t sign(const Seq<T, N>& v) const {
    std::uint64_t h = v.n;
    for (std::size_t i = 0; i < v.n; ++i) h = blend(h, sign(v.items[i]));
    return h;
  }
  template <class D, class T>
  std::uint64_t sign(const Fn<D, T>& v) const {
    std::uint64_t h = 31;
    for (int i = 0; i < D::n; ++i) h += blend(key_sign<D>(i), sign(v[i]));
    return h;
  }
  template <Struct T>
  std::uint64_t sign(const T& v) const {
    std::uint64_t h = static_cast<std::uint64_t>(v.tag()) + 37;
    each_member(v, [&](auto field) { h = blend(h, sign(v.*field)); });
    return h;
  }
  template <class D>
  std::uint64_t key_sign(int place) const {
    return sign(Rank<typename D::Key>::at(D::rank(place)));
  }

  template <class T>
  void mark(const T& v, std::uint64_t path, Colors& next) const {
    if constexpr (Touches<T>::value) marked(v, path, next);
  }
  template <int N, int Id>
  void marked(Atom<N, Id> v, std::uint64_t path, Colors& next) const {
    next[static_cast<std::size_t>(Id)][v.v] += stir(path);
  }
  template <class T, int N>
  void marked(const Set<T, N>& v, std::uint64_t path, Colors& next) const {
    v.each([&](int at) {
      const T item = Rank<T>::at(at);
      mark(item, blend(path, sign(item)), next);
    });
  }
  template <class T, int N>
  void marked(const Seq<T, N>& v, std::uint64_t path, Colors& next) const {
    for (std::size_t i = 0; i < v.n; ++i) mark(v.items[i], blend(path, i), next);
  }
  template <class D, class T>
  void marked(const Fn<D, T>& v, std::uint64_t path, Colors& next) const {
    for (int i = 0; i < D::n; ++i) {
      const auto key = Rank<typename D::Key>::at(D::rank(i));
      mark(key, blend(path, sign(v[i])), next);
      mark(v[i], blend(path, sign(key) + 1), next);
    }
  }
  template <Struct T>
  void marked(const T& v, std::uint64_t path, Colors& next) const {
    std::uint64_t at = blend(path, static_cast<std::uint64_t>(v.tag()));
    const std::uint64_t whole = sign(v);
    each_member(v, [&](auto field) { mark(v.*field, blend(++at, whole), next); });
  }
};

// The representative of a state's class, packed.
template <class Model>
class Canonical final : public Keyer {
  using State = typename Model::State;
  using Key = typename Model::Key;

 public:
  Canonical() {
    for (auto& to : to_) {
      for (std::size_t v = 0; v < to.size(); ++v) to[v] = static_cast<std::uint8_t>(v);
    }
  }

  void operator()(StatePtr state, Word* key) override {
    const Key found = canonical(*static_cast<const State*>(state));
    std::copy(found.w.begin(), found.w.end(), key);
  }

 private:
  struct Tie {
    std::size_t group, first, last;
  };
  struct Span {
    std::uint8_t* from;
    std::uint8_t* to;
    std::uint8_t* begin() const { return from; }
    std::uint8_t* end() const { return to; }
  };

  Key canonical(const State& state) {
    plain(*color_);
    for (const auto& group : Model::groups()) {
      for (int v : group.members) {
        color(group.id, v) = 1;
        to(group.id, v) = static_cast<std::uint8_t>(v);
      }
    }
    std::size_t cells = 0;
    while (true) {
      refine(state);
      const std::size_t now = sort();
      if (now == Model::kInterchangeable) return Model::pack(renamed(state));  // all told apart
      if (now == cells) break;
      cells = now;
    }
    ties(state);
    best_ = Model::pack(renamed(state));
    for (auto& tie : ties_) std::sort(order(tie).begin(), order(tie).end());
    search(state, 0);
    return best_;
  }

  std::uint64_t& color(int id, int v) {
    return (*color_)[static_cast<std::size_t>(id)][static_cast<std::size_t>(v)];
  }
  Span order(const Tie& tie) {
    auto* base = order_[tie.group].data();
    return {base + tie.first, base + tie.last};
  }

  std::uint8_t& to(int id, int v) {
    return to_[static_cast<std::size_t>(id)][static_cast<std::size_t>(v)];
  }

  // Names that are not interchangeable are told apart by themselves.
  static void plain(Colors<Model::kKinds>& colors) {
    for (const auto& group : Model::groups()) {
      const auto id = static_cast<std::size_t>(group.id);
      for (std::size_t v = 0; v < static_cast<std::size_t>(Model::kNames[id]); ++v) {
        colors[id][v] = stir(v + 101);
      }
    }
  }

  void refine(const State& state) {
    plain(*next_);
    for (const auto& group : Model::groups()) {
      for (int v : group.members)
        (*next_)[static_cast<std::size_t>(group.id)][static_cast<std::size_t>(v)] =
            stir(color(group.id, v));
    }
    const Renaming<Model> renaming{to_, *color_};
    std::uint64_t path = 41;
    each_member(state, [&](auto variable) { renaming.mark(state.*variable, ++path, *next_); });
    std::swap(color_, next_);
  }

  // Members by colour; how many different colours there are.
  std::size_t sort() {
    std::size_t cells = 0, at = 0;
    for (const auto& group : Model::groups()) {
      auto& order = order_[at++];
      order.assign(group.members.begin(), group.members.end());
      std::sort(order.begin(), order.end(), [&](int a, int b) {
        const auto x = color(group.id, a), y = color(group.id, b);
        return x != y ? x < y : a < b;
      });
      for (std::size_t i = 0; i < order.size(); ++i) {
        cells += i == 0 || color(group.id, order[i - 1]) != color(group.id, order[i]);
      }
    }
    return cells;
  }

  // Runs of one colour whose members cannot be swapped freely.
  void ties(const State& state) {
    ties_.clear();
    std::size_t at = 0;
    for (const auto& group : Model::groups()) {
      const auto& order = order_[at];
      for (std::size_t first = 0, last; first < order.size(); first = last) {
        last = first + 1;
        bool free = true;
        while (last < order.size() &&
               color(group.id, order[last]) == color(group.id, order[first])) {
          free = free && swappable(state, group.id, order[last - 1], order[last]);
          ++last;
        }
        if (!free) ties_.push_back({at, first, last});
      }
      ++at;
    }
  }

  bool swappable(const State& state, int id, std::uint8_t a, std::uint8_t b) {
    std::swap(to(id, a), to(id, b));
    const bool same = Renaming<Model>{to_, *color_}.permuted(state) == state;
    std::swap(to(id, a), to(id, b));
    return same;
  }

  State renamed(const State& state) {
    std::size_t at = 0;
    for (const auto& group : Model::groups()) {
      const auto& order = order_[at++];
      auto& to = to_[static_cast<std::size_t>(group.id)];
      for (std::size_t i = 0; i < order.size(); ++i) {
        to[order[i]] = static_cast<std::uint8_t>(group.members[i]);
      }
    }
    return Renaming<Model>{to_, *color_}.permuted(state);
  }

  void search(const State& state, std::size_t tie) {
    if (tie == ties_.size()) {
      const Key key = Model::pack(renamed(state));
      if (key < best_) best_ = key;
      return;
    }
    const Span span = order(ties_[tie]);
    do {
      search(state, tie + 1);
    } while (std::next_permutation(span.begin(), span.end()));
  }

  Moves<Model::kKinds> to_{};
  std::unique_ptr<Colors<Model::kKinds>> color_ = std::make_unique<Colors<Model::kKinds>>();
  std::unique_ptr<Colors<Model::kKinds>> next_ = std::make_unique<Colors<Model::kKinds>>();
  std::array<std::vector<std::uint8_t>, Model::kGroups> order_;
  std::vector<Tie> ties_;
  Key best_{};
};

}  // namespace tokenspeed::checker
